"""The inductor backend: graphs after all passes as compiled torch code, and on a GPU as captured CUDA graphs.

A graph is specialised to the sizes of one call. What the compiler can fuse (norms, rotation, gates, the sampler) is
written as plain tensor code, attention stays whole; `torch.compile` makes fused kernels of the rest. On a GPU the
compiled function is captured when sizes come again, and replayed: a replay has no work on the host; a closed loop is
captured with all its steps. Weights are arguments, not constants of the code: one copy on the device serves every size.
This project's kernels take the place of what they compute where `Settings` names them (`fusions`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Shape, Size, bind, simplify
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.kernels.description import W4A16
from cosmos_export.targets.inductor.fusions import fuse

GROUP = 128
"""Columns that a scale of the INT4 kernel covers."""
_WARM_UP = 2
_CAPTURES = 2
"""Captured graphs that an executable keeps, one for each set of sizes: a prompt and its negative one have two."""
_SIZES = 256
"""Sizes that an executable remembers to have checked."""
Function = Callable[..., dict[str, torch.Tensor]]
Sizes = tuple[tuple[str, tuple[int, ...]], ...]

# -- operations as code the compiler sees through ----------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    normal = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normal.to(weight.dtype) * weight


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Halves instead of a rotated copy: the compiler reads x once.
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * c + -second * s, second * c + first * s), dim=-1)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    q, k, v = (t.unsqueeze(0).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).squeeze(0)


def concatenated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Joint attention by PyTorch's own kernels. The copy of K/V is below 1 % of the attention at 480p."""
    keys, values = torch.cat((key, prefix_key)), torch.cat((value, prefix_value))
    return attention(query, keys, values, False, scale)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.to(torch.float32) / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def dequantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.to(torch.float32) * (scale if scale.dim() == 0 else scale.unsqueeze(-1))).to(dtype)


