"""Graphs as ONNX models (opset 23) with their weights beside them.

One rule an operation. Two precisions of one graph share one weight file: the graph as it is, and one that computes in
fp32 for ONNX Runtime on a CPU, which casts the stored weights where it reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import sympy
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils._sympy.functions import FloorDiv

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, equal, simplify
from cosmos_export.ir.graph import Graph, Node, is_constant, is_weight, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.spec import WeightBinding
from cosmos_export.targets.weights import Stored, numpy_dtype

OPSET = 23
_IR_VERSION = 11

_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


def lower(
    graph: Graph, stored: Mapping[WeightBinding, Stored], weights_file: str, *, compute: torch.dtype | None = None
) -> onnx.ModelProto:
    """The ONNX model of ``graph``; weights are references into ``weights_file`` (relative to the model).

    ``compute`` replaces the graph's low-precision floating type (bfloat16) in every value. Raises InternalError (CX230)
    for an operation without a rule or a dim that no input shows.
    """
    return _Lowering(graph, stored, weights_file, compute).run()


class _Lowering:
    def __init__(
        self, graph: Graph, stored: Mapping[WeightBinding, Stored], weights_file: str, compute: torch.dtype | None
    ) -> None:
        self.graph = graph
        self.stored = stored
        self.weights_file = weights_file
        self.compute = compute
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: dict[Node, str] = {}
        self._constants: dict[Any, str] = {}
        self._sizes: dict[Size, str] = {}
        self._count = 0
        self._scope = ""

    def run(self) -> onnx.ModelProto:
        inputs = []
        for name, node in self.graph.inputs.items():
            spec = spec_of(node)
            inputs.append(helper.make_tensor_value_info(name, self.type_of(spec.dtype), [_dim(s) for s in spec.shape]))
            self.values[node] = name
        for node in self.graph.nodes:
            self._scope = node.name
            if is_weight(node):
                self.values[node] = self._weight(node)
            elif is_constant(node):
                self.values[node] = self.constant(node.meta["constant"].numpy(), node.name)
            elif node.op == "call_function":
                rule = _RULES.get(node.target)
                if rule is None:
                    raise InternalError("CX230", f"`{node.name}`: no ONNX form of {node.target}")
                self.values[node] = rule(self, node)
        outputs = []
        for name, node in self.graph.outputs.items():
            spec = spec_of(node)
            self._scope = name
            self.nodes.append(helper.make_node("Identity", [self.values[node]], [name], name=f"output_{name}"))
            outputs.append(helper.make_tensor_value_info(name, self.type_of(spec.dtype), [_dim(s) for s in spec.shape]))
        body = helper.make_graph(self.nodes, self.graph.name, inputs, outputs, self.initializers)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
        model.producer_name = "cosmos-export"
        return model

    # -- leaves -------------------------------------------------------------------------------------------------------

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which a value of ``dtype`` is computed."""
        return self.compute if self.compute is not None and dtype == torch.bfloat16 else dtype

    def type_of(self, dtype: torch.dtype) -> int:
        return _TYPES[self.dtype(dtype)]

    def _weight(self, node: Node) -> str:
        binding: WeightBinding = node.meta["weight"]
        place = self.stored[binding]
        name = binding.keys[0] if len(binding.keys) == 1 else node.name
        tensor = TensorProto(name=name, data_type=_TYPES[binding.dtype], dims=list(binding.shape))
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
        return self.constant(np.asarray(float(value)).astype(numpy_dtype(self.dtype(dtype))))  # type: ignore[arg-type]

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
            self._sizes[value] = self._compute_size(value)
        return self._sizes[value]

    def _compute_size(self, value: sympy.Expr) -> str:
        for name, node in self.graph.inputs.items():
            for axis, known in enumerate(spec_of(node).shape):
                if equal(known, value):
                    return self.op("Shape", name, start=axis, end=axis + 1)
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

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self._count += 1
        name = f"{self._scope}_{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

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
        return self.reshape(self.values[node], [1, rows, simplify(sympy.sympify(heads) * size)])


def _dim(size: Size) -> int | str:
    return size if isinstance(size, int) else str(size)


Rule = Callable[[_Lowering, Node], str]


