"""`RMS_NORM`: the norm of a row, of a head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cosmos_export.ir.dims import equal
from cosmos_export.ir.ops.declare import new_operator, operation, require
from cosmos_export.ir.spec import TensorSpec


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``cast(x / sqrt(mean(x², -1) + eps), weight.dtype) * weight``, with statistics in fp32."""
    wide = x.to(torch.float32)
    normal = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normal.to(weight.dtype) * weight


RMS_NORM = new_operator(rms_norm)


def _rows(x: TensorSpec, weight: TensorSpec, eps: float) -> Sequence[int]:
    return (0,) if x.rank > 1 else ()


@operation(RMS_NORM, rows=_rows)
def _rule(x: TensorSpec, weight: TensorSpec, eps: float) -> TensorSpec:
    require(weight.rank == 1 and equal(x.shape[-1], weight.shape[0]), f"rms_norm of {x} by {weight}")
    return TensorSpec(weight.dtype, x.shape)