def dequantize_groups(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """INT4 as it is stored, two numbers a byte, the first in the low half: uint8 [N, K / 2]."""
    wide = packed.to(torch.int16)
    numbers = torch.stack((wide & 15, wide >> 4), dim=-1).flatten(1)
    signed = torch.where(numbers > 7, numbers - 16, numbers).to(scale.dtype)
    rows, columns = signed.shape
    return (signed.view(rows, scale.shape[1], -1) * scale.unsqueeze(-1)).view(rows, columns)


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``linear(dequantize(x), dequantize(weight))`` as one FP8 product; E4M3 operands, ``x_scale`` of one number,
    ``w_scale`` too or [N] with one for each output.

    cuBLASLt takes sides that are multiples of 16; the others are widened.
    """
    if any(side % 16 for side in weight.shape) or dtype != torch.bfloat16 or x.dim() != 2:
        return F.linear(dequantize(x, x_scale, dtype), dequantize(weight, w_scale, dtype), bias)
    fast, x = x.device.type == "cuda", x.contiguous()
    if w_scale.dim():  # the library scales rows of both operands, or neither's
        x_scale, w_scale = x_scale.expand(x.shape[0], 1).contiguous(), w_scale.unsqueeze(0)
    result: torch.Tensor = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )
    return result


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A product with INT4 weights by our kernel, which dequantizes in registers; bf16 rows, groups of 128."""
    from cosmos_export.kernels import operators

    result: torch.Tensor = operators.gemm_w4a16(x, packed, scale)
    return result if bias is None else result + bias


def along_rows(x: torch.Tensor, narrow: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``narrow(x)`` of [N, heads, d] with neighbouring rows side by side, every head from a multiple of 16 on: what FP8
    matrix units want of values, and what lets a kernel load more than a byte at a time."""
    rows = x.shape[0]
    padded = F.pad(x.permute(1, 2, 0), (0, 16 - rows % 16)).contiguous()  # never by none: that is other code
    return narrow(padded)[..., :rows].permute(2, 0, 1)


def narrow_values(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values in E4M3 as our attention's second product wants them."""
    return along_rows(x, lambda wide: quantize(wide, scale))


ATTENTIONS = ("sdpa", "triton")
"""``sdpa``: PyTorch's choice of cuDNN and flash attention; ``triton``: our kernel, which makes no copy of K/V."""


def _joint(kind: str) -> Callable[..., torch.Tensor]:
    if kind == "sdpa":
        return concatenated
    if kind == "triton":
        from cosmos_export.kernels import operators

        return operators.joint_attention
    raise ValueError(f"attention {kind!r} is not one of {', '.join(ATTENTIONS)}")


def _implementations(kind: str) -> dict[Any, Callable[..., Any]]:
    return {
        ops.RMS_NORM: rms_norm,
        ops.ROTARY: rotary,
        ops.SWIGLU: swiglu,
        ops.ATTENTION: attention,
        ops.JOINT_ATTENTION: _joint(kind),
        ops.QUANTIZE: quantize,
        ops.DEQUANTIZE: dequantize,
        ops.DEQUANTIZE_GROUPS: dequantize_groups,
        # These carry their type as an argument in the IR but not in ATen's overload.
        aten._to_copy.default: lambda x, dtype: x.to(dtype),
        aten.view.default: lambda x, shape: x.reshape(shape),
    }


@dataclass(frozen=True)
class Settings:
    """How graphs are compiled and run."""

    attention: str = "sdpa"
    compiled: bool = True
    """False: the graph's operations one after another, for comparison."""
    captured: bool = True
    """Replay CUDA graphs, on a GPU."""
    whole_loop: bool = True
    """All steps of a closed loop are one CUDA graph; otherwise one step is, replayed as often."""
    kernels: frozenset[str] = frozenset()
    """Which of `KERNELS` compute, where a graph has what they do. None has been measured to win: none by default."""
    open_dims: frozenset[str] = frozenset()
    """Dims that differ from call to call, as the length of a prompt does: compiled code takes every value of them."""


# -- specialising ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
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

    chunks: tuple[Chunk, ...]
    outputs: Mapping[str, str]
    """Output of the graph → the value that it is."""


@dataclass(eq=False)
class _Call:
    """An operation whose sizes are known but for those of open dims; operands are calls and placeholders."""

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
    settings: Settings | None = None,
    device: torch.device | None = None,
) -> Specialised:
    """``graph`` for inputs of ``sizes``, cut before and after every attention: it is a kernel of its own anyway.

    The layers of a model are then the same few chunks over and over, and compiling takes as long as for one layer.
    Chunks are right for every value of ``settings.open_dims``; those between the attentions of a generator depend on
    its prompt only where they quantize its keys and values. ValueError where sizes contradict each other or the graph.
    """
    settings = settings or Settings()
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
    implementations = _implementations(settings.attention)
    chunks = []
    for number, part in enumerate(parts):
        results = [call for call in part if call in kept or read_in.get(call, set()) - {number}]
        if results:
            chunks.append(_chunk(part, results, lowering, implementations, settings.kernels))
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

    def __init__(self, graph: Graph, closed: Mapping[str, int], settings: Settings, device: torch.device) -> None:
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
        spec = spec_of(node)
        dtype, shape = spec.dtype, tuple(self.size(s) for s in spec.shape)
        product = _narrow_product(node, self.settings.kernels)
        if product is not None:
            function, operands = product
            return self._add(node.name, function, self._concrete(operands), dtype, shape)
        args = self._concrete(node.args)
        kwargs = {k: self._concrete(v) for k, v in node.kwargs.items()}
        if node.target in (aten.full.default, aten.arange.start):
            kwargs["device"] = _DEVICE  # new values appear where the others are
        if node.target is ops.JOINT_ATTENTION_FP8 and self._own_fp8:
            *operands, scales, scale = args
            return self._fp8_attention(node.name, operands, scales, scale)
        attends = node.target in (ops.ATTENTION, ops.JOINT_ATTENTION, ops.JOINT_ATTENTION_FP8)
        return self._add(node.name, node.target, args, dtype, shape, kwargs, attends=attends)

    def _fp8_attention(self, name: str, wide: Sequence[_Operand], scales: _Operand, scale: float) -> _Call:
        """`ops.joint_attention_fp8` of query, keys and values by our kernel: PyTorch has none."""
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
    implementations: Mapping[Any, Callable[..., Any]],
    kernels: Collection[str],
) -> Chunk:
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
    fuse(result, kernels)
    for node in result.nodes:
        if node.op == "call_function":
            node.target = implementations.get(node.target, node.target)
    key.append(_text(result))
    module = fx.GraphModule(torch.nn.Module(), result)
    varying = tuple(
        (i, axis)
        for i, value in enumerate(operands)
        for axis, size in enumerate(lowering.shape(value))
        if not isinstance(size, int)
    )
    names = tuple(value.name for value in operands), tuple(value.name for value in results)
    return Chunk(module, tuple(key), *names, varying, compiled=not part[0].attends)


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
    """What computes ``node`` on operands as they are stored, and these, where it is a linear that something does."""
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


