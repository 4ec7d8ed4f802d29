"""The inductor backend: graphs after all passes as compiled torch code, and on a GPU as captured CUDA graphs.

A graph is specialised to the sizes of one call. What the compiler can fuse (norms, rotation, gates, the sampler) is
written as plain tensor code, attention stays whole; `torch.compile` makes fused kernels of the rest. On a GPU the
compiled function is captured once for its sizes and replayed: a replay has no work on the host; a closed loop is
captured with all its steps. Weights are arguments, not constants of the code: one copy on the device serves every size.
Kernels of ours take the place of what they compute where `Settings` names them (`inductor_fusions`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from cosmos_export.ir import ops
from cosmos_export.ir.dims import bind, evaluate
from cosmos_export.ir.graph import Graph, Node, is_op, map_operands, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.kernels.description import W4A16
from cosmos_export.targets.inductor_fusions import fuse

GROUP = 128
"""Columns that a scale of the INT4 kernel covers."""
_WARM_UP = 2
_CAPTURES = 2
"""Captured graphs that an executable keeps, one for each set of sizes: a prompt and its negative one have two."""
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
    padded = F.pad(x.permute(1, 2, 0), (0, -rows % 16)).contiguous()
    return narrow(padded)[..., :rows].permute(2, 0, 1)


def quantized_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scales: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`ops.joint_attention_fp8` by our kernel; values are transposed as its matrix products want them."""
    from cosmos_export.kernels import operators

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return along_rows(x, lambda wide: quantize(wide, scales[2]))

    result: torch.Tensor = operators.joint_attention_fp8(
        quantize(query * scale, scales[0]), quantize(key, scales[1]), transposed(value),
        quantize(prefix_key, scales[1]), transposed(prefix_value), 1.0, scales,
    )  # fmt: skip
    return result.to(query.dtype)


def unit_scale(device: torch.device) -> torch.Tensor:
    """The scale of what is quantized without one."""
    return torch.ones((), device=device)


def joint_fp8(*operands: Any) -> torch.Tensor:
    """Our FP8 attention with scales of one; values are transposed as its matrix products want them."""
    from cosmos_export.kernels import operators

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return along_rows(x, narrow)

    query, key, value, prefix_key, prefix_value, scale = operands
    result: torch.Tensor = operators.joint_attention_fp8(
        narrow(query), narrow(key), transposed(value), narrow(prefix_key), transposed(prefix_value), scale,
        torch.ones(3, device=query.device),
    )  # fmt: skip
    return result.to(query.dtype)


ATTENTIONS = ("sdpa", "triton", "triton-fp8")
"""``sdpa``: PyTorch's choice of cuDNN and flash attention; ``triton``: our kernel, which makes no copy of K/V;
``triton-fp8``: the same on E4M3 operands with scales of one, for benchmarks of random weights."""


def _joint(kind: str) -> Callable[..., torch.Tensor]:
    if kind == "sdpa":
        return concatenated
    if kind == "triton":
        from cosmos_export.kernels import operators

        return operators.joint_attention
    if kind == "triton-fp8":
        return joint_fp8
    raise ValueError(f"attention {kind!r} is none of {', '.join(ATTENTIONS)}")


def _recipe_attention(kind: str) -> Callable[..., torch.Tensor]:
    """FP8 attention that a recipe asks for: our kernel, as PyTorch has none; on a CPU, where no kernel runs, the
    operation's own reference unless the kernel is asked for."""

    def choose(query: torch.Tensor, *operands: Any) -> torch.Tensor:
        own = query.device.type == "cuda" or kind != "sdpa"
        result: torch.Tensor = (quantized_attention if own else ops.JOINT_ATTENTION_FP8)(query, *operands)
        return result

    return choose


