"""Kernels as operators a compiled graph calls: opaque to the compiler, with a shape rule, run by the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cosmos_export.kernels import activation_quantize as act
from cosmos_export.kernels import gemm_w4a16 as w4a16
from cosmos_export.kernels import joint_attention as kernel
from cosmos_export.kernels import norm_quantize as norm
from cosmos_export.kernels import qkv_pack as pack
from cosmos_export.kernels import sampler_step as sampler
from cosmos_export.kernels.launch import FP8


@torch.library.custom_op("cosmos_export_kernels::joint_attention", mutates_args=())
def _joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return kernel.joint_attention(query, key, value, prefix_key, prefix_value, scale)


@_joint_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("cosmos_export_kernels::joint_attention_fp8", mutates_args=())
def _joint_attention_fp8(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
    scales: torch.Tensor,
) -> torch.Tensor:
    """E4M3 operands, bf16 result; ``scales`` float32 [3]: of the query, of all keys, of all values."""
    heads, kv_heads = query.shape[1], key.shape[1]
    of_query, of_key, of_value = (
        s.expand(n).contiguous() for s, n in zip(scales, (heads, kv_heads, kv_heads), strict=True)
    )
    operands = (query, key, value, prefix_key, prefix_value, scale)
    return kernel.joint_attention(*operands, scales=(of_query, of_key, of_value))


@_joint_attention_fp8.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
    scales: torch.Tensor,
) -> torch.Tensor:
    return query.new_empty(query.shape, dtype=torch.bfloat16)


@torch.library.custom_op("cosmos_export_kernels::gemm_w4a16", mutates_args=())
def _gemm_w4a16(a: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return w4a16.gemm_w4a16(a, packed, scales)


@_gemm_w4a16.register_fake
def _(a: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], packed.shape[0]))


@torch.library.custom_op("cosmos_export_kernels::norm_quantize", mutates_args=())
def _norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor) -> torch.Tensor:
    return norm.norm_quantize(x, weight, eps, scale)[0]


@_norm_quantize.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=FP8)


@torch.library.custom_op("cosmos_export_kernels::add_norm_quantize", mutates_args=())
def _add_norm_quantize(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantized norm of ``x + delta``, and the sum."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return norm.norm_quantize(x, weight, eps, scale, delta=delta, total=total)[0], total


@_add_norm_quantize.register_fake
def _(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape)


@torch.library.custom_op("cosmos_export_kernels::activation_quantize", mutates_args=())
def _activation_quantize(x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    return act.activation_quantize(x, up, scale)[0]


@_activation_quantize.register_fake
def _(x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=FP8)


@torch.library.custom_op("cosmos_export_kernels::qkv_pack", mutates_args=())
def _qkv_pack(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pack.qkv_pack(query, key, value, q_weight, k_weight, cos, sin, eps)


@_qkv_pack.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = 2 * cos.shape[1]
    q, k, v = (t.new_empty((t.shape[0], t.shape[1] // size, size)) for t in (query, key, value))
    return q, k, v


@torch.library.custom_op("cosmos_export_kernels::unipc_step", mutates_args=())
def _unipc_step(
    coefficients: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    sample: torch.Tensor,
    last: torch.Tensor,
    m0: torch.Tensor,
    m1: torch.Tensor,
    masks: Sequence[torch.Tensor],
    axes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The next sample, last and m0; the next m1 is ``m0``."""
    state = [t.contiguous() for t in (sample, last, m0, m1)]
    other = uncond.contiguous() if uncond is not None else None
    new, corrected, d = (torch.empty_like(state[0]) for _ in range(3))
    sampler.unipc_step(
        coefficients, cond.contiguous(), other, state[0], state[1], state[2], state[3],
        masks=list(zip(axes, masks, strict=True)), into=(new, corrected, d),
    )  # fmt: skip
    return new, corrected, d


@_unipc_step.register_fake
def _(
    coefficients: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    sample: torch.Tensor,
    last: torch.Tensor,
    m0: torch.Tensor,
    m1: torch.Tensor,
    masks: Sequence[torch.Tensor],
    axes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new, corrected, d = (sample.new_empty(sample.shape) for _ in range(3))
    return new, corrected, d


norm_quantize = torch.ops.cosmos_export_kernels.norm_quantize.default
add_norm_quantize = torch.ops.cosmos_export_kernels.add_norm_quantize.default
activation_quantize = torch.ops.cosmos_export_kernels.activation_quantize.default
qkv_pack = torch.ops.cosmos_export_kernels.qkv_pack.default
unipc_step = torch.ops.cosmos_export_kernels.unipc_step.default
gemm_w4a16 = torch.ops.cosmos_export_kernels.gemm_w4a16.default
joint_attention_fp8 = torch.ops.cosmos_export_kernels.joint_attention_fp8.default
joint_attention = torch.ops.cosmos_export_kernels.joint_attention.default
