"""Products of matrices."""

from __future__ import annotations

from collections.abc import Sequence

from cosmos_export.ir.dims import equal
from cosmos_export.ir.ops.declare import aten, broadcast, operation, require
from cosmos_export.ir.spec import TensorSpec


def _rows_of_linear(x: TensorSpec, weight: TensorSpec, bias: TensorSpec | None = None) -> Sequence[int]:
    return (0,) if x.rank > 1 else ()


@operation(aten.linear.default, rows=_rows_of_linear)
def linear(x: TensorSpec, weight: TensorSpec, bias: TensorSpec | None = None) -> TensorSpec:
    require(weight.rank == 2 and equal(x.shape[-1], weight.shape[1]), f"linear of {x} by {weight}")
    require(x.dtype == weight.dtype, f"linear of {x} by {weight}: types differ")
    require(bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype), f"bias {bias} of {weight}")
    return TensorSpec(x.dtype, (*x.shape[:-1], weight.shape[0]))


def _rows_of_matmul(a: TensorSpec, b: TensorSpec) -> Sequence[int]:
    return (0,) if b.rank == 2 or b.rank < a.rank else ()


@operation(aten.matmul.default, rows=_rows_of_matmul)
def matmul(a: TensorSpec, b: TensorSpec) -> TensorSpec:
    require(a.rank >= 2 and b.rank >= 2 and equal(a.shape[-1], b.shape[-2]), f"matmul of {a} and {b}")
    require(a.dtype == b.dtype, f"matmul of {a} and {b}: types differ")
    return TensorSpec(a.dtype, (*broadcast([a.shape[:-2], b.shape[:-2]]), a.shape[-2], b.shape[-1]))