class Executable:
    """A graph with its weights on one device, compiled for the sizes it is called with, but for those of open dims."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        settings: Settings | None = None,
    ) -> None:
        self.graph = graph
        self.device = device
        self.settings = settings or Settings()
        self._fixed = {name: weights[name] for name in graph.weights}
        self._fixed |= {name: node.meta["constant"].to(device) for name, node in graph.constants.items()}
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._plains: dict[Any, Function] = {}
        self._plain_of: dict[Sizes, Function] = {}
        self._captured: dict[tuple[Any, Sizes], Captured] = {}
        self._too_large: set[tuple[Any, Sizes]] = set()
        self._seen: list[tuple[Any, Sizes]] = []

    @property
    def inputs(self) -> dict[str, torch.dtype]:
        return {name: spec_of(node).dtype for name, node in self.graph.inputs.items()}

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object] | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs by name. ``inputs`` are on the device and of the graph's types.

        ``tokens`` names what an input's value comes from, where that never changes: an input with the token of the last
        call is not read again. What a captured graph returns is overwritten by its next call.
        """
        sizes: Sizes = tuple((name, tuple(inputs[name].shape)) for name in self.graph.inputs)
        with torch.no_grad(), self._current():
            return self._run((None, sizes), self._plain(sizes), inputs, tokens or {})

    def loop(
        self, steps: Steps, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object] | None = None
    ) -> dict[str, torch.Tensor]:
        """Values of ``steps.returned`` after all of ``steps``. ``inputs``: of the carried state the first value, of
        rows those of every step, [steps, …]; ``tokens`` as for a call.
        """
        sizes: Sizes = tuple(
            (name, tuple(inputs[name].shape[1:] if name in steps.rows else inputs[name].shape))
            for name in self.graph.inputs
        )
        if self._captures and not self.settings.whole_loop:
            steady = {n: t for n, t in (tokens or {}).items() if n not in steps.rows and n not in steps.carried}
            return unrolled(lambda now: self(now, steady), steps)(inputs)
        with torch.no_grad(), self._current():
            body = self._plain(sizes)
            once = unrolled(body, replace(steps, count=1))
            return self._run((steps.key, sizes), unrolled(body, steps), inputs, tokens or {}, once)

    def _run(
        self,
        key: tuple[Any, Sizes],
        function: Function,
        inputs: Mapping[str, torch.Tensor],
        tokens: Mapping[str, object],
        warm: Function | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sizes that come again are captured: those of a prompt whose length no other has are not worth it."""
        if key in self._captured:
            return self._captured[key](inputs, tokens)
        if self._captures and key in self._seen and key not in self._too_large:
            self._make_room(_CAPTURES - 1)
            example = {name: inputs[name] for name in self.graph.inputs}
            try:
                self._captured[key] = Captured(function, example, warm)
                return self._captured[key](inputs, tokens)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                self._too_large.add(key)  # what is captured has memory of its own beside the rest
        self._seen = [*self._seen, key][-_CAPTURES:]
        try:
            return function(inputs)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
            self._make_room(0)
        return function(inputs)

    def _make_room(self, most: int) -> None:
        """Keep ``most`` captured graphs, the newest: each holds its own activations, gigabytes at 720p."""
        while len(self._captured) > most:
            del self._captured[next(iter(self._captured))]
        if not most and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _current(self) -> AbstractContextManager[Any]:
        """Streams, graphs and Triton's launches are those of the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @property
    def _captures(self) -> bool:
        return self.device.type == "cuda" and self.settings.captured

    def _plain(self, sizes: Sizes) -> Function:
        """The graph for ``sizes`` and every other value of the open dims. ValueError as from `specialise`."""
        if sizes not in self._plain_of:
            binding = bind((name, spec_of(self.graph.inputs[name]).shape, shape) for name, shape in sizes)
            key = tuple((name, value) for name, value in binding.items() if name not in self.settings.open_dims)
            if key not in self._plains:
                self._plains[key] = self._specialised(sizes)
            if len(self._plain_of) >= _SIZES:
                self._plain_of.clear()
            self._plain_of[sizes] = self._plains[key]
        return self._plain_of[sizes]

    def _specialised(self, sizes: Sizes) -> Function:
        found = specialise(self.graph, dict(sizes), self.settings, self.device)
        steps = [(self._code(chunk), chunk.operands, chunk.results) for chunk in found.chunks]
        last = {name: i for i, (_, operands, _) in enumerate(steps) for name in operands}
        fixed, device, outputs = self._fixed, self.device, found.outputs  # not self: nothing is to be held in a cycle
        dead = [
            [n for n in operands if last[n] == i and n not in fixed and n not in outputs.values()]
            for i, (_, operands, _) in enumerate(steps)
        ]

        def plain(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            values = {**fixed, **given}
            for (code, operands, results), gone in zip(steps, dead, strict=True):
                made = code(device, *(values[name] for name in operands))
                values.update(zip(results, made, strict=True))
                for name in gone:
                    del values[name]
            return {name: values[node] for name, node in outputs.items()}

        return plain

    def _code(self, chunk: Chunk) -> Callable[..., Any]:
        if not self.settings.compiled or not chunk.compiled:
            return chunk.module
        if chunk.key not in self._compiled:
            self._compiled[chunk.key] = _compile(chunk)
        return self._compiled[chunk.key]


def _out_of_memory(error: BaseException | None) -> bool:
    """Also where the end of a capture has hidden it."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or _out_of_memory(error.__context__))


def _compile(chunk: Chunk) -> Callable[..., Any]:
    compiled = torch.compile(chunk.module, dynamic=False, fullgraph=True)
    if not chunk.open:
        return compiled

    def marked(device: torch.device, *operands: torch.Tensor) -> Any:
        for index, axis in chunk.open:
            torch._dynamo.maybe_mark_dynamic(operands[index], axis)
        return compiled(device, *operands)

    return marked


@dataclass(frozen=True)
class Steps:
    """A closed loop over a graph."""

    count: int
    carried: Mapping[str, str]
    """Input → output that is its value in the next step."""
    rows: tuple[str, ...]
    """Inputs that are given for all steps, [steps, …]."""
    returned: tuple[str, ...]
    """The carried inputs whose last value is wanted."""

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.count, tuple(self.carried.items()), self.rows, self.returned)


def unrolled(body: Function, steps: Steps) -> Function:
    """All of ``steps`` as one function of what the loop is given; captured, it is one CUDA graph."""

    def run(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {name: given[name] for name in steps.rows}
        state = {name: given[name] for name in steps.carried}
        steady = {name: t for name, t in given.items() if name not in rows and name not in state}
        for step in range(steps.count):
            made = body({**steady, **state, **{name: row[step] for name, row in rows.items()}})
            state = {name: made[result] for name, result in steps.carried.items()}
        return {name: state[name] for name in steps.returned}

    return run


class Captured:
    """A function of tensors as one CUDA graph, which reads its inputs from memory of its own.

    ``warm`` does in a shorter time all that must happen once before capture; None: the function itself.
    """

    def __init__(self, function: Function, example: Mapping[str, torch.Tensor], warm: Function | None = None) -> None:
        self._inputs = {name: t.clone() for name, t in example.items()}
        self._tokens: dict[str, object] = {}
        own = {t.untyped_storage().data_ptr() for t in self._inputs.values()}

        def apart(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            # A result that is an input handed through (the sampler's last velocity becomes the one before) would change
            # when the inputs of the next call are written.
            made = function(given)
            return {n: t.clone() if t.untyped_storage().data_ptr() in own else t for n, t in made.items()}

        self._replay, self._outputs = self._capture(apart, warm or function)

    def _capture(self, function: Function, warm: Function) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
        """What replays ``function`` on the inputs, and where its results are then."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # compilation, library handles and workspaces, before capture
                warm(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(self._inputs)
        return graph.replay, outputs

    def __call__(self, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object]) -> dict[str, torch.Tensor]:
        for name, own in self._inputs.items():
            token = tokens.get(name)
            if token is None or self._tokens.get(name) is not token:
                own.copy_(inputs[name])
            if token is not None:
                self._tokens[name] = token  # kept alive: its identity stays its own
            else:
                self._tokens.pop(name, None)
        self._replay()
        return self._outputs
