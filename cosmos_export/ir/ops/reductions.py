"""Means and norms along axes."""

from __future__ import annotations

from collections.abc import Sequence

from cosmos_export.ir.ops.declare import aten, axis_of, operation, require
from cosmos_export.ir.spec import TensorSpec


def _rows_of_mean(x: TensorSpec, dims: Sequence[int], keepdim: bool = False) -> Sequence[int]:
    return (0,) if 0 not in {axis_of(d, x.rank) for d in dims} else ()


@operation(aten.mean.dim, rows=_rows_of_mean)
def mean(x: TensorSpec, dims: Sequence[int], keepdim: bool = False) -> TensorSpec:
    axes = {axis_of(d, x.rank) for d in dims}
    kept = [1 if i in axes else s for i, s in enumerate(x.shape) if keepdim or i not in axes]
    return TensorSpec(x.dtype, tuple(kept))


def _rows_of_norm(x: TensorSpec, order: float, dims: Sequence[int], keepdim: bool = False) -> Sequence[int]:
    return _rows_of_mean(x, dims)


@operation(aten.linalg_vector_norm.default, rows=_rows_of_norm)
def vector_norm(x: TensorSpec, order: float, dims: Sequence[int], keepdim: bool = False) -> TensorSpec:
    require(order == 2, f"a norm of order {order}")
    return mean(x, dims, keepdim)
