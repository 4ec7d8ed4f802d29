"""Rules of operations that only move elements, take parts of values, or make values of none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import numpy_helper

from cosmos_export.ir.graph import Node, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.targets.onnx.model import ModelBuilder
from cosmos_export.targets.onnx.rules.table import rule
from cosmos_export.targets.onnx.weights import numpy_dtype


@rule(aten.view.default)
def _view(low: ModelBuilder, node: Node) -> str:
    return low.reshape(low.values[node.args[0]], spec_of(node).shape)


@rule(aten.expand.default)
def _expand(low: ModelBuilder, node: Node) -> str:
    return low.op("Expand", low.values[node.args[0]], low.ints(spec_of(node).shape))


@rule(aten.permute.default)
def _permute(low: ModelBuilder, node: Node) -> str:
    return low.op("Transpose", low.values[node.args[0]], perm=list(node.args[1]))


def _axes(kind: str, *targets: Any) -> None:
    @rule(*targets)
    def write(low: ModelBuilder, node: Node) -> str:
        axis: int = node.args[1]
        return low.op(kind, low.values[node.args[0]], low.ints([axis]))


_axes("Unsqueeze", aten.unsqueeze.default)
_axes("Squeeze", aten.squeeze.dim)


@rule(aten.cat.default)
def _cat(low: ModelBuilder, node: Node) -> str:
    axis = node.args[1] if len(node.args) > 1 else 0
    return low.op("Concat", *(low.values[t] for t in node.args[0]), axis=axis)


@rule(aten.slice.Tensor)
def _slice(low: ModelBuilder, node: Node) -> str:
    x, axis, start, end, *step = node.args
    vectors = [low.ints([v]) for v in (start, end, axis, *(step or [1]))]
    return low.op("Slice", low.values[x], *vectors)


@rule(aten.select.int)
def _select(low: ModelBuilder, node: Node) -> str:
    x, axis, index = node.args
    return low.op("Gather", low.values[x], low.constant(np.asarray(index, dtype=np.int64), "index"), axis=axis)


@rule(aten.embedding.default)
def _embedding(low: ModelBuilder, node: Node) -> str:
    return low.op("Gather", *(low.values[a] for a in node.args), axis=0)


@rule(aten.arange.start)
def _arange(low: ModelBuilder, node: Node) -> str:
    start, end = node.args
    ends = [low.op("Squeeze", low.size(v), low.ints([0])) for v in (start, end)]
    rows = low.op("Range", *ends, low.constant(np.asarray(1, dtype=np.int64), "one"))
    return low.cast(rows, torch.int64, spec_of(node).dtype)


@rule(aten.full.default)
def _full(low: ModelBuilder, node: Node) -> str:
    value = np.asarray([node.args[1]]).astype(numpy_dtype(low.dtype(spec_of(node).dtype)))
    return low.op("ConstantOfShape", low.ints(spec_of(node).shape), value=numpy_helper.from_array(value))
