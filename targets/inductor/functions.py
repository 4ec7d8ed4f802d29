"""Operations of the graph as plain tensor code that a compiler sees through, and this project's kernels beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Node
from cosmos_export.ir.ops import aten


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    normal = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normal.to(weight.dtype) * weight


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Halves instead of a rotated copy: the compiler reads x once.
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * c + -second * s, second * c + first * s), dim=-1)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    q, k, v = (t.unsqueeze(0).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).squeeze(0)


def concatenated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Joint attention by PyTorch's own kernels. The copy of K/V is below 1 % of the attention at 480p."""
    keys, values = torch.cat((key, prefix_key)), torch.cat((value, prefix_value))
    return attention(query, keys, values, False, scale)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.to(torch.float32) / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def dequantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.to(torch.float32) * (scale if scale.dim() == 0 else scale.unsqueeze(-1))).to(dtype)


def dequantize_groups(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """INT4 as it is stored, two numbers a byte, the first in the low half: uint8 [N, K / 2]."""
    wide = packed.to(torch.int16)
    numbers = torch.stack((wide & 15, wide >> 4), dim=-1).flatten(1)
    signed = torch.where(numbers > 7, numbers - 16, numbers).to(scale.dtype)
    rows, columns = signed.shape
    return (signed.view(rows, scale.shape[1], -1) * scale.unsqueeze(-1)).view(rows, columns)


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``linear(dequantize(x), dequantize(weight))`` as one FP8 product; E4M3 operands, ``x_scale`` of one number,
    ``w_scale`` too or [N] with one for each output.

    cuBLASLt takes sides that are multiples of 16; the others are widened.
    """
    if any(side % 16 for side in weight.shape) or dtype != torch.bfloat16 or x.dim() != 2:
        return F.linear(dequantize(x, x_scale, dtype), dequantize(weight, w_scale, dtype), bias)
    fast, x = x.device.type == "cuda", x.contiguous()
    if w_scale.dim():  # the library scales rows of both operands, or neither's
        x_scale, w_scale = x_scale.expand(x.shape[0], 1).contiguous(), w_scale.unsqueeze(0)
    result: torch.Tensor = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )
    return result


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A product with INT4 weights by a kernel that dequantizes in registers; bf16 rows, groups of 128."""
    from cosmos_export.kernels import operators

    result: torch.Tensor = operators.gemm_w4a16(x, packed, scale)
    return result if bias is None else result + bias


def along_rows(x: torch.Tensor, narrow: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``narrow(x)`` of [N, heads, d] with neighbouring rows side by side, every head from a multiple of 16 on: what FP8
    matrix units want of values, and what lets a kernel load more than a byte at a time."""
    rows = x.shape[0]
    padded = F.pad(x.permute(1, 2, 0), (0, 16 - rows % 16)).contiguous()  # never by none: that is other code
    return narrow(padded)[..., :rows].permute(2, 0, 1)


def narrow_values(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values in E4M3 as the second product of this project's attention wants them."""
    return along_rows(x, lambda wide: quantize(wide, scale))


ATTENTIONS = ("sdpa", "triton")
"""``sdpa``: PyTorch's choice of cuDNN and flash attention; ``triton``: `joint_attention`, which copies no K/V."""


def _kernels(targets: Collection[Any]) -> dict[Any, Callable[..., Any]]:
    """The kernels of fused operations; their package is imported where there is one alone."""
    if not targets:
        return {}
    from cosmos_export.kernels import operators

    return operators.KERNELS


def _joint(kind: str) -> Callable[..., torch.Tensor]:
    if kind == "sdpa":
        return concatenated
    if kind == "triton":
        from cosmos_export.kernels import operators

        return operators.joint_attention
    raise ValueError(f"attention {kind!r} is not one of {', '.join(ATTENTIONS)}")


def implementations(kind: str, fused: Collection[Node] = ()) -> dict[Any, Callable[..., Any]]:
    """Operation → what computes it, for attention of ``kind`` and the ``fused`` operations of a graph."""
    return {
        **_kernels({node.target for node in fused}),
        ops.RMS_NORM: rms_norm,
        ops.ROTARY: rotary,
        ops.SWIGLU: swiglu,
        ops.ATTENTION: attention,
        ops.JOINT_ATTENTION: _joint(kind),
        ops.QUANTIZE: quantize,
        ops.DEQUANTIZE: dequantize,
        ops.DEQUANTIZE_GROUPS: dequantize_groups,
        # These carry their type as an argument in the IR but not in ATen's overload.
        aten._to_copy.default: lambda x, dtype: x.to(dtype),
        aten.view.default: lambda x, shape: x.reshape(shape),
    }
