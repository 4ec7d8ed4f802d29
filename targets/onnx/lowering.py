"""Graphs as ONNX models (opset 23) with their weights beside them.

One rule an operation. Two precisions of one graph share one weight file: the graph as it is, and one that computes in
fp32 for ONNX Runtime on a CPU, which casts the stored weights where it reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
from cosmos_export.ir.graph import Graph, Node, is_constant, is_input, is_op, is_weight, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.packing import E2M1_MAX, E2M1_VALUES, E4M3_MAX, NVFP4_BLOCK, SMALLEST_BLOCK_SCALE
from cosmos_export.ir.spec import E2M1, INT4, WeightBinding
from cosmos_export.targets.onnx.plugins import Plugins
from cosmos_export.targets.onnx.weights import Stored, numpy_dtype, size_bytes

OPSET = 23
_IR_VERSION = 11
_TRT = "trt"

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
    """What the weight ``node`` is called in a model."""
    binding: WeightBinding = node.meta["weight"]
    return binding.keys[0] if len(binding.keys) == 1 and binding.packing is None else str(node.name)


class Lowering:
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
        self.graph = graph if plugins is None else plugins.fused(graph)
        self._plugins = plugins
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
        self._scope = ""
        self.domains: set[str] = set()
        """Domains of operations that are not ONNX's own: TensorRT's, and plugins."""

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
        self._scope = node.name
        if is_weight(node):
            self.values[node] = self._weight(node)
        elif is_constant(node):
            self.values[node] = self.constant(node.meta["constant"].numpy(), node.name)
        else:
            plugin = self._plugins.rule(node) if self._plugins is not None else None
            rule = plugin or RULES.get(node.target)
            if rule is None:
                raise InternalError("CX230", f"`{node.name}`: no ONNX form of {node.target}")
            self.values[node] = rule(self, node)

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

    def _weight(self, node: Node) -> str:
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
        name = label or f"{self._scope}_{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    @contextmanager
    def beside(self, operand: Node) -> Iterator[None]:
        """What is made of ``operand`` alone in here is made where it is: in a loop it may be the same in every step."""
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


Rule = Callable[[Lowering, Node], str]


def _binary(kind: str) -> Rule:
    def rule(low: Lowering, node: Node) -> str:
        dtype = spec_of(node).dtype
        return low.op(kind, *(low.operand(a, dtype) for a in node.args))

    return rule


def _unary(kind: str) -> Rule:
    return lambda low, node: low.op(kind, low.values[node.args[0]])


def _silu(low: Lowering, name: str) -> str:
    return low.op("Mul", name, low.op("Sigmoid", name))


def _swiglu(low: Lowering, node: Node) -> str:
    gate, up = (low.values[a] for a in node.args)
    return low.op("Mul", _silu(low, gate), up)


def _pow(low: Lowering, node: Node) -> str:
    x, exponent = node.args
    name = low.values[x]
    return low.op("Mul", name, name) if exponent == 2 else low.op("Pow", name, low.scalar(exponent, torch.float32))


def _convert(low: Lowering, node: Node) -> str:
    source: Node = node.args[0]
    return low.cast(low.values[source], spec_of(source).dtype, spec_of(node).dtype)


def _linear(low: Lowering, node: Node) -> str:
    x, weight, *bias = node.args
    inputs = [low.values[x], low.values[weight], *(low.values[b] for b in bias if b is not None)]
    if spec_of(x).rank != 2:
        raise InternalError("CX230", f"`{node.name}`: a linear of rows is [N, in], not {spec_of(x)}")
    return low.op("Gemm", *inputs, label=gemm_name(node), transB=1)


def gemm_name(node: Node) -> str:
    """What the product of the linear ``node`` is called in its model, and in an engine made from it."""
    return f"gemm_{node.name}"


ROUNDINGS = ops.having(ops.Trait.ROUNDS)
"""Operations that round activations."""


def rounded_values(node: Node, model: onnx.ModelProto) -> list[tuple[str, str]]:
    """What ``node``, one of `ROUNDINGS`, rounds and to what, as values of a ``model`` that runs on a CPU: of attention
    in FP8 query, keys, values and softmax. Empty where the model does not have it, or with a zero that is not zero:
    ONNX Runtime passes over that, and others need not."""
    made = [n for n in model.graph.node if n.name.rpartition("_")[0] == node.name]
    if is_op(node, ops.REQUANTIZE_BLOCKS):
        return [(made[0].input[0], made[-1].output[0])] if made else []
    rounds = [n for n in made if n.op_type == "QuantizeLinear"]
    used = {n.input[2] for n in rounds}
    zeros = {i.name for i in model.graph.initializer if i.name in used and not any(numpy_helper.to_array(i).tobytes())}
    return [(n.input[0], n.output[0]) for n in rounds if n.input[2] in zeros]


# -- quantization. Scales are float32 and exact; the type of a result is stated, so that the builder sees one type
# around a product. With the scale in bf16 instead, a weight or an activation is off by up to 0.4 %.


def _quantize(low: Lowering, node: Node) -> str:
    x, scale = (low.values[a] for a in node.args)
    zero = np.zeros((), dtype=numpy_dtype(torch.float8_e4m3fn))
    return low.op("QuantizeLinear", x, scale, low.constant(zero, "zero"))


def _joint_attention_fp8(low: Lowering, node: Node) -> str:
    """Products around a softmax, which the builder fuses into one FP8 kernel only if it sees all four quantizers."""
    query, key, value, prefix_key, prefix_value, scales, scale = node.args
    rows, heads, size = spec_of(query).shape
    kv_heads, dtype = int(spec_of(key).shape[1]), spec_of(query).dtype
    group = simplify(expression(heads) / kv_heads)
    steps = [float(s) for s in scales.meta["constant"]]

    def narrow(name: str, step: float) -> str:
        return _widened(
            low, low.quantized(name, step), low.constant(np.asarray(step, dtype=np.float32), "scale"), dtype
        )

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


def _dequantize(low: Lowering, node: Node) -> str:
    x, scale, dtype = node.args
    return _widened(low, low.values[x], low.values[scale], dtype, rows=spec_of(scale).rank == 1)


def _widened(low: Lowering, x: str, scale: str, dtype: torch.dtype, *, rows: bool = False) -> str:
    """``rows``: one scale for each row of ``x``."""
    wide = low.dtype(dtype) == torch.float32
    attributes: dict[str, Any] = {} if wide else {"output_dtype": low.type_of(dtype)}
    if rows:
        attributes["axis"] = 0
    return low.op("DequantizeLinear", x, scale, **attributes)


def _dequantize_groups(low: Lowering, node: Node) -> str:
    # The scale has the type of the result here: with another one the builder finds no INT4 product.
    x, scale = node.args
    group = int(spec_of(x).shape[1]) // int(spec_of(scale).shape[1])
    return low.op("DequantizeLinear", low.values[x], low.values[scale], axis=1, block_size=group)


def _dequantize_blocks(low: Lowering, node: Node) -> str:
    x, blocks, scale, dtype = node.args
    if not low.portable:
        return _blocks(low, low.values[x], low.values[blocks], low.values[scale], dtype)
    wide = low.op("DequantizeLinear", low.values[blocks], low.values[scale])
    # Four-bit floats have no arithmetic in ONNX Runtime: the codes, two a byte, look up their values.
    codes = low.values[x]
    halves = [low.op("BitwiseAnd", codes, _byte(low, 15)), low.op("BitShift", codes, _byte(low, 4), direction="RIGHT")]
    axis = low.ints([-1])
    pairs = low.op("Concat", *(low.op("Unsqueeze", half, axis) for half in halves), axis=-1)
    indices = low.op("Cast", low.reshape(pairs, spec_of(x).shape), to=TensorProto.INT32)
    table = np.asarray([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=np.float32)
    values = low.op("Gather", low.constant(table, "e2m1"), indices)
    return _times_blocks(low, values, wide, spec_of(x).shape)


def _requantize_blocks(low: Lowering, node: Node) -> str:
    x, scale = node.args
    shape, dtype = spec_of(x).shape, spec_of(x).dtype
    if not low.portable:
        low.domains.add(_TRT)
        inputs, outputs = [low.values[x], low.values[scale]], [f"{node.name}_fp4", f"{node.name}_fp4_scales"]
        form = {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
        name = f"{node.name}_quantize"
        low.nodes.append(helper.make_node("TRT_FP4DynamicQuantize", inputs, outputs, name=name, domain=_TRT, **form))
        return _blocks(low, outputs[0], outputs[1], low.values[scale], dtype)
    # The same arithmetic as the reference, in float32.
    number = partial(low.scalar, dtype=torch.float32)
    zero = low.constant(np.zeros((), dtype=numpy_dtype(torch.float8_e4m3fn)), "zero")
    blocked = low.reshape(low.values[x], [*shape[:-1], int(shape[-1]) // NVFP4_BLOCK, NVFP4_BLOCK])
    largest = low.op("ReduceMax", low.op("Abs", blocked), low.ints([-1]), keepdims=0)
    ratio = low.op("Div", largest, low.op("Mul", number(E2M1_MAX), low.values[scale]))
    ratio = low.op("Where", low.op("Greater", ratio, number(0.0)), ratio, number(1.0))
    # Not `Clip`: ONNX Runtime folds it into the quantization behind it, and knows no FP8 there.
    ratio = low.op("Min", low.op("Max", ratio, number(SMALLEST_BLOCK_SCALE)), number(E4M3_MAX))
    narrow = low.op("QuantizeLinear", ratio, number(1.0), zero)
    steps = low.op("Mul", low.op("Cast", narrow, to=TensorProto.FLOAT), low.values[scale])
    quotient = low.op("Div", blocked, low.op("Unsqueeze", steps, low.ints([-1])))
    size = low.op("Abs", quotient)
    unit = low.op("Where", low.op("Less", size, number(4.0)), number(1.0), number(2.0))
    unit = low.op("Where", low.op("Less", size, number(2.0)), number(0.5), unit)
    rounded = low.op("Min", low.op("Mul", low.op("Round", low.op("Div", size, unit)), unit), number(E2M1_MAX))
    values = low.op("Mul", rounded, low.op("Sign", quotient))
    return low.reshape(low.op("Mul", values, low.op("Unsqueeze", steps, low.ints([-1]))), shape)


def _blocks(low: Lowering, values: str, blocks: str, scale: str, dtype: torch.dtype) -> str:
    """Four-bit floats as ``dtype``. A cast, since with `output_dtype` in its place the builder refuses the scales."""
    wide = low.cast(low.op("DequantizeLinear", blocks, scale), torch.float32, dtype)
    return low.op("DequantizeLinear", values, wide, axis=-1, block_size=NVFP4_BLOCK)


def _times_blocks(low: Lowering, values: str, blocks: str, shape: Sequence[Size]) -> str:
    blocked = low.reshape(values, [*shape[:-1], int(shape[-1]) // NVFP4_BLOCK, NVFP4_BLOCK])
    return low.reshape(low.op("Mul", blocked, low.op("Unsqueeze", blocks, low.ints([-1]))), shape)


def _byte(low: Lowering, value: int) -> str:
    return low.constant(np.asarray(value, dtype=np.uint8), "byte")


def _matmul(low: Lowering, node: Node) -> str:
    return low.op("MatMul", *(low.values[a] for a in node.args))


_CONVOLUTIONS = ops.having(ops.Trait.CONVOLUTION)


def _operands(node: Node, *defaults: Any) -> list[Any]:
    """All operands of ``node``, those it leaves out as their defaults."""
    return [*node.args, *defaults[len(node.args) :]]


def _is_zero_frame(node: Node) -> bool:
    """``node`` pads spatial axes with zeros, and only convolutions read it: they can pad themselves."""
    pad, value = node.args[1:]
    plain = value == 0 and all(isinstance(p, int) and p >= 0 for p in pad) and len(pad) <= 2 * (spec_of(node).rank - 2)
    return plain and all(is_op(user, *_CONVOLUTIONS) and user.args[0] is node for user in node.users)


def _convolution(low: Lowering, node: Node) -> str:
    x, weight, bias, stride, padding, dilation, groups = _operands(node, None, None, None, [1], [0], [1], 1)
    axes = spec_of(node).rank - 2
    before, after = ops.spatial(padding, axes), ops.spatial(padding, axes)
    if is_op(x, aten.constant_pad_nd.default) and _is_zero_frame(x):
        frame = x.args[1]
        for i in range(len(frame) // 2):  # pairs count from the last axis
            before[axes - 1 - i] += frame[2 * i]
            after[axes - 1 - i] += frame[2 * i + 1]
    inputs = [low.values[n] for n in (x, weight, bias) if n is not None]
    steps: dict[str, Any] = {"strides": ops.spatial(stride, axes), "dilations": ops.spatial(dilation, axes)}
    return low.op("Conv", *inputs, pads=[*before, *after], group=groups, **steps)


def _transposed_convolution(low: Lowering, node: Node) -> str:
    x, weight, bias, stride, padding, output_padding, _, dilation = _operands(
        node, None, None, None, [1], [0], [0], 1, [1]
    )
    # TensorRT-RTX 1.7 has no transposed convolution in bf16 (its type inference fails), only in fp32 and fp16.
    inputs = [low.operand(n, torch.float32) for n in (x, weight, bias) if n is not None]
    attributes: dict[str, Any] = {
        "strides": stride,
        "pads": padding * 2,
        "output_padding": output_padding,
        "dilations": dilation,
    }
    result = low.op("ConvTranspose", *inputs, **attributes)
    return low.cast(result, torch.float32, spec_of(node).dtype)


def _mean(low: Lowering, node: Node) -> str:
    x, axes, *keep = node.args
    return low.op("ReduceMean", low.values[x], low.ints(axes), keepdims=int(bool(keep and keep[0])))


def _vector_norm(low: Lowering, node: Node) -> str:
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


def _clamp(low: Lowering, node: Node) -> str:
    x, *bounds = node.args
    dtype = spec_of(node).dtype
    return low.op("Clip", low.values[x], *(low.scalar(bound, dtype) for bound in bounds))


def _view(low: Lowering, node: Node) -> str:
    return low.reshape(low.values[node.args[0]], spec_of(node).shape)


def _expand(low: Lowering, node: Node) -> str:
    return low.op("Expand", low.values[node.args[0]], low.ints(spec_of(node).shape))


def _permute(low: Lowering, node: Node) -> str:
    return low.op("Transpose", low.values[node.args[0]], perm=list(node.args[1]))


def _axes(kind: str) -> Rule:
    def rule(low: Lowering, node: Node) -> str:
        axis: int = node.args[1]
        return low.op(kind, low.values[node.args[0]], low.ints([axis]))

    return rule


def _cat(low: Lowering, node: Node) -> str:
    axis = node.args[1] if len(node.args) > 1 else 0
    return low.op("Concat", *(low.values[t] for t in node.args[0]), axis=axis)


def _slice(low: Lowering, node: Node) -> str:
    x, axis, start, end, *step = node.args
    vectors = [low.ints([v]) for v in (start, end, axis, *(step or [1]))]
    return low.op("Slice", low.values[x], *vectors)


def _select(low: Lowering, node: Node) -> str:
    x, axis, index = node.args
    return low.op("Gather", low.values[x], low.constant(np.asarray(index, dtype=np.int64), "index"), axis=axis)


def _embedding(low: Lowering, node: Node) -> str:
    return low.op("Gather", *(low.values[a] for a in node.args), axis=0)


def _where(low: Lowering, node: Node) -> str:
    return low.op("Where", *(low.values[a] for a in node.args))


def _arange(low: Lowering, node: Node) -> str:
    start, end = node.args
    ends = [low.op("Squeeze", low.size(v), low.ints([0])) for v in (start, end)]
    rows = low.op("Range", *ends, low.constant(np.asarray(1, dtype=np.int64), "one"))
    return low.cast(rows, torch.int64, spec_of(node).dtype)


def _full(low: Lowering, node: Node) -> str:
    value = np.asarray([node.args[1]]).astype(numpy_dtype(low.dtype(spec_of(node).dtype)))
    return low.op("ConstantOfShape", low.ints(spec_of(node).shape), value=numpy_helper.from_array(value))


def _pad(low: Lowering, node: Node) -> str:
    x, pad, value = node.args
    if _is_zero_frame(node):
        return low.values[x]
    pairs: list[Size] = list(pad)
    rank = spec_of(node).rank
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    for i in range(len(pairs) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pairs[2 * i], pairs[2 * i + 1]
    return low.op("Pad", low.values[x], low.ints([*before, *after]), low.scalar(value, spec_of(node).dtype))


def _rms_norm(low: Lowering, node: Node) -> str:
    x, weight, epsilon = node.args
    # ONNX computes the statistics in fp32 and rounds to the scale's type before multiplying: the same as the reference.
    name = low.cast(low.values[x], spec_of(x).dtype, spec_of(weight).dtype)
    return low.op("RMSNormalization", name, low.values[weight], axis=-1, epsilon=epsilon, stash_type=1)


def _rotary(low: Lowering, node: Node) -> str:
    x, cos, sin = node.args
    heads = spec_of(x).shape[1]
    tables = [low.op("Unsqueeze", low.values[t], low.ints([0])) for t in (cos, sin)]
    rotated = low.op("RotaryEmbedding", low.heads_last(x), *tables, num_heads=heads)
    return low.reshape(rotated, spec_of(node).shape)


def _attention(low: Lowering, node: Node) -> str:
    _, key, value, causal, scale = node.args
    return low.attend(node, low.heads_last(key), low.heads_last(value), scale, causal)


def _sdpa(low: Lowering, node: Node) -> str:
    query, key, value, *rest = node.args
    if rest or node.kwargs:
        raise InternalError("CX230", f"`{node.name}`: attention with {rest} {node.kwargs}")
    scale = float(spec_of(query).shape[-1]) ** -0.5
    scaled = low.op("Mul", low.values[query], low.scalar(scale, spec_of(query).dtype))
    return low.op("Attention", scaled, low.values[key], low.values[value], scale=1.0)


def _joint_attention(low: Lowering, node: Node) -> str:
    _, key, value, prefix_key, prefix_value, scale = node.args
    # The prompt's rows last: only the tail of the keys can be masked by a length.
    keys, values = (
        low.op("Concat", low.heads_last(own), low.heads_last(prefix), axis=1)
        for own, prefix in ((key, prefix_key), (value, prefix_value))
    )
    return low.attend(node, keys, values, scale, False)


RULES: dict[Any, Rule] = {
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.cos.default: _unary("Cos"),
    aten.sin.default: _unary("Sin"),
    aten.exp.default: _unary("Exp"),
    aten.neg.default: _unary("Neg"),
    aten.relu.default: _unary("Relu"),
    aten.silu.default: lambda low, node: _silu(low, low.values[node.args[0]]),
    aten.pow.Tensor_Scalar: _pow,
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.mean.dim: _mean,
    aten.linalg_vector_norm.default: _vector_norm,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.scaled_dot_product_attention.default: _sdpa,
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
    ops.JOINT_ATTENTION_FP8: _joint_attention_fp8,
    ops.QUANTIZE: _quantize,
    ops.DEQUANTIZE: _dequantize,
    ops.DEQUANTIZE_GROUPS: _dequantize_groups,
    ops.DEQUANTIZE_BLOCKS: _dequantize_blocks,
    ops.REQUANTIZE_BLOCKS: _requantize_blocks,
}
