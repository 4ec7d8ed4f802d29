"""Norms and means."""

from __future__ import annotations

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.targets.onnx.model import ModelBuilder
from cosmos_export.targets.onnx.rules.table import rule


@rule(ops.RMS_NORM)
def _rms_norm(low: ModelBuilder, node: Node) -> str:
    x, weight, epsilon = node.args
    # ONNX computes the statistics in fp32 and rounds to the scale's type before multiplying: the same as the reference.
    name = low.cast(low.values[x], spec_of(x).dtype, spec_of(weight).dtype)
    return low.op("RMSNormalization", name, low.values[weight], axis=-1, epsilon=epsilon, stash_type=1)


@rule(aten.mean.dim)
def _mean(low: ModelBuilder, node: Node) -> str:
    x, axes, *keep = node.args
    return low.op("ReduceMean", low.values[x], low.ints(axes), keepdims=int(bool(keep and keep[0])))


@rule(aten.linalg_vector_norm.default)
def _vector_norm(low: ModelBuilder, node: Node) -> str:
    x, _, axes, *keep = node.args
    keeps, shape = bool(keep and keep[0]), spec_of(x).shape
    widened = is_op(x, aten._to_copy.default) and low.dtype(spec_of(x.args[0]).dtype) != low.dtype(spec_of(x).dtype)
    if not (widened and keeps and list(axes) == [1] and len(shape) > 3):
        return low.op("ReduceL2", low.values[x], low.ints(axes), keepdims=int(keeps))
    # TensorRT stores a widened value that two kernels read, 1.9 GB of the video decoder at 720p. Widened again, and in
    # another shape so that it does not see they are the same, each kernel reads the narrow one.
    source: Node = x.args[0]
    flat = low.op("Reshape", low.values[source], low.ints([shape[0], shape[1], -1]))
    norm = low.op("ReduceL2", low.cast(flat, spec_of(source).dtype, spec_of(x).dtype), low.ints([1]), keepdims=1)
    return low.reshape(norm, spec_of(node).shape)
