"""Graphs as ONNX models (opset 23) with their weights beside them.

The rules of operations are in `rules`. Two precisions of one graph share one weight file: the graph as it is, and one
that computes in fp32 for ONNX Runtime on a CPU, which casts the stored weights where it reads them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from onnx import helper

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir.graph import Graph, Node, is_constant, is_input, is_weight
from cosmos_export.ir.spec import WeightBinding
from cosmos_export.targets.onnx.model import ModelBuilder
from cosmos_export.targets.onnx.plugins import Plugins
from cosmos_export.targets.onnx.rules import RULES
from cosmos_export.targets.onnx.weights import Stored


def lower(
    graph: Graph,
    stored: Mapping[WeightBinding, Stored],
    weights_file: str,
    *,
    compute: torch.dtype | None = None,
    external: bool = False,
    plugins: Plugins | None = None,
) -> onnx.ModelProto:
    """The ONNX model of ``graph``; weights are references into ``weights_file`` (relative to the model).

    ``compute`` replaces the graph's low-precision floating type (bfloat16) in every value. With ``external`` the
    weights of `external_weights` are inputs, after the graph's own. With ``plugins`` this project's kernels are nodes
    where there is a place for them. Raises InternalError (CX230) for an operation without a rule or a dim that no input
    shows.
    """
    return Lowering(graph, stored, weights_file, compute, external=external, plugins=plugins).run()


class Lowering(ModelBuilder):
    """A graph, node by node: by a plugin where there is one, else by the rule of its operation."""

    def __init__(
        self,
        graph: Graph,
        stored: Mapping[WeightBinding, Stored],
        weights_file: str,
        compute: torch.dtype | None,
        *,
        external: bool = False,
        plugins: Plugins | None = None,
    ) -> None:
        fused = graph if plugins is None else plugins.fused(graph)
        super().__init__(fused, stored, weights_file, compute, external=external)
        self._plugins = plugins

    def run(self) -> onnx.ModelProto:
        inputs = []
        for name, node in self.graph.inputs.items():
            inputs.append(self.value_info(name, node))
            self.values[node] = name
        for node in self.graph.nodes:
            if not is_input(node):
                self.emit(node)
        outputs = []
        for name, node in self.graph.outputs.items():
            self.nodes.append(helper.make_node("Identity", [self.values[node]], [name], name=f"output_{name}"))
            outputs.append(self.value_info(name, node))
        return self.model(inputs, outputs)

    def emit(self, node: Node) -> None:
        """The ONNX form of one node."""
        self.scope = node.name
        if is_weight(node):
            self.values[node] = self.weight(node)
        elif is_constant(node):
            self.values[node] = self.constant(node.meta["constant"].numpy(), node.name)
        else:
            plugin = self._plugins.rule(node) if self._plugins is not None else None
            rule = plugin or RULES.get(node.target)
            if rule is None:
                raise InternalError("CX230", f"`{node.name}`: no ONNX form of {node.target}")
            self.values[node] = rule(self, node)
