"""`ROTARY`: rotation of queries and keys by the angles of their positions."""

from __future__ import annotations

import torch

from cosmos_export.ir.dims import equal, expression, simplify
from cosmos_export.ir.ops.declare import new_operator, operation, require
from cosmos_export.ir.spec import TensorSpec


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + d/2) of ``x`` [rows, heads, d] by the angles of each row; tables are [rows, d/2]."""
    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(1) for t in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


ROTARY = new_operator(rotary)


@operation(ROTARY, rows=(0, 1, 2))
def _rule(x: TensorSpec, cos: TensorSpec, sin: TensorSpec) -> TensorSpec:
    half = simplify(expression(x.shape[-1]) / 2)
    fits = cos == sin and cos.rank == 2 and x.rank == 3 and equal(cos.shape[0], x.shape[0]) and cos.shape[1] == half
    require(bool(fits), f"rotary of {x} by tables {cos} and {sin}")
    return TensorSpec(torch.promote_types(x.dtype, cos.dtype), x.shape)
