"""An ONNX model in the making: its nodes, weights, constants and sizes, and what rules of several operations share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import sympy
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils._sympy.functions import FloorDiv

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, equal, expression, simplify
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.spec import E2M1, INT4, WeightBinding
from cosmos_export.targets.onnx.weights import Stored, numpy_dtype, size_bytes

OPSET = 23
_IR_VERSION = 11

_TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    E2M1: TensorProto.FLOAT4E2M1,
    INT4: TensorProto.INT4,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


EXTERNAL_BYTES = 1 << 20
"""Weights from here on are inputs of an engine whose weights are external; smaller ones are part of it."""


def external_weights(graph: Graph) -> dict[str, WeightBinding]:
    """Name of the input → weight, for each that a model with external weights takes as an input."""
    given = external_nodes(graph)
    return {weight_name(node): node.meta["weight"] for node in graph.weights.values() if node in given}


def external_nodes(graph: Graph) -> frozenset[Node]:
    """Weights that can be inputs: those that are large. Not those that a product widens in its own kernel: as inputs
    they would be widened whole."""
    large = [node for node in graph.weights.values() if size_bytes(node.meta["weight"]) >= EXTERNAL_BYTES]
    return frozenset(node for node in large if not _widened_in_product(node))


def _widened_in_product(weight: Node) -> bool:
    """Narrow ``weight`` that meets activations of 16 bit."""
    if any(is_op(user, ops.DEQUANTIZE_GROUPS) for user in weight.users):
        return True
    products = [p for user in weight.users if is_op(user, ops.DEQUANTIZE) for p in user.users]
    return any(is_op(p, aten.linear.default) and not is_op(p.args[0], ops.DEQUANTIZE) for p in products)


def weight_name(node: Node) -> str:
    """Name of the weight ``node`` in a model."""
    binding: WeightBinding = node.meta["weight"]
    return binding.keys[0] if len(binding.keys) == 1 and binding.packing is None else str(node.name)


class ModelBuilder:
    """Everything that a model is made of, with the names of values and constants that are there already."""

    def __init__(
        self,
        graph: Graph,
        stored: Mapping[WeightBinding, Stored],
        weights_file: str,
        compute: torch.dtype | None,
        *,
        external: bool = False,
    ) -> None:
        self.graph = graph
        self._external = set(external_weights(graph)) if external else set[str]()
        self.weight_inputs: list[onnx.ValueInfoProto] = []
        self.stored = stored
        self.weights_file = weights_file
        self.compute = compute
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: dict[Node, str] = {}
        self.parts: dict[Node, list[str]] = {}
        """Names of all results of a node that has several."""
        self._constants: dict[Any, str] = {}
        self._sizes: dict[Size, str] = {}
        self._count = 0
        self.scope = ""
        """Name of the node that is lowered: names of values begin with it."""
        self.domains: set[str] = set()
        """Domains of operations that are not ONNX's own: TensorRT's, and plugins."""

    def value_info(self, name: str, node: Node) -> onnx.ValueInfoProto:
        spec = spec_of(node)
        dims = [s if isinstance(s, int) else str(s) for s in spec.shape]
        return helper.make_tensor_value_info(name, self.type_of(spec.dtype), dims)

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        inputs = [*inputs, *self.weight_inputs]
        body = helper.make_graph(self.nodes, self.graph.name, inputs, outputs, self.initializers)
        domains = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in sorted(self.domains))]
        model = helper.make_model(body, opset_imports=domains, ir_version=_IR_VERSION)
        model.producer_name = "cosmos-export"
        return model

    @property
    def portable(self) -> bool:
        """The model is for ONNX Runtime on a CPU, and computes in float32."""
        return self.compute is not None

    # -- leaves -------------------------------------------------------------------------------------------------------

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which a value of ``dtype`` is computed."""
        return self.compute if self.compute is not None and dtype == torch.bfloat16 else dtype

    def type_of(self, dtype: torch.dtype) -> int:
        return _TYPES[self.dtype(dtype)]

    def weight(self, node: Node) -> str:
        binding: WeightBinding = node.meta["weight"]
        place, name = self.stored[binding], weight_name(node)
        kind, dims = _TYPES[binding.dtype], list(binding.shape)
        if self.portable and binding.dtype is E2M1:
            kind, dims = TensorProto.UINT8, [*dims[:-1], dims[-1] // 2]
        if name in self._external:
            self.weight_inputs.append(helper.make_tensor_value_info(name, kind, dims))
            return name
        tensor = TensorProto(name=name, data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.weights_file), ("offset", place.offset), ("length", place.size_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        wanted = self.dtype(binding.dtype)
        return name if wanted == binding.dtype else self.op("Cast", name, to=_TYPES[wanted])

    def constant(self, value: np.ndarray, hint: str = "constant") -> str:
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = f"{hint}_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(value.copy(order="C"), name))
            self._constants[key] = name
        return self._constants[key]

    def scalar(self, value: float | Size, dtype: torch.dtype) -> str:
        """A number, or a dim, as a value of ``dtype``; dims have shape [1], numbers none."""
        if isinstance(value, sympy.Expr) and not value.is_number:
            return self.op("Cast", self.size(value), to=self.type_of(dtype))
        return self.constant(np.asarray(float(value)).astype(numpy_dtype(self.dtype(dtype))))

    def ints(self, values: Sequence[Size]) -> str:
        """int64 [n] of sizes: a constant where all are known, else a join of computed ones."""
        values = [simplify(v) for v in values]
        if all(isinstance(v, int) for v in values):
            return self.constant(np.asarray(values, dtype=np.int64), "sizes")
        return self.op("Concat", *[self.size(v) for v in values], axis=0)

    def size(self, value: Size) -> str:
        """int64 [1] of a size, computed from the shapes of the inputs."""
        value = simplify(value)
        if isinstance(value, int):
            return self.constant(np.asarray([value], dtype=np.int64), "size")
        if value not in self._sizes:
            self._sizes[value] = self.compute_size(value)
        return self._sizes[value]

    def compute_size(self, value: sympy.Expr) -> str:
        for name, node in self.graph.inputs.items():
            for axis, known in enumerate(spec_of(node).shape):
                if equal(known, value):
                    return self.op("Shape", name, start=axis, end=axis + 1)
        for name, node in self.graph.inputs.items():
            for axis, known in enumerate(spec_of(node).shape):
                factor, dim = expression(known).as_coeff_Mul()
                if dim == value:
                    return self.op("Div", self.op("Shape", name, start=axis, end=axis + 1), self.size(int(factor)))
        if isinstance(value, sympy.Add):
            for node in self.graph.inputs.values():
                for known in spec_of(node).shape:
                    # A sum that an input has as one size: what is left of ``value`` has fewer terms.
                    if isinstance(known, sympy.Add) and set(known.args) < set(value.args):
                        return self.op("Add", self.size(known), self.size(simplify(value - known)))
        if isinstance(value, (sympy.Add, sympy.Mul)):
            operator = "Add" if isinstance(value, sympy.Add) else "Mul"
            terms = [self.size(a) for a in value.args]
            result = terms[0]
            for term in terms[1:]:
                result = self.op(operator, result, term)
            return result
        if isinstance(value, FloorDiv):
            return self.op("Div", *[self.size(a) for a in value.args])
        raise InternalError("CX230", f"graph `{self.graph.name}`: no input shows the dim {value}")

    # -- operations ---------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, label: str = "", **attributes: Any) -> str:
        """A node and its result, both called ``label`` or a name of their own."""
        self._count += 1
        name = label or f"{self.scope}_{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    @contextmanager
    def beside(self, operand: Node) -> Iterator[None]:
        """Values of ``operand`` alone are made where it is: in a loop it may be the same in every step."""
        yield

    def quantized(self, name: str, step: float) -> str:
        """E4M3 of ``name`` in units of ``step``."""
        zero = self.constant(np.zeros((), dtype=numpy_dtype(torch.float8_e4m3fn)), "zero")
        return self.op("QuantizeLinear", name, self.constant(np.asarray(step, dtype=np.float32), "scale"), zero)

    def operand(self, value: Any, dtype: torch.dtype) -> str:
        if not isinstance(value, Node):
            return self.scalar(value, dtype)
        return self.cast(self.values[value], spec_of(value).dtype, dtype)

    def cast(self, name: str, have: torch.dtype, want: torch.dtype) -> str:
        if self.dtype(have) == self.dtype(want):
            return name
        return self.op("Cast", name, to=self.type_of(want))

    def reshape(self, name: str, shape: Sequence[Size]) -> str:
        sizes = [simplify(s) for s in shape]
        unknown = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
        if len(unknown) == 1:
            sizes[unknown[0]] = -1
        return self.op("Reshape", name, self.ints(sizes))

    def heads_last(self, node: Node) -> str:
        """[N, heads, d] as [1, N, heads · d]."""
        rows, heads, size = spec_of(node).shape
        return self.reshape(self.values[node], [1, rows, simplify(expression(heads) * size)])

    def attend(self, node: Node, key: str, value: str, scale: float, causal: bool) -> str:
        """Attention of the first operand of ``node`` over ``key`` and ``value`` [1, rows, heads · d]."""
        query: Node = node.args[0]
        heads, kv_heads = spec_of(query).shape[1], spec_of(node.args[1]).shape[1]
        # With `scale` left to the operator, TensorRT multiplies query and key each by a rounded square root: 0.29 % off
        # on every logit in bf16. One multiplication of the query, and scale 1, keeps it to one rounding of one factor.
        scaled = self.op("Mul", self.heads_last(query), self.scalar(scale, spec_of(query).dtype))
        attributes: dict[str, Any] = {
            "q_num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": 1.0,
            "is_causal": int(causal),
        }
        return self.reshape(self.op("Attention", scaled, key, value, **attributes), spec_of(node).shape)


def gemm_name(node: Node) -> str:
    """Name of the product of the linear ``node`` in its model, and in an engine made from it."""
    return f"gemm_{node.name}"
