"""The hyperbolic tangent."""

from __future__ import annotations

from cosmos_export.ir.graph import Node
from cosmos_export.ir.ops import aten
from cosmos_export.targets.onnx.model import ModelBuilder
from cosmos_export.targets.onnx.rules.table import rule


@rule(aten.tanh.default)
def _tanh(low: ModelBuilder, node: Node) -> str:
    return low.op("Tanh", low.values[node.args[0]])
