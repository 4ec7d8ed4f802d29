"""Other implementations of what kernels here compute, with the same arguments: the benchmark on a GPU decides.

A candidate is a function and the reason it cannot run on a device, empty where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from cosmos_export.kernels import gemm_w4a16, gemm_w8a8, joint_attention
from cosmos_export.kernels.launch import FP8


@dataclass(frozen=True)
class Candidate:
    """One way to compute something."""

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[torch.device], str] = lambda device: ""
    """Why it cannot run on a device; empty where it can."""


def _needs_cuda(device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs a GPU"


def _needs_cudnn_frontend(device: torch.device) -> str:
    if find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return _needs_cuda(device)


# -- attention: (query, key, value, prefix_key, prefix_value, scale), rows by heads ------------------------------------


def _joined(query: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    key, value, prefix_key, prefix_value = parts
    joined = (query, torch.cat((key, prefix_key)), torch.cat((value, prefix_value)))
    q, k, v = (t.unsqueeze(0).transpose(1, 2) for t in joined)
    return q, k, v


def sdpa(backend: Any = None) -> Callable[..., torch.Tensor]:
    """PyTorch's attention over joined keys, by the given one of its backends, or whichever it takes."""

    def run(query: torch.Tensor, *parts: Any) -> torch.Tensor:
        q, k, v = _joined(query, *parts[:4])
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=parts[4], enable_gqa=True)
        else:
            from torch.nn.attention import sdpa_kernel

            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, scale=parts[4], enable_gqa=True)
        return out.transpose(1, 2).squeeze(0)

    return run


_graphs: dict[Any, Any] = {}
_CUDNN_OUT_SCALE = 128.0


def cudnn_fp8(query: torch.Tensor, *parts: Any) -> torch.Tensor:
    """cuDNN's FP8 attention over joined keys, the scale of every tensor one; E4M3 operands, bf16 result."""
    import cudnn

    q, k, v = _joined(query, *parts[:4])
    scale = float(parts[4])
    key = (q.shape, k.shape, q.stride(), k.stride(), scale, q.device)
    if key not in _graphs:
        graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.FP8_E4M3,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        tensors = [
            graph.tensor(name=n, dim=list(t.shape), stride=list(t.stride()), data_type=cudnn.data_type.FP8_E4M3)
            for n, t in (("q", q), ("k", k), ("v", v))
        ]
        scales = [
            graph.tensor(name=n, dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=cudnn.data_type.FLOAT)
            for n in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        ]
        out, _, amax_s, amax_o = graph.sdpa_fp8(
            q=tensors[0], k=tensors[1], v=tensors[2], descale_q=scales[0], descale_k=scales[1], descale_v=scales[2],
            descale_s=scales[3], scale_s=scales[4], scale_o=scales[5], attn_scale=scale, is_inference=True,
            use_causal_mask=False, name="attention",
        )  # fmt: skip
        # Before Blackwell cuDNN writes E4M3 alone: scaled, or small results are lost in its subnormal numbers.
        wide = torch.cuda.get_device_capability(query.device)[0] >= 10
        out_scale = 1.0 if wide else _CUDNN_OUT_SCALE
        result = torch.empty(query.shape, dtype=torch.bfloat16 if wide else FP8, device=query.device)
        seen = result.unsqueeze(0).transpose(1, 2)
        out.set_output(True).set_dim(list(seen.shape)).set_stride(list(seen.stride()))
        out.set_data_type(cudnn.data_type.BFLOAT16 if wide else cudnn.data_type.FP8_E4M3)
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(cudnn.data_type.FLOAT)
        graph.build([cudnn.heur_mode.A])
        one = torch.ones(1, 1, 1, 1, device=query.device)
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=query.device)
        bound = dict.fromkeys(scales, one) | {out: seen, amax_s: one.clone(), amax_o: one.clone()}
        bound[scales[5]] = one * out_scale
        _graphs[key] = (graph, tensors, bound, workspace, result, out_scale)
    graph, tensors, bound, workspace, result, out_scale = _graphs[key]
    graph.execute({**bound, **dict(zip(tensors, (q, k, v), strict=True))}, workspace)
    answer: torch.Tensor = result if result.dtype == torch.bfloat16 else result.to(torch.bfloat16) / out_scale
    return answer


def ours_fp8(query: torch.Tensor, *parts: Any) -> torch.Tensor:
    """This project's kernel with scales of one."""
    heads, kv_heads = query.shape[-2], parts[0].shape[-2]
    ones = [torch.ones(n, device=query.device) for n in (heads, kv_heads, kv_heads)]
    return joint_attention.joint_attention(query, *parts, scales=(ones[0], ones[1], ones[2]))


# -- products: W8A8 (a, weight, a_scale, w_scale), W4A16 (a, packed, scales) -------------------------------------------


def scaled_mm(fast: bool) -> Callable[..., torch.Tensor]:
    """cuBLASLt's FP8 product, with its fast accumulation or without."""

    def run(a: torch.Tensor, weight: torch.Tensor, a_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch._scaled_mm(
            a, weight.t(), scale_a=a_scale.reshape(()), scale_b=w_scale.reshape(()), out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )  # fmt: skip
        return result

    return run


def dequantized(a: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The whole weight widened, then PyTorch's product: what a kernel must beat."""
    weight = gemm_w4a16.unpack(packed).to(a.dtype) * scales.repeat_interleave(gemm_w4a16.GROUP, dim=1)
    return a @ weight.t()


def _backends() -> list[Candidate]:
    from torch.nn.attention import SDPBackend

    return [
        Candidate("sdpa-cudnn", sdpa(SDPBackend.CUDNN_ATTENTION), _needs_cuda),
        Candidate("sdpa-flash", sdpa(SDPBackend.FLASH_ATTENTION), _needs_cuda),
    ]


CANDIDATES: Mapping[str, list[Candidate]] = {
    "joint_attention": [Candidate("triton", joint_attention.joint_attention), Candidate("sdpa", sdpa()), *_backends()],
    "joint_attention_fp8": [Candidate("triton", ours_fp8), Candidate("cudnn", cudnn_fp8, _needs_cudnn_frontend)],
    "gemm_w8a8": [
        Candidate("triton", gemm_w8a8.gemm_w8a8),
        Candidate("triton-fast", lambda *operands: gemm_w8a8.gemm_w8a8(*operands, fast=True)),
        Candidate("scaled-mm", scaled_mm(False)),
        Candidate("scaled-mm-fast", scaled_mm(True), _needs_cuda),
    ],
    "gemm_w4a16": [Candidate("triton", gemm_w4a16.gemm_w4a16), Candidate("dequantize", dequantized)],
}
"""Kernel → every way to compute it, this project's first."""
