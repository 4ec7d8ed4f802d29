"""Where models round activations, for who compares their roundings."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Node, is_op


def rounded_values(node: Node, model: onnx.ModelProto) -> list[tuple[str, str]]:
    """The values before and after the rounding of ``node``, which rounds activations, as values of a ``model`` that
    runs on a CPU: of attention in FP8 query, keys, values and softmax. Empty where the model does not have it, or with
    a zero that is not zero: ONNX Runtime passes over that, and others need not."""
    made = [n for n in model.graph.node if n.name.rpartition("_")[0] == node.name]
    if is_op(node, ops.REQUANTIZE_BLOCKS):
        return [(made[0].input[0], made[-1].output[0])] if made else []
    rounds = [n for n in made if n.op_type == "QuantizeLinear"]
    used = {n.input[2] for n in rounds}
    zeros = {i.name for i in model.graph.initializer if i.name in used and not any(numpy_helper.to_array(i).tobytes())}
    return [(n.input[0], n.output[0]) for n in rounds if n.input[2] in zeros]
