"""`DEQUANTIZE_GROUPS`: weights in INT4, with a scale for each group of columns of a row."""

from __future__ import annotations

import torch

from cosmos_export.ir import packing
from cosmos_export.ir.dims import equal
from cosmos_export.ir.ops.declare import Trait, new_operator, operation, require
from cosmos_export.ir.spec import INT4, TensorSpec


def dequantize_groups(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """INT4 ``x`` [N, K] times the ``scale`` [N, K / group] of its group, in the type of ``scale``."""
    group = x.shape[1] // scale.shape[1]
    return (packing.groups_of(x.to(scale.dtype), group) * scale.unsqueeze(-1)).flatten(-2)


DEQUANTIZE_GROUPS = new_operator(dequantize_groups)


@operation(DEQUANTIZE_GROUPS, traits=(Trait.WIDENS,), rows=(0, 1), first=INT4)
def _rule(x: TensorSpec, scale: TensorSpec) -> TensorSpec:
    fits = x.dtype == INT4 and x.rank == scale.rank == 2 and equal(x.shape[0], scale.shape[0])
    require(fits and x.shape[1] % scale.shape[1] == 0, f"dequantize of {x} by {scale}")
    return TensorSpec(scale.dtype, x.shape)
