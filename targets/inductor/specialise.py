"""Graphs specialised to the sizes of one call, as functions that run one after another.

Attention stays whole; what is between two attentions is one function of tensors, which the compiler fuses. What
this project's kernels compute is an operation of the graph, where passes have put it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Shape, Size, bind, simplify
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of, specs_of
from cosmos_export.ir.ops import Trait, aten
from cosmos_export.kernels.description import W4A16
from cosmos_export.targets.inductor.functions import implementations, narrow_values, packed_linear, scaled_linear

GROUP = 128
"""Columns that a scale of the INT4 kernel covers."""


@dataclass(frozen=True)
class CompileSettings:
    """How graphs are compiled and run."""

    attention: str = "sdpa"
    compiled: bool = True
    """False: the graph's operations one after another, for comparison."""
    captured: bool = True
    """Replay CUDA graphs, on a GPU."""
    whole_loop: bool = True
    """All steps of a closed loop are one CUDA graph; otherwise one step is, replayed as often."""
    kernels: frozenset[str] = frozenset()
    """`W4A16` or none: whether a kernel computes products with INT4 weights. What other kernels compute is in the
    graph, where passes put it (`passes.pipeline.fuse_kernels`)."""
    open_dims: frozenset[str] = frozenset()
    """Dims that differ from call to call, as the length of a prompt does: compiled code takes every value of them."""


@dataclass(frozen=True)
class CompiledPart:
    """A run of operations that is one function of its operands."""

    module: fx.GraphModule
    key: tuple[Any, ...]
    """Equal for chunks that are the same function of operands of the same types and shapes."""
    operands: tuple[str, ...]
    results: tuple[str, ...]
    open: tuple[tuple[int, int], ...]
    """(operand, axis) of every size that may differ from call to call."""
    compiled: bool
    """False: attention, a kernel of its own that a compiler makes nothing of."""


@dataclass(frozen=True)
class Specialised:
    """A graph as functions that run one after another."""

    chunks: tuple[CompiledPart, ...]
    outputs: Mapping[str, str]
    """Output of the graph → the value that it is."""


