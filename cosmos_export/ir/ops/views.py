"""The same elements in another shape."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from cosmos_export.ir.dims import Size, equal, expression, product, simplify
from cosmos_export.ir.ops.declare import SpecError, Trait, aten, axis_of, operation, require
from cosmos_export.ir.spec import TensorSpec


def _reshape(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return x.reshape(shape)


def _rows_of_view(x: TensorSpec, shape: Sequence[Size]) -> Sequence[int]:
    return (0,) if x.rank and equal(view(x, shape).shape[0], x.shape[0]) else ()


# Layout in memory is no part of a graph: any value can be viewed.
@operation(aten.view.default, traits=(Trait.VIEW,), rows=_rows_of_view, reference=_reshape)
def view(x: TensorSpec, shape: Sequence[Size]) -> TensorSpec:
    sizes = list(shape)
    if -1 in sizes:
        at = sizes.index(-1)
        rest = product(s for i, s in enumerate(sizes) if i != at)
        sizes[at] = simplify(sympy.cancel(expression(product(x.shape)) / rest))
    if not equal(product(sizes), product(x.shape)):
        raise SpecError(f"view of {x} as {list(shape)}")
    return TensorSpec(x.dtype, tuple(sizes))


@operation(aten.expand.default, traits=(Trait.VIEW,))
def expand(x: TensorSpec, sizes: Sequence[Size]) -> TensorSpec:
    offset = len(sizes) - x.rank
    result = tuple(x.shape[i - offset] if size == -1 else size for i, size in enumerate(sizes))
    for i, size in enumerate(x.shape):
        if not equal(size, 1) and not equal(size, result[i + offset]):
            raise SpecError(f"expand of {x} to {list(sizes)}")
    return TensorSpec(x.dtype, result)


def _rows_of_permute(x: TensorSpec, dims: Sequence[int]) -> Sequence[int]:
    return (0,) if axis_of(dims[0], x.rank) == 0 else ()


@operation(aten.permute.default, traits=(Trait.VIEW,), rows=_rows_of_permute)
def permute(x: TensorSpec, dims: Sequence[int]) -> TensorSpec:
    require(sorted(axis_of(d, x.rank) for d in dims) == list(range(x.rank)), f"permute of {x} by {list(dims)}")
    return TensorSpec(x.dtype, tuple(x.shape[d] for d in dims))


def _rows_of_unsqueeze(x: TensorSpec, dim: int) -> Sequence[int]:
    return (0,) if axis_of(dim, x.rank + 1) != 0 else ()


@operation(aten.unsqueeze.default, traits=(Trait.VIEW,), rows=_rows_of_unsqueeze)
def unsqueeze(x: TensorSpec, dim: int) -> TensorSpec:
    at = axis_of(dim, x.rank + 1)
    return TensorSpec(x.dtype, (*x.shape[:at], 1, *x.shape[at:]))


def _rows_of_squeeze(x: TensorSpec, dim: int) -> Sequence[int]:
    return (0,) if axis_of(dim, x.rank) != 0 else ()


@operation(aten.squeeze.dim, traits=(Trait.VIEW,), rows=_rows_of_squeeze)
def squeeze(x: TensorSpec, dim: int) -> TensorSpec:
    at = axis_of(dim, x.rank)
    require(equal(x.shape[at], 1), f"squeeze of axis {dim} of {x}")
    return TensorSpec(x.dtype, (*x.shape[:at], *x.shape[at + 1 :]))