def _implementations(kind: str) -> dict[Any, Callable[..., Any]]:
    return {
        ops.JOINT_ATTENTION_FP8: _recipe_attention(kind),
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


# -- specialising ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A run of operations that is compiled as one function of its operands."""

    module: fx.GraphModule
    key: tuple[Any, ...]
    """Equal for chunks that are the same function of operands of the same types and shapes."""
    operands: tuple[str, ...]
    results: tuple[str, ...]


def specialise(
    graph: Graph,
    sizes: Mapping[str, tuple[int, ...]],
    attention_kind: str = "sdpa",
    narrow: Collection[str] = (),
    kernels: Collection[str] = (),
) -> list[Chunk]:
    """``graph`` for inputs of ``sizes``, cut in front of every attention: it is a kernel of its own anyway.

    The layers of a model are then the same few chunks over and over, and compiling takes as long as for one layer.
    ValueError where sizes contradict each other or the graph.
    """
    binding = bind((name, spec_of(node).shape, sizes[name]) for name, node in graph.inputs.items())
    implementations = _implementations(attention_kind)
    parts: list[list[Node]] = [[]]
    for node in graph.calls():
        if node.target in (ops.ATTENTION, ops.JOINT_ATTENTION, ops.JOINT_ATTENTION_FP8) and parts[-1]:
            parts.append([])
        parts[-1].append(node)
    read_by = {node: set(node.users) for node in graph.nodes}
    kept = set(graph.outputs.values())
    chunks = []
    names = frozenset(narrow)
    for part in parts:
        inside = set(part)
        results = [node for node in part if node in kept or read_by[node] - inside]
        if results:
            chunks.append(_chunk(part, results, binding, implementations, names, kernels))
    return chunks


def _chunk(
    part: list[Node],
    results: list[Node],
    binding: Mapping[str, int],
    implementations: Mapping[Any, Callable[..., Any]],
    narrow: frozenset[str],
    kernels: Collection[str],
) -> Chunk:
    result = fx.Graph()
    device = result.placeholder("device")
    made: dict[Node, fx.Node] = {}
    operands: list[Node] = []
    key: list[Any] = []

    def concrete(value: Any) -> Any:
        if isinstance(value, sympy.Expr):
            return evaluate(value, binding)
        if isinstance(value, (tuple, list)):
            return [concrete(v) for v in value]
        return value

    def describe(node: Node) -> None:
        spec = spec_of(node)
        made[node].meta |= {"type": spec.dtype, "shape": tuple(evaluate(s, binding) for s in spec.shape)}

    def operand(node: Node) -> fx.Node:
        if node not in made:
            made[node] = result.placeholder(f"operand_{len(operands)}")
            describe(node)
            operands.append(node)
            key.append((spec_of(node).dtype, *(evaluate(s, binding) for s in spec_of(node).shape)))
        return made[node]

    for node in part:
        product = _narrow_product(node, kernels)
        if product is not None:
            function, operands_of = product
            made[node] = result.call_function(function, tuple(concrete(map_operands(operands_of, operand))))
            describe(node)
            continue
        args = concrete(map_operands(node.args, operand))
        kwargs = {k: concrete(v) for k, v in map_operands(node.kwargs, operand).items()}
        if node.target in (aten.full.default, aten.arange.start):
            kwargs["device"] = device  # new values appear where the others are
        target = node.target
        if target is aten.linear.default and node.args[1].name in narrow:
            target, args = _narrowed(result, device, spec_of(node).dtype, args)
        made[node] = result.call_function(target, tuple(args), kwargs)
        describe(node)
    result.output(tuple(made[node] for node in results))
    result.eliminate_dead_code()  # widened operands of products that take them narrow
    fuse(result, kernels)
    for call in result.nodes:
        if call.op == "call_function":
            call.target = implementations.get(call.target, call.target)
    key.append(_text(result))
    module = fx.GraphModule(torch.nn.Module(), result)
    return Chunk(module, tuple(key), tuple(n.name for n in operands), tuple(n.name for n in results))


def _narrowed(
    graph: fx.Graph, device: fx.Node, dtype: torch.dtype, args: Sequence[Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """A linear of a weight that is given in E4M3, with scales of one, as a recipe would have it."""
    x, weight, *bias = args
    one = graph.call_function(unit_scale, (device,))
    one.meta |= {"type": torch.float32, "shape": ()}
    quantized = graph.call_function(ops.QUANTIZE, (x, one))
    quantized.meta |= {"type": torch.float8_e4m3fn, "shape": x.meta["shape"]}
    return scaled_linear, [quantized, one, weight, one, dtype, *bias]


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


@dataclass(frozen=True)
class Settings:
    """How graphs are compiled and run."""

    attention: str = "sdpa"
    compiled: bool = True
    """False: the graph's operations one after another, for comparison."""
    narrow: frozenset[str] = frozenset()
    """Weights that are given in E4M3: the linears that read them are W8A8 with scales of one. For benchmarks."""
    captured: bool = True
    """Replay CUDA graphs, on a GPU."""
    whole_loop: bool = True
    """All steps of a closed loop are one CUDA graph; otherwise one step is, replayed as often."""
    kernels: frozenset[str] = frozenset()
    """Which of `KERNELS` compute, where a graph has what they do. None has been measured to win: none by default."""


class Executable:
    """A graph with its weights on one device, compiled for each set of sizes it is called with."""

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
        self._functions: dict[Sizes, Function] = {}
        self._loops: dict[tuple[Any, Sizes], Function] = {}

    @property
    def inputs(self) -> dict[str, torch.dtype]:
        return {name: spec_of(node).dtype for name, node in self.graph.inputs.items()}

    @property
    def kinds(self) -> int:
        """Different functions that have been compiled."""
        return len(self._compiled)

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object] | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs by name. ``inputs`` are on the device and of the graph's types.

        ``tokens`` names what an input's value comes from, where that never changes: an input with the token of the last
        call is not read again. What a captured graph returns is overwritten by its next call.
        """
        sizes: Sizes = tuple((name, tuple(inputs[name].shape)) for name in self.graph.inputs)
        with torch.no_grad():
            if sizes not in self._functions:
                example = {name: inputs[name] for name in self.graph.inputs}
                plain = self._plain(sizes)
                self._make_room(self._functions)
                self._functions[sizes] = Captured(plain, example) if self._captures else plain
            return _call(self._functions[sizes], inputs, tokens or {})

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
        with torch.no_grad():
            key = (steps.key, sizes)
            if key not in self._loops:
                body = self._plain(sizes)
                whole = unrolled(body, steps)
                once = unrolled(body, replace(steps, count=1))
                example = {name: inputs[name] for name in self.graph.inputs}
                self._make_room(self._loops)
                self._loops[key] = Captured(whole, example, warm=once) if self._captures else whole
            return _call(self._loops[key], inputs, tokens or {})

    def _make_room(self, made: dict[Any, Function]) -> None:
        """Forget the oldest captured graphs: each holds the memory of its own activations, gigabytes at 720p."""
        while self._captures and len(made) >= _CAPTURES:
            del made[next(iter(made))]

    @property
    def _captures(self) -> bool:
        return self.device.type == "cuda" and self.settings.captured

    def _plain(self, sizes: Sizes) -> Function:
        settings = self.settings
        chunks = specialise(self.graph, dict(sizes), settings.attention, settings.narrow, settings.kernels)
        steps = [(self._code(chunk), chunk.operands, chunk.results) for chunk in chunks]
        last = {name: i for i, (_, operands, _) in enumerate(steps) for name in operands}
        outputs = {name: node.name for name, node in self.graph.outputs.items()}
        dead = [
            [n for n in operands if last[n] == i and n not in self._fixed and n not in outputs.values()]
            for i, (_, operands, _) in enumerate(steps)
        ]

        def plain(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            values = {**self._fixed, **given}
            for (code, operands, results), gone in zip(steps, dead, strict=True):
                made = code(self.device, *(values[name] for name in operands))
                values.update(zip(results, made, strict=True))
                for name in gone:
                    del values[name]
            return {name: values[node] for name, node in outputs.items()}

        return plain

    def _code(self, chunk: Chunk) -> Callable[..., Any]:
        if not self.settings.compiled:
            return chunk.module
        if chunk.key not in self._compiled:
            self._compiled[chunk.key] = torch.compile(chunk.module, dynamic=False, fullgraph=True)
        return self._compiled[chunk.key]


def _call(
    function: Function, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    return function(inputs, tokens) if isinstance(function, Captured) else function(inputs)


@dataclass(frozen=True)
class Steps:
    """A closed loop over a graph."""

    count: int
    carried: Mapping[str, str]
    """Input → output that is its value in the next step."""
    rows: tuple[str, ...]
    """Inputs that are given for all steps, [steps, …]."""
    returned: tuple[str, ...]
    """Of the carried inputs those whose last value is wanted."""

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