@dataclass(eq=False)
class _Call:
    """An operation whose sizes are known, except those of open dims; operands are calls and placeholders."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    shape: Shape
    attends: bool = False


_Operand: TypeAlias = "_Call | Node"
_DEVICE = object()
"""Stands for the device among the arguments of a call."""


def specialise(
    graph: Graph,
    sizes: Mapping[str, tuple[int, ...]],
    settings: CompileSettings | None = None,
    device: torch.device | None = None,
) -> Specialised:
    """``graph`` for inputs of ``sizes``, cut before and after every attention: it is a kernel of its own anyway.

    The layers of a model are then the same few chunks over and over, and compiling takes as long as for one layer.
    Chunks are right for every value of ``settings.open_dims``; those between the attentions of a generator depend on
    its prompt only where they quantize its keys and values. ValueError where sizes contradict each other or the graph.
    """
    settings = settings or CompileSettings()
    if settings.kernels - {W4A16}:
        raise ValueError(f"kernels {', '.join(sorted(settings.kernels))}: passes put all but {W4A16} into a graph")
    binding = bind((name, spec_of(node).shape, sizes[name]) for name, node in graph.inputs.items())
    closed = {name: value for name, value in binding.items() if name not in settings.open_dims}
    lowering = _Lowering(graph, closed, settings, device or torch.device("cpu"))
    calls, made = lowering.calls, lowering.made
    parts: list[list[_Call]] = [[]]
    for call in calls:
        if parts[-1] and (call.attends or parts[-1][-1].attends):
            parts.append([])
        parts[-1].append(call)
    kept = {made.get(node, node) for node in graph.outputs.values()}
    read_in: dict[_Operand, set[int]] = {}
    for number, part in enumerate(parts):
        for call in part:
            for operand in _operands(call):
                read_in.setdefault(operand, set()).add(number)
    code = implementations(settings.attention, graph.calls(*ops.having(Trait.FUSED)))
    chunks = []
    for number, part in enumerate(parts):
        results = [call for call in part if call in kept or read_in.get(call, set()) - {number}]
        if results:
            chunks.append(_chunk(part, results, lowering, code))
    return Specialised(tuple(chunks), {name: made.get(n, n).name for name, n in graph.outputs.items()})


def _mapped(value: Any, function: Callable[[_Operand], Any]) -> Any:
    """``value`` with ``function`` applied to every operand in it."""
    if isinstance(value, (_Call, Node)):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, function) for k, v in value.items()}
    return value


def _operands(call: _Call) -> list[_Operand]:
    found: list[_Operand] = []
    _mapped((call.args, call.kwargs), found.append)
    return found


class _Lowering:
    """The operations of a graph as calls: products on operands as they are stored, FP8 attention as its quantizations,
    which fuse with what is before them, and its kernel."""

    def __init__(
        self, graph: Graph, closed: Mapping[str, int], settings: CompileSettings, device: torch.device
    ) -> None:
        self.graph, self.settings = graph, settings
        self._closed = closed
        self._own_fp8 = device.type == "cuda" or settings.attention != "sdpa"
        self.calls: list[_Call] = []
        self.made: dict[Node, _Operand] = {}
        for node in graph.calls():
            self.made[node] = self._lowered(node)

    def size(self, value: Size) -> Size:
        """``value`` as a number, or as an expression over open dims."""
        if isinstance(value, int):
            return value
        parts = value.atoms(sympy.Symbol, FloorDiv)
        known = {p: sympy.Integer(self._closed[str(p)]) for p in parts if str(p) in self._closed}
        found = simplify(value.xreplace(known))
        if not isinstance(found, int) and not {s.name for s in found.free_symbols} <= self.settings.open_dims:
            raise ValueError(f"{value} is not an integer under {dict(self._closed)}")
        return found

    def shape(self, operand: _Operand) -> Shape:
        if isinstance(operand, _Call):
            return operand.shape
        return tuple(self.size(s) for s in spec_of(operand).shape)

    def _add(
        self, name: str, target: Any, args: Sequence[Any], dtype: torch.dtype, shape: Shape,
        kwargs: Mapping[str, Any] | None = None, *, attends: bool = False,
    ) -> _Call:  # fmt: skip
        call = _Call(name, target, tuple(args), dict(kwargs or {}), dtype, shape, attends)
        self.calls.append(call)
        return call

    def _concrete(self, value: Any) -> Any:
        if isinstance(value, sympy.Expr):
            return self.size(value)
        if isinstance(value, Node):
            return self.made.get(value, value)
        if isinstance(value, (tuple, list)):
            return [self._concrete(v) for v in value]
        return value

    def _lowered(self, node: Node) -> _Call:
        specs = specs_of(node)
        # Of several results the first stands for all: `ITEM`, right behind, has their shapes.
        spec = specs[0] if isinstance(specs, tuple) else specs
        dtype, shape = spec.dtype, tuple(self.size(s) for s in spec.shape)
        product = _narrow_product(node, self.settings.kernels)
        if product is not None:
            function, operands = product
            return self._add(node.name, function, self._concrete(operands), dtype, shape)
        args = self._concrete(node.args)
        kwargs = {k: self._concrete(v) for k, v in node.kwargs.items()}
        if is_op(node, *ops.having(Trait.CREATES)):
            kwargs["device"] = _DEVICE  # new values appear where the others are
        if node.target is ops.JOINT_ATTENTION_FP8 and self._own_fp8:
            *operands, scales, scale = args
            return self._fp8_attention(node.name, operands, scales, scale)
        attends = is_op(node, *ops.having(Trait.ATTENDS))
        return self._add(node.name, node.target, args, dtype, shape, kwargs, attends=attends)

    def _fp8_attention(self, name: str, wide: Sequence[_Operand], scales: _Operand, scale: float) -> _Call:
        """`ops.joint_attention_fp8` of query, keys and values by this project's kernel: PyTorch has none."""
        from cosmos_export.kernels import operators

        query, key, value, prefix_key, prefix_value = wide
        narrow, dtype = torch.float8_e4m3fn, _dtype(query)
        own = [self._add(f"{name}_s{i}", aten.select.int, (scales, 0, i), torch.float32, ()) for i in range(3)]
        smaller = self._add(f"{name}_qs", aten.mul.Tensor, (query, scale), dtype, self.shape(query))
        operands = []
        for part, given, of, function in (
            ("q", smaller, own[0], ops.QUANTIZE), ("k", key, own[1], ops.QUANTIZE), ("v", value, own[2], narrow_values),
            ("pk", prefix_key, own[1], ops.QUANTIZE), ("pv", prefix_value, own[2], narrow_values),
        ):  # fmt: skip
            operands.append(self._add(f"{name}_{part}", function, (given, of), narrow, self.shape(given)))
        out = self._add(
            f"{name}_out", operators.joint_attention_fp8, (*operands, 1.0, scales), torch.bfloat16, self.shape(query),
            attends=True,
        )  # fmt: skip
        return self._add(name, aten._to_copy.default, (out,), dtype, self.shape(query), {"dtype": dtype})


def _dtype(operand: _Operand) -> Any:
    return operand.dtype if isinstance(operand, _Call) else spec_of(operand).dtype


