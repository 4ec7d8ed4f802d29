"""Parts of values: taken, written, joined, and what pads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from cosmos_export.ir.dims import Size, equal, expression, simplify
from cosmos_export.ir.ops.declare import Trait, aten, axis_of, operation, require
from cosmos_export.ir.spec import TensorSpec


def _rows_along(x: TensorSpec, dim: int, *_: Any) -> Sequence[int]:
    return (0,) if axis_of(dim, x.rank) != 0 else ()


@operation(aten.slice.Tensor, traits=(Trait.PART,), rows=_rows_along)
def slice_(x: TensorSpec, dim: int, start: Size, end: Size, step: int = 1) -> TensorSpec:
    at = axis_of(dim, x.rank)
    length = simplify(expression(end) - start)
    if step != 1:
        require(isinstance(length, int), "a strided slice has a fixed length")
        length = -(-length // step)
    return TensorSpec(x.dtype, (*x.shape[:at], length, *x.shape[at + 1 :]))


@operation(aten.select.int, traits=(Trait.PART,), rows=_rows_along)
def select(x: TensorSpec, dim: int, index: int) -> TensorSpec:
    at = axis_of(dim, x.rank)
    return TensorSpec(x.dtype, (*x.shape[:at], *x.shape[at + 1 :]))


def _rows_of_scatter(x: TensorSpec, src: TensorSpec, dim: int, *_: Any) -> Sequence[int]:
    return (0, 1) if axis_of(dim, x.rank) != 0 else ()


@operation(aten.slice_scatter.default, traits=(Trait.WRITES,), rows=_rows_of_scatter)
def slice_scatter(x: TensorSpec, src: TensorSpec, dim: int, start: Size, end: Size, step: int = 1) -> TensorSpec:
    part = slice_(x, dim, start, end, step)
    require(part.dtype == src.dtype and all(map(equal, part.shape, src.shape)), f"scatter of {src} into {part}")
    return x


@operation(aten.select_scatter.default, traits=(Trait.WRITES,), rows=_rows_of_scatter)
def select_scatter(x: TensorSpec, src: TensorSpec, dim: int, index: int) -> TensorSpec:
    part = select(x, dim, index)
    require(part.dtype == src.dtype and all(map(equal, part.shape, src.shape)), f"scatter of {src} into {part}")
    return x


def _rows_of_cat(tensors: Sequence[TensorSpec], dim: int = 0) -> Sequence[int]:
    return (0,) if axis_of(dim, tensors[0].rank) != 0 else ()


@operation(aten.cat.default, traits=(Trait.JOIN,), rows=_rows_of_cat)
def cat(tensors: Sequence[TensorSpec], dim: int = 0) -> TensorSpec:
    first = tensors[0]
    at = axis_of(dim, first.rank)
    for t in tensors[1:]:
        same = all(equal(a, b) for i, (a, b) in enumerate(zip(first.shape, t.shape, strict=True)) if i != at)
        require(same and t.dtype == first.dtype, f"cat of {first} and {t} along {dim}")
    total = simplify(sum((t.shape[at] for t in tensors), sympy.Integer(0)))
    return TensorSpec(first.dtype, (*first.shape[:at], total, *first.shape[at + 1 :]))


@operation(aten.constant_pad_nd.default)
def pad(x: TensorSpec, pad: Sequence[Size], value: float = 0.0) -> TensorSpec:
    shape = list(x.shape)
    for i in range(len(pad) // 2):
        axis = x.rank - 1 - i
        shape[axis] = simplify(shape[axis] + expression(pad[2 * i]) + pad[2 * i + 1])
    return TensorSpec(x.dtype, tuple(shape))
