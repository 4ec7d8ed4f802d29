"""Small ONNX graphs of the shapes the compiler lowers to, for the builder tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from cosmos_export.targets.profiles import ShapeRange

BF16, FP16, FP32, FP8, INT64 = (
    TensorProto.BFLOAT16,
    TensorProto.FLOAT16,
    TensorProto.FLOAT,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.INT64,
)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 32, 128
LINEAR_WIDTH = 256

Range = tuple[int, int, int]


class Graph:
    """A graph under construction; each method returns the name of the value it adds."""

    def __init__(self, dtype: int = BF16) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.random = np.random.default_rng(0)

    def input(self, name: str, shape: Sequence[int | str], dtype: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, shape))
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        self.node("Identity", value, into=name)
        self.outputs.append(helper.make_tensor_value_info(name, self.dtype, shape))

    def constant(self, name: str, value: Any, dtype: int | None = None) -> str:
        dtype = dtype or self.dtype
        array = np.asarray(value).astype(helper.tensor_dtype_to_np_dtype(dtype))
        self.constants[name] = helper.make_tensor(name, dtype, array.shape, array.tobytes(), raw=True)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(f"integers{values}", values, INT64)

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.standard_normal(shape) * 0.02)

    def node(self, operator: str, *inputs: str, into: str | None = None, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [into or name], name=name, **attributes))
        return into or name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, list(self.constants.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def generator(
    layers: int = 1,
    *,
    dtype: int = BF16,
    flat: bool = True,
    rotary: bool = False,
    causal: bool = False,
    one_sided_scale: bool = True,
) -> onnx.ModelProto:
    """Transformer layers with grouped heads whose K/V are joined with given ones, as in the generator tower.

    ``flat``: heads stay in the last dimension ([1, S, heads·d]), else they are the second one ([1, heads, S, d]).
    ``one_sided_scale``: the logit scale is one multiplication of q, and Attention gets scale 1.
    """
    graph = Graph(dtype)
    hidden = graph.input("x", [1, "S", HIDDEN])
    tables = [graph.input(name, [1, "S", HEAD_DIM // 2]) for name in ("cos", "sin")] if rotary else []
    for layer in range(layers):
        hidden = graph.node("Add", hidden, _attention(graph, hidden, layer, tables, flat, causal, one_sided_scale))
        normed = _rms_norm(graph, hidden, f"mlp_norm{layer}", HIDDEN)
        gate, up = (graph.node("MatMul", normed, graph.weight(f"{name}{layer}", HIDDEN, INNER)) for name in ("g", "u"))
        inner = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
        hidden = graph.node("Add", hidden, graph.node("MatMul", inner, graph.weight(f"down{layer}", INNER, HIDDEN)))
    graph.output(hidden, "y", [1, "S", HIDDEN])
    return graph.model()


def generator_profile(
    layers: int = 1,
    *,
    flat: bool = True,
    rotary: bool = False,
    tokens: Range = (1, 64, 1024),
    und: Range = (1, 32, 512),
) -> dict[str, ShapeRange]:
    """Shapes of the inputs of `generator`."""
    shapes = {"x": span(lambda n: (1, n, HIDDEN), tokens)}
    for name in ("cos", "sin") if rotary else ():
        shapes[name] = span(lambda n: (1, n, HEAD_DIM // 2), tokens)
    for layer in range(layers):
        for name in ("uk", "uv"):
            shapes[f"{name}{layer}"] = span(
                lambda n: (1, n, KV_HEADS * HEAD_DIM) if flat else (1, KV_HEADS, n, HEAD_DIM), und
            )
    return shapes


def span(shape: Any, values: Range) -> ShapeRange:
    low, opt, high = (tuple(shape(value)) for value in values)
    return low, opt, high


def linear(scheme: str, *, external: bool = False, copies: int = 1, width: int = LINEAR_WIDTH) -> onnx.ModelProto:
    """A norm and one linear (or ``copies`` that read the same value), quantized as ``scheme`` says."""
    out = 512
    graph = Graph()
    normed = _rms_norm(graph, graph.input("x", [1, "S", width]), "norm", width)
    if scheme == "fp8":
        zero = graph.constant("zero", np.zeros((), ml_dtypes.float8_e4m3fn), FP8)
        scale = graph.constant("input_scale", 0.02)
        normed = graph.node("DequantizeLinear", graph.node("QuantizeLinear", normed, scale, zero), scale)
    for copy in range(copies):
        name = f"w{copy}"
        if scheme in ("fp8", "fp8-w8a16"):
            if external:
                graph.input(name, [width, out], FP8)
            else:
                graph.constant(name, graph.random.standard_normal((width, out)) * 50, FP8)
            value = graph.node("DequantizeLinear", name, graph.constant("weight_scale", 0.01 + copy / 1000))
        elif scheme == "int4":
            packed = graph.random.integers(0, 256, width * out // 2).astype(np.uint8).tobytes()
            graph.constants[name] = helper.make_tensor(name, TensorProto.INT4, (width, out), packed, raw=True)
            scales = graph.constant("block_scale", np.full((width // 128, out), 0.01))
            value = graph.node("DequantizeLinear", name, scales, axis=0, block_size=128)
        else:
            value = graph.input(name, [width, out]) if external else graph.weight(name, width, out)
        graph.output(graph.node("MatMul", normed, value), f"y{copy}", [1, "S", out])
    return graph.model()


def patchify() -> onnx.ModelProto:
    """Latents of any size, odd ones too, to patch tokens and back, with all shapes computed in the graph."""
    graph = Graph()
    latents = graph.input("latents", [1, 48, "frames", "height", "width"])
    shape, one, two = graph.node("Shape", latents), graph.integers(1), graph.integers(2)
    frames, height, width = (graph.node("Gather", shape, graph.integers(axis), axis=0) for axis in (2, 3, 4))
    rows, columns = (graph.node("Div", graph.node("Add", size, one), two) for size in (height, width))
    missing = [
        graph.node("Sub", graph.node("Mul", half, two), full) for half, full in ((rows, height), (columns, width))
    ]
    pads = graph.node("Concat", graph.integers(*[0] * 8), *missing, axis=0)
    padded = graph.node("Pad", latents, pads, graph.constant("nothing", 0.0))
    depth = graph.integers(48)
    split = graph.node("Concat", depth, frames, rows, two, columns, two, axis=0)
    patches = graph.node("Transpose", graph.node("Reshape", padded, split), perm=[1, 2, 4, 3, 5, 0])
    count = graph.node("Mul", graph.node("Mul", frames, rows), columns)
    tokens = graph.node("Reshape", patches, graph.node("Concat", one, count, graph.integers(192), axis=0))
    hidden = graph.node("MatMul", tokens, graph.weight("proj_in", 192, HIDDEN))
    zero, step = graph.constant("zero", 0, INT64), graph.constant("step", 1, INT64)
    positions = graph.node("Range", zero, graph.node("Squeeze", count, graph.integers(0)), step)
    column = graph.node("Unsqueeze", graph.node("Cast", positions, to=FP32), one)
    angles = graph.node("Mul", column, graph.constant("frequencies", np.linspace(1, 0.1, 16)[None], FP32))
    tables = [
        graph.node("Cast", graph.node("Unsqueeze", graph.node(name, angles), graph.integers(0)), to=BF16)
        for name in ("Cos", "Sin")
    ]
    hidden = graph.node("RotaryEmbedding", hidden, *tables, num_heads=2)
    out = graph.node("MatMul", hidden, graph.weight("proj_out", HIDDEN, 192))
    out = graph.node("Reshape", out, graph.node("Concat", frames, rows, columns, two, two, depth, axis=0))
    out = graph.node("Transpose", out, perm=[5, 0, 1, 3, 2, 4])
    even = [graph.node("Mul", half, two) for half in (rows, columns)]
    out = graph.node("Reshape", out, graph.node("Concat", one, depth, frames, *even, axis=0))
    ends = graph.node("Concat", height, width, axis=0)
    out = graph.node("Slice", out, graph.integers(0, 0), ends, graph.integers(3, 4))
    graph.output(out, "velocity", [1, 48, "frames", "height", "width"])
    return graph.model()


def concat_tokens() -> onnx.ModelProto:
    """Two token sequences joined, then a linear."""
    graph = Graph()
    joined = graph.node("Concat", *(graph.input(name, [1, size, HIDDEN]) for name, size in ("aA", "bB")), axis=1)
    graph.output(graph.node("MatMul", joined, graph.weight("w", HIDDEN, HIDDEN)), "y", [1, "N", HIDDEN])
    return graph.model()


def _rms_norm(graph: Graph, value: str, name: str, width: int) -> str:
    return graph.node("RMSNormalization", value, graph.constant(name, np.ones(width)), axis=-1, epsilon=1e-6)


def _attention(
    graph: Graph, hidden: str, layer: int, tables: list[str], flat: bool, causal: bool, one_sided_scale: bool
) -> str:
    normed = _rms_norm(graph, hidden, f"norm{layer}", HIDDEN)
    values = {}
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        value = graph.node("MatMul", normed, graph.weight(f"{name}{layer}", HIDDEN, heads * HEAD_DIM))
        value = graph.node("Reshape", value, graph.integers(1, -1, heads, HEAD_DIM))
        if name != "v":
            value = _rms_norm(graph, value, f"norm_{name}{layer}", HEAD_DIM)
        if flat:
            value = graph.node("Reshape", value, graph.integers(1, -1, heads * HEAD_DIM))
        else:
            value = graph.node("Transpose", value, perm=[0, 2, 1, 3])
        if tables and name != "v":
            value = graph.node("RotaryEmbedding", value, *tables, **({"num_heads": heads} if flat else {}))
        values[name] = value
    for name in ("k", "v"):
        shape = [1, "U", KV_HEADS * HEAD_DIM] if flat else [1, KV_HEADS, "U", HEAD_DIM]
        given = graph.input(f"u{name}{layer}", shape)
        values[name] = graph.node("Concat", values[name], given, axis=1 if flat else 2)
    attributes: dict[str, Any] = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS} if flat else {}
    if one_sided_scale:
        values["q"] = graph.node("Mul", values["q"], graph.constant("scale", HEAD_DIM**-0.5))
        attributes["scale"] = 1.0
    if causal:
        attributes["is_causal"] = 1
    out = graph.node("Attention", values["q"], values["k"], values["v"], **attributes)
    if not flat:
        out = graph.node("Transpose", out, perm=[0, 2, 1, 3])
        out = graph.node("Reshape", out, graph.integers(1, -1, HEADS * HEAD_DIM))
    return graph.node("MatMul", out, graph.weight(f"o{layer}", HEADS * HEAD_DIM, HIDDEN))