def _chunk(
    part: list[_Call],
    results: list[_Call],
    lowering: _Lowering,
    code: Mapping[Any, Callable[..., Any]],
) -> CompiledPart:
    result = fx.Graph()
    device = result.placeholder("device")
    made: dict[_Operand, fx.Node] = {}
    operands: list[_Operand] = []
    key: list[Any] = []
    sizes: dict[sympy.Expr, fx.Node] = {}
    inside = set(part)

    def operand(value: _Operand) -> fx.Node:
        if value not in made:
            node = made[value] = result.placeholder(f"operand_{len(operands)}")
            node.meta |= {"type": _dtype(value), "shape": lowering.shape(value)}
            operands.append(value)
            key.append((node.meta["type"], *node.meta["shape"]))
        return made[value]

    def sized(value: Any) -> Any:
        """``value`` with every expression over open dims computed from the shapes of operands."""
        if isinstance(value, sympy.Expr):
            if value not in sizes:
                sizes[value] = _computed(value)
            return sizes[value]
        if isinstance(value, (tuple, list)):
            return [sized(v) for v in value]
        return device if value is _DEVICE else value

    def _computed(expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            return _measured(expr)
        for kind, function in ((sympy.Add, operator.add), (sympy.Mul, operator.mul), (FloorDiv, operator.floordiv)):
            if isinstance(expr, kind):
                first, *rest = (sized(part) if not part.is_Integer else int(part) for part in expr.args)
                for other in rest:
                    first = result.call_function(function, (first, other))
                return first
        raise ValueError(f"size {expr} is no sum, product or quotient of dims")

    def _measured(dim: sympy.Symbol) -> fx.Node:
        candidates = [*operands, *lowering.graph.inputs.values()]
        for value in candidates:
            for axis, size in enumerate(lowering.shape(value)):
                factor, of = (1, None) if isinstance(size, int) else size.as_coeff_Mul()
                if of == dim:
                    return result.call_function(extent, (operand(value), axis, int(factor)))
        raise ValueError(f"no operand has {dim} on an axis")

    for call in part:
        for value in _operands(call):
            if value not in inside:
                operand(value)
    for call in part:
        args, kwargs = _mapped((call.args, call.kwargs), made.__getitem__)
        made[call] = result.call_function(call.target, tuple(sized(args)), {k: sized(v) for k, v in kwargs.items()})
        made[call].meta |= {"type": call.dtype, "shape": call.shape}
    result.output(tuple(made[call] for call in results))
    result.eliminate_dead_code()  # widened operands of products that take them narrow
    for node in result.nodes:
        if node.op == "call_function":
            node.target = code.get(node.target, node.target)
    key.append(_text(result))
    module = fx.GraphModule(torch.nn.Module(), result)
    varying = tuple(
        (i, axis)
        for i, value in enumerate(operands)
        for axis, size in enumerate(lowering.shape(value))
        if not isinstance(size, int)
    )
    names = tuple(value.name for value in operands), tuple(value.name for value in results)
    return CompiledPart(module, tuple(key), *names, varying, compiled=not part[0].attends)


def extent(x: torch.Tensor, axis: int, factor: int) -> int:
    """The dim of which axis ``axis`` of ``x`` has ``factor`` times as many elements."""
    return x.shape[axis] // factor


def _text(graph: fx.Graph) -> str:
    """Equal for graphs that are the same function: every operation with its operands, by their order."""
    names = {node: f"%{i}" for i, node in enumerate(graph.nodes)}

    def said(node: fx.Node) -> str:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: names[n])
        target = node.target
        unique = f"{target} {id(target)}" if callable(target) else str(target)
        return f"{node.op} {unique if node.op == 'call_function' else ''} {args} {kwargs}"

    return "\n".join(said(node) for node in graph.nodes)


def _narrow_product(node: Node, kernels: Collection[str]) -> tuple[Callable[..., Any], list[Any]] | None:
    """The function that computes the linear ``node`` on operands as they are stored, with these operands; or None."""
    if not is_op(node, aten.linear.default):
        return None
    x, weight, *bias = node.args
    if is_op(x, ops.DEQUANTIZE) and is_op(weight, ops.DEQUANTIZE):
        (x, x_scale, dtype), (weight, w_scale, _) = x.args, weight.args
        return scaled_linear, [x, x_scale, weight, w_scale, dtype, *bias]
    if W4A16 in kernels and is_op(weight, ops.DEQUANTIZE_GROUPS):
        packed, scale = weight.args
        columns, groups = spec_of(packed).shape[1], spec_of(scale).shape[1]
        if spec_of(x).rank == 2 and spec_of(x).dtype == torch.bfloat16 and columns == GROUP * groups:
            return packed_linear, [x, packed, scale, *bias]
    return None
