"""Rows by number."""

from __future__ import annotations

from collections.abc import Sequence

from cosmos_export.ir.ops.declare import Trait, aten, operation, require
from cosmos_export.ir.spec import TensorSpec


@operation(aten.index_put.default, traits=(Trait.WRITES,))
def index_put(x: TensorSpec, indices: Sequence[TensorSpec], values: TensorSpec) -> TensorSpec:
    require(len(indices) == 1 and values.dtype == x.dtype, "index_put along axis 0 with values of the same type")
    return x


@operation(aten.index.Tensor, rows=(1,))
def index(x: TensorSpec, indices: Sequence[TensorSpec]) -> TensorSpec:
    require(len(indices) == 1, "index along axis 0")
    return TensorSpec(x.dtype, (*indices[0].shape, *x.shape[1:]))


@operation(aten.embedding.default, rows=(1,))
def embedding(weight: TensorSpec, indices: TensorSpec) -> TensorSpec:
    return TensorSpec(weight.dtype, (*indices.shape, *weight.shape[1:]))
