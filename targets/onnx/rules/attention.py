"""Attention in all its forms, and the rotation in front of it."""

from __future__ import annotations

import numpy as np

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import expression, simplify
from cosmos_export.ir.graph import Node, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.packing import E4M3_MAX
from cosmos_export.targets.onnx.model import ModelBuilder
from cosmos_export.targets.onnx.rules.quantization import widened
from cosmos_export.targets.onnx.rules.table import rule


@rule(ops.ROTARY)
def _rotary(low: ModelBuilder, node: Node) -> str:
    x, cos, sin = node.args
    heads = spec_of(x).shape[1]
    tables = [low.op("Unsqueeze", low.values[t], low.ints([0])) for t in (cos, sin)]
    rotated = low.op("RotaryEmbedding", low.heads_last(x), *tables, num_heads=heads)
    return low.reshape(rotated, spec_of(node).shape)


@rule(ops.ATTENTION)
def _attention(low: ModelBuilder, node: Node) -> str:
    _, key, value, causal, scale = node.args
    return low.attend(node, low.heads_last(key), low.heads_last(value), scale, causal)


@rule(aten.scaled_dot_product_attention.default)
def _sdpa(low: ModelBuilder, node: Node) -> str:
    query, key, value, *rest = node.args
    if rest or node.kwargs:
        raise InternalError("CX230", f"`{node.name}`: attention with {rest} {node.kwargs}")
    scale = float(spec_of(query).shape[-1]) ** -0.5
    scaled = low.op("Mul", low.values[query], low.scalar(scale, spec_of(query).dtype))
    return low.op("Attention", scaled, low.values[key], low.values[value], scale=1.0)


@rule(ops.JOINT_ATTENTION)
def _joint_attention(low: ModelBuilder, node: Node) -> str:
    _, key, value, prefix_key, prefix_value, scale = node.args
    # The prompt's rows last: only the tail of the keys can be masked by a length.
    keys, values = (
        low.op("Concat", low.heads_last(own), low.heads_last(prefix), axis=1)
        for own, prefix in ((key, prefix_key), (value, prefix_value))
    )
    return low.attend(node, keys, values, scale, False)


@rule(ops.JOINT_ATTENTION_FP8)
def _joint_attention_fp8(low: ModelBuilder, node: Node) -> str:
    """Products around a softmax, which the builder fuses into one FP8 kernel only if it sees all four quantizers."""
    query, key, value, prefix_key, prefix_value, scales, scale = node.args
    rows, heads, size = spec_of(query).shape
    kv_heads, dtype = int(spec_of(key).shape[1]), spec_of(query).dtype
    group = simplify(expression(heads) / kv_heads)
    steps = [float(s) for s in scales.meta["constant"]]

    def narrow(name: str, step: float) -> str:
        return widened(low, low.quantized(name, step), low.constant(np.asarray(step, dtype=np.float32), "scale"), dtype)

    def heads_first(own: Node, prefix: Node, step: float) -> str:
        """[1, heads, keys, d]: the heads of keys and values repeated for those of the query."""
        keys = simplify(expression(spec_of(own).shape[0]) + spec_of(prefix).shape[0])
        joined = low.op("Concat", low.values[own], low.values[prefix], axis=0)
        joined = low.op("Transpose", joined, perm=[1, 0, 2])
        wide = low.op("Expand", low.op("Unsqueeze", joined, low.ints([1])), low.ints([kv_heads, group, keys, size]))
        return narrow(low.reshape(wide, [1, heads, keys, size]), step)

    q = low.op("Mul", low.values[query], low.scalar(scale, dtype))
    q = narrow(low.op("Unsqueeze", low.op("Transpose", q, perm=[1, 0, 2]), low.ints([0])), steps[0])
    k, v = heads_first(key, prefix_key, steps[1]), heads_first(value, prefix_value, steps[2])
    logits = low.op("MatMul", q, low.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = narrow(low.op("Softmax", logits, axis=-1), 1 / E4M3_MAX)
    out = low.reshape(low.op("MatMul", weights, v), [heads, rows, size])
    return low.op("Transpose", out, perm=[1, 0, 2])
