"""`QUANTIZE` and `DEQUANTIZE`: numbers in FP8 E4M3 with one scale, or one per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cosmos_export.ir import packing
from cosmos_export.ir.ops.declare import Trait, new_operator, operation, require
from cosmos_export.ir.spec import TensorSpec


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale`` in FP8 E4M3, saturated; ``scale`` float32 []."""
    return packing.to_fp8(x, scale)


QUANTIZE = new_operator(quantize)


def require_scale(scale: TensorSpec) -> None:
    """SpecError unless ``scale`` is float32 []."""
    require(scale == TensorSpec(torch.float32, ()), f"a scale is one float32 number, not {scale}")


@operation(QUANTIZE, traits=(Trait.ROUNDS,), rows=(0,))
def _quantize(x: TensorSpec, scale: TensorSpec) -> TensorSpec:
    require_scale(scale)
    require(x.dtype in (torch.float32, torch.bfloat16, torch.float16), f"quantize of {x}")
    return TensorSpec(torch.float8_e4m3fn, x.shape)


def dequantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x · scale`` of FP8 E4M3 ``x``, multiplied in float32 and rounded to ``dtype``.

    ``scale`` is float32 [], or [N] with one for each row of ``x`` [N, K].
    """
    wide = x.to(torch.float32)
    return wide.mul_(scale if scale.dim() == 0 else scale.unsqueeze(-1)).to(dtype)


DEQUANTIZE = new_operator(dequantize)


def _rows(x: TensorSpec, scale: TensorSpec, dtype: torch.dtype) -> Sequence[int]:
    return (0, 1) if scale.rank else (0,)


@operation(DEQUANTIZE, traits=(Trait.WIDENS,), rows=_rows)
def _dequantize(x: TensorSpec, scale: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    if scale != TensorSpec(torch.float32, x.shape[:1]):
        require_scale(scale)
    require(x.dtype == torch.float8_e4m3fn, f"dequantize of {x}")
    return TensorSpec(dtype, x.shape)
