"""The denoising loop as one ONNX model: what does not change in it outside, one `Loop` with a constant trip count.

Measured on the builder (TensorRT-RTX 1.7.1): a `Loop` without a condition input, whose body returns a constant true, is
a counting loop that a CUDA graph can capture; with a condition input it is not. `Attention` in a loop fails to build;
matrix products around a softmax become the same fused kernel, with the query heads of a key head on their own axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import sympy
import torch
from onnx import TensorProto, helper, numpy_helper

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, expression, simplify
from cosmos_export.ir.graph import Graph, Node, is_input, is_op, spec_of
from cosmos_export.ir.program import Loop
from cosmos_export.ir.spec import WeightBinding
from cosmos_export.targets.onnx.lowering import Lowering
from cosmos_export.targets.onnx.plugins import Plugins
from cosmos_export.targets.onnx.weights import Stored, numpy_dtype


def lower_loop(
    graph: Graph,
    loop: Loop,
    tables: Mapping[str, np.ndarray],
    stored: Mapping[WeightBinding, Stored],
    weights_file: str,
    *,
    compute: torch.dtype | None = None,
    explicit_attention: bool = False,
    external: bool = False,
    plugins: Plugins | None = None,
) -> onnx.ModelProto:
    """The closed ``loop`` over ``graph``.

    ``tables`` holds values of inputs in ``loop.rows`` in each of the loop's steps, [steps, …]; one it lacks (noise)
    becomes an input of that shape. The other inputs of the model are the body's, but of the carried state what the loop
    takes; the rest of it begins as zeros.
    Outputs are what the loop returns of the state after its last step, under their input's name with ``_final``.
    ``explicit_attention`` writes attention as matrix products, for a builder that takes no `Attention` in a loop;
    ``external`` and ``plugins`` as in `lower`.
    """
    return _LoopLowering(
        graph, loop, tables, stored, weights_file, compute, explicit_attention=explicit_attention, external=external,
        plugins=plugins,
    ).run()  # fmt: skip


class _LoopLowering(Lowering):
    def __init__(
        self,
        graph: Graph,
        loop: Loop,
        tables: Mapping[str, np.ndarray],
        stored: Mapping[WeightBinding, Stored],
        weights_file: str,
        compute: torch.dtype | None,
        *,
        explicit_attention: bool,
        external: bool,
        plugins: Plugins | None,
    ) -> None:
        super().__init__(graph, stored, weights_file, compute, external=external, plugins=plugins)
        self._loop = loop
        self._tables = tables
        self._explicit = explicit_attention
        self._outside = self.nodes
        self._inside: list[onnx.NodeProto] = []
        self._varying = _varying(self.graph, loop)

    def run(self) -> onnx.ModelProto:
        inputs = []
        for name, node in self.graph.inputs.items():
            self.values[node] = name
            if name in self._loop.rows:
                self.values[node] = self._row(name, node)
                if name not in self._tables:
                    inputs.append(self._steps_of(name, node))
            elif name in self._loop.carried:
                self.values[node] = f"{name}_now"
            if name in self._loop.taken or (name not in self._loop.carried and name not in self._loop.rows):
                inputs.append(self.value_info(name, node))
        for node in self.graph.nodes:
            if not is_input(node):
                self.nodes = self._inside if node in self._varying else self._outside
                self.emit(node)
        self.nodes = self._outside
        outputs = self._close()
        return self.model(inputs, outputs)

    def _row(self, name: str, node: Node) -> str:
        """The step's row of a table, as the body takes it."""
        spec = spec_of(node)
        table = name
        if name in self._tables:
            values = self._tables[name].astype(numpy_dtype(self.dtype(spec.dtype)))
            table = self.constant(values, f"{name}_table")
        self.nodes = self._inside
        row = self.op("Gather", table, "step", axis=0)
        row = self.reshape(row, spec.shape)
        self.nodes = self._outside
        return row

    def _steps_of(self, name: str, node: Node) -> onnx.ValueInfoProto:
        info = self.value_info(name, node)
        shape = [self._loop.steps, *(d.dim_value or d.dim_param for d in info.type.tensor_type.shape.dim)]
        return helper.make_tensor_value_info(name, info.type.tensor_type.elem_type, shape)

    def _close(self) -> list[onnx.ValueInfoProto]:
        nodes = self.graph.inputs
        body_inputs = [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        ]
        body_outputs = [helper.make_tensor_value_info("on", TensorProto.BOOL, [])]
        true = numpy_helper.from_array(np.asarray(True))
        self._inside.append(helper.make_node("Constant", [], ["on"], name="on", value=true))
        initial, finals, results = [], [], []
        for name, next_name in self._loop.carried.items():
            body_inputs.append(self.value_info(f"{name}_now", nodes[name]))
            value = self.values[self.graph.outputs[next_name]]
            self._inside.append(helper.make_node("Identity", [value], [next_name], name=next_name))
            body_outputs.append(self.value_info(next_name, nodes[name]))
            initial.append(name if name in self._loop.taken else self._zeros(nodes[name]))
            finals.append(f"{name}_final")
            if name in self._loop.returned:
                results.append(self.value_info(f"{name}_final", nodes[name]))
        body = helper.make_graph(self._inside, "denoising_step", body_inputs, body_outputs)
        trips = self.constant(np.asarray(self._loop.steps, dtype=np.int64), "steps")
        self._outside.append(helper.make_node("Loop", [trips, "", *initial], finals, name="denoise", body=body))
        return results

    def _zeros(self, node: Node) -> str:
        zero = numpy_helper.from_array(np.zeros(1, dtype=np.float32))
        return self.op("ConstantOfShape", self.ints(spec_of(node).shape), value=zero)

    def compute_size(self, value: Size) -> str:
        # Sizes follow from the model's inputs, and those are outside whatever asks for them.
        nodes, self.nodes = self.nodes, self._outside
        result = super().compute_size(value)
        self.nodes = nodes
        return result

    def ints(self, values: Sequence[Size]) -> str:
        nodes, self.nodes = self.nodes, self._outside
        result = super().ints(values)
        self.nodes = nodes
        return result

    @contextmanager
    def beside(self, operand: Node) -> Iterator[None]:
        nodes = self.nodes
        if operand not in self._varying:
            self.nodes = self._outside
        yield
        self.nodes = nodes

    def attend(self, node: Node, key: str, value: str, scale: float, causal: bool) -> str:
        if not self._explicit or causal:
            return super().attend(node, key, value, scale, causal)
        query = node.args[0]
        rows, heads, size = spec_of(query).shape
        kv_heads = int(spec_of(node.args[1]).shape[1])
        group = simplify(expression(heads) / kv_heads)
        q = self.op("Mul", self.values[query], self.scalar(scale, spec_of(query).dtype))
        # [1, kv heads, group, rows, d] against [1, kv heads, 1, d, keys]: the grouped form that fuses without a copy.
        q = self.reshape(self.op("Transpose", q, perm=[1, 0, 2]), [1, kv_heads, group, rows, size])
        keys = simplify(sum((expression(spec_of(n).shape[0]) for n in _key_parts(node)), sympy.Integer(0)))
        k, v = (self.reshape(name, [keys, kv_heads, size]) for name in (key, value))
        axes = self.ints([0, 2])
        k = self.op("Unsqueeze", self.op("Transpose", k, perm=[1, 2, 0]), axes)
        v = self.op("Unsqueeze", self.op("Transpose", v, perm=[1, 0, 2]), axes)
        weights = self.op("Softmax", self.op("MatMul", q, k), axis=-1)
        out = self.reshape(self.op("MatMul", weights, v), [heads, rows, size])
        return self.op("Transpose", out, perm=[1, 0, 2])


def _key_parts(node: Node) -> list[Node]:
    return [node.args[1], node.args[3]] if is_op(node, ops.JOINT_ATTENTION) else [node.args[1]]


_KEPT_NARROW = ops.having(ops.Trait.WIDENS)
"""Widened before the loop, a weight would be read wide in every step."""


def _varying(graph: Graph, loop: Loop) -> set[Node]:
    """Nodes that change from step to step, and those that belong to a product that does."""
    found: set[Node] = set()
    for node in graph.nodes:
        if is_input(node):
            if node.name in loop.carried or node.name in loop.rows:
                found.add(node)
        elif found.intersection(node.all_input_nodes) or is_op(node, *_KEPT_NARROW):
            found.add(node)
    return found