def _binary(kind: str) -> Rule:
    def rule(low: _Lowering, node: Node) -> str:
        dtype = spec_of(node).dtype
        return low.op(kind, *(low.operand(a, dtype) for a in node.args))

    return rule


def _unary(kind: str) -> Rule:
    return lambda low, node: low.op(kind, low.values[node.args[0]])  # type: ignore[index]


def _silu(low: _Lowering, name: str) -> str:
    return low.op("Mul", name, low.op("Sigmoid", name))


def _swiglu(low: _Lowering, node: Node) -> str:
    gate, up = (low.values[a] for a in node.args)  # type: ignore[index]
    return low.op("Mul", _silu(low, gate), up)


def _pow(low: _Lowering, node: Node) -> str:
    x, exponent = node.args
    name = low.values[x]  # type: ignore[index]
    return low.op("Mul", name, name) if exponent == 2 else low.op("Pow", name, low.scalar(exponent, torch.float32))  # type: ignore[arg-type]


def _convert(low: _Lowering, node: Node) -> str:
    source: Node = node.args[0]  # type: ignore[assignment]
    return low.cast(low.values[source], spec_of(source).dtype, spec_of(node).dtype)


def _linear(low: _Lowering, node: Node) -> str:
    x, weight, *bias = node.args
    inputs = [low.values[x], low.values[weight], *(low.values[b] for b in bias if b is not None)]  # type: ignore[index]
    if spec_of(x).rank != 2:  # type: ignore[arg-type]
        raise InternalError("CX230", f"`{node.name}`: a linear of rows is [N, in], not {spec_of(x)}")  # type: ignore[arg-type]
    return low.op("Gemm", *inputs, transB=1)


def _matmul(low: _Lowering, node: Node) -> str:
    return low.op("MatMul", *(low.values[a] for a in node.args))  # type: ignore[index]


def _view(low: _Lowering, node: Node) -> str:
    return low.reshape(low.values[node.args[0]], spec_of(node).shape)  # type: ignore[index]


def _expand(low: _Lowering, node: Node) -> str:
    return low.op("Expand", low.values[node.args[0]], low.ints(spec_of(node).shape))  # type: ignore[index]


def _permute(low: _Lowering, node: Node) -> str:
    return low.op("Transpose", low.values[node.args[0]], perm=list(node.args[1]))  # type: ignore[index, arg-type]


def _axes(kind: str) -> Rule:
    def rule(low: _Lowering, node: Node) -> str:
        axis: int = node.args[1]  # type: ignore[assignment]
        return low.op(kind, low.values[node.args[0]], low.ints([axis]))  # type: ignore[index]

    return rule


def _cat(low: _Lowering, node: Node) -> str:
    axis = node.args[1] if len(node.args) > 1 else 0
    return low.op("Concat", *(low.values[t] for t in node.args[0]), axis=axis)  # type: ignore[union-attr, index]


def _slice(low: _Lowering, node: Node) -> str:
    x, axis, start, end, *step = node.args
    vectors = [low.ints([v]) for v in (start, end, axis, *(step or [1]))]  # type: ignore[list-item]
    return low.op("Slice", low.values[x], *vectors)  # type: ignore[index]


def _select(low: _Lowering, node: Node) -> str:
    x, axis, index = node.args
    return low.op("Gather", low.values[x], low.constant(np.asarray(index, dtype=np.int64), "index"), axis=axis)  # type: ignore[index]


def _embedding(low: _Lowering, node: Node) -> str:
    return low.op("Gather", *(low.values[a] for a in node.args), axis=0)  # type: ignore[index]


def _where(low: _Lowering, node: Node) -> str:
    return low.op("Where", *(low.values[a] for a in node.args))  # type: ignore[index]


def _arange(low: _Lowering, node: Node) -> str:
    start, end = node.args
    ends = [low.op("Squeeze", low.size(v), low.ints([0])) for v in (start, end)]  # type: ignore[arg-type]
    rows = low.op("Range", *ends, low.constant(np.asarray(1, dtype=np.int64), "one"))
    return low.cast(rows, torch.int64, spec_of(node).dtype)


