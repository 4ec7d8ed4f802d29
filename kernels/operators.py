"""Kernels as operators a compiled graph calls: opaque to the compiler, with a shape rule, run by the kernel.

A kernel of an operation of the dialect is called as that is: its name, operands and results are taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cosmos_export.ir import ops
from cosmos_export.kernels import activation_quantize as act
from cosmos_export.kernels import gemm_w4a16 as w4a16
from cosmos_export.kernels import joint_attention as attention
from cosmos_export.kernels import norm_quantize as norm
from cosmos_export.kernels import qkv_pack as pack
from cosmos_export.kernels import sampler_step as sampler
from cosmos_export.kernels.launch import FP8

_NAMESPACE = "cosmos_export_kernels"
KERNELS: dict[Any, Callable[..., Any]] = {}
"""Operation of the dialect → the operator of its kernel."""


def _operator(schema: Any, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The operator that runs ``kernel``, called as ``schema`` says: an operation of the dialect, or the text of one.

    ``fake``: the results as tensors without data. Sizes are not compared there as the dialect's rule does: a compiler
    has two symbols for one length that two of its inputs share.
    """
    text = schema if isinstance(schema, str) else str(schema._schema).partition("::")[2]
    name, _, rest = text.partition("(")
    name = name.partition(".")[0]
    definition = torch.library.custom_op(f"{_NAMESPACE}::{name}", kernel, mutates_args=(), schema=f"({rest}")
    definition.register_fake(fake)
    made: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE), name).default
    if not isinstance(schema, str):
        KERNELS[schema] = made
    return made


def _narrow(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=FP8)


norm_quantize = _operator(ops.NORM_QUANTIZE, lambda *operands: norm.norm_quantize(*operands)[0], _narrow)


def _sum_norm_quantize(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return norm.norm_quantize(x, weight, eps, scale, delta=delta, total=total)[0], total


add_norm_quantize = _operator(
    ops.ADD_NORM_QUANTIZE, _sum_norm_quantize, lambda x, *_: (_narrow(x), x.new_empty(x.shape))
)
activation_quantize = _operator(
    ops.ACTIVATION_QUANTIZE, lambda *operands: act.activation_quantize(*operands)[0], _narrow
)


def _heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    size = 2 * rest[2].shape[1]  # of `cos`
    return tuple(t.new_empty((t.shape[0], t.shape[1] // size, size)) for t in (query, key, value))


qkv_pack = _operator(ops.QKV_PACK, pack.qkv_pack, _heads)


def _unipc_step(
    coefficients: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    *state, masks, axes = rest
    state = [t.contiguous() for t in state]
    other = uncond.contiguous() if uncond is not None else None
    new, corrected, d = (torch.empty_like(state[0]) for _ in range(3))
    held = list(zip(axes, masks, strict=True))
    sampler.unipc_step(coefficients, cond.contiguous(), other, *state, masks=held, into=(new, corrected, d))
    return new, corrected, d


def _next_state(coefficients: torch.Tensor, cond: torch.Tensor, uncond: Any, sample: torch.Tensor, *_: Any) -> Any:
    return tuple(sample.new_empty(sample.shape) for _ in range(3))


unipc_step = _operator(ops.UNIPC_STEP, _unipc_step, _next_state)
joint_attention = _operator(
    ops.JOINT_ATTENTION, attention.joint_attention, lambda query, *_: query.new_empty(query.shape)
)

# -- kernels that are no operation of the dialect ----------------------------------------------------------------------


def _joint_attention_fp8(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
    """E4M3 operands, bf16 result; ``scales`` float32 [3]: of the query, of all keys, of all values."""
    *operands, scales = rest
    heads: Sequence[int] = query.shape[1], key.shape[1], key.shape[1]
    each = tuple(s.expand(n).contiguous() for s, n in zip(scales, heads, strict=True))
    return attention.joint_attention(query, key, *operands, scales=each)


joint_attention_fp8 = _operator(
    "joint_attention_fp8(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, float scale, "
    "Tensor scales) -> Tensor",
    _joint_attention_fp8,
    lambda query, *_: query.new_empty(query.shape, dtype=torch.bfloat16),
)
gemm_w4a16 = _operator(
    "gemm_w4a16(Tensor a, Tensor packed, Tensor scales) -> Tensor",
    w4a16.gemm_w4a16,
    lambda a, packed, _: a.new_empty((a.shape[0], packed.shape[0])),
)