def _full(low: _Lowering, node: Node) -> str:
    value = np.asarray([node.args[1]]).astype(numpy_dtype(low.dtype(spec_of(node).dtype)))
    return low.op("ConstantOfShape", low.ints(spec_of(node).shape), value=numpy_helper.from_array(value))


def _pad(low: _Lowering, node: Node) -> str:
    x, pad, value = node.args
    pairs: list[Size] = list(pad)  # type: ignore[arg-type]
    rank = spec_of(node).rank
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    for i in range(len(pairs) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pairs[2 * i], pairs[2 * i + 1]
    return low.op("Pad", low.values[x], low.ints([*before, *after]), low.scalar(value, spec_of(node).dtype))  # type: ignore[index, arg-type]


def _rms_norm(low: _Lowering, node: Node) -> str:
    x, weight, epsilon = node.args
    # ONNX computes the statistics in fp32 and rounds to the scale's type before multiplying: the same as the reference.
    name = low.cast(low.values[x], spec_of(x).dtype, spec_of(weight).dtype)  # type: ignore[index, arg-type]
    return low.op("RMSNormalization", name, low.values[weight], axis=-1, epsilon=epsilon, stash_type=1)  # type: ignore[index]


def _rotary(low: _Lowering, node: Node) -> str:
    x, cos, sin = node.args
    heads = spec_of(x).shape[1]  # type: ignore[arg-type]
    tables = [low.op("Unsqueeze", low.values[t], low.ints([0])) for t in (cos, sin)]  # type: ignore[index]
    rotated = low.op("RotaryEmbedding", low.heads_last(x), *tables, num_heads=heads)  # type: ignore[arg-type]
    return low.reshape(rotated, spec_of(node).shape)


def _attend(low: _Lowering, node: Node, key: str, value: str, scale: float, causal: bool) -> str:
    query: Node = node.args[0]  # type: ignore[assignment]
    heads, kv_heads = spec_of(query).shape[1], spec_of(node.args[1]).shape[1]  # type: ignore[arg-type]
    # With `scale` left to the operator, TensorRT multiplies query and key each by a rounded square root: 0.29 % off on
    # every logit in bf16. One multiplication of the query, and scale 1, keeps it to one rounding of one factor.
    scaled = low.op("Mul", low.heads_last(query), low.scalar(scale, spec_of(query).dtype))
    attributes = {"q_num_heads": heads, "kv_num_heads": kv_heads, "scale": 1.0, "is_causal": int(causal)}
    return low.reshape(low.op("Attention", scaled, key, value, **attributes), spec_of(node).shape)


def _attention(low: _Lowering, node: Node) -> str:
    _, key, value, causal, scale = node.args
    return _attend(low, node, low.heads_last(key), low.heads_last(value), scale, causal)  # type: ignore[arg-type]


def _joint_attention(low: _Lowering, node: Node) -> str:
    _, key, value, prefix_key, prefix_value, scale = node.args
    # The prompt's rows last: only the tail of the keys can be masked by a length.
    keys, values = (
        low.op("Concat", low.heads_last(own), low.heads_last(prefix), axis=1)  # type: ignore[arg-type]
        for own, prefix in ((key, prefix_key), (value, prefix_value))
    )
    return _attend(low, node, keys, values, scale, False)  # type: ignore[arg-type]


_RULES: dict[Any, Rule] = {
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.cos.default: _unary("Cos"),
    aten.sin.default: _unary("Sin"),
    aten.exp.default: _unary("Exp"),
    aten.neg.default: _unary("Neg"),
    aten.relu.default: _unary("Relu"),
    aten.silu.default: lambda low, node: _silu(low, low.values[node.args[0]]),  # type: ignore[index]
    aten.pow.Tensor_Scalar: _pow,
    aten._to_copy.default: _convert,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.view.default: _view,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _axes("Unsqueeze"),
    aten.squeeze.dim: _axes("Squeeze"),
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.embedding.default: _embedding,
    aten.where.self: _where,
    aten.arange.start: _arange,
    aten.full.default: _full,
    aten.constant_pad_nd.default: _pad,
    ops.RMS_NORM: _rms_norm,
    ops.ROTARY: _rotary,
    ops.SWIGLU: _swiglu,
    ops.ATTENTION: _attention,
    ops.JOINT_ATTENTION: _joint_attention,
}

