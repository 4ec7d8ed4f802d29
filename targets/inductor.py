"""The inductor backend: graphs after all passes as compiled torch code, and on a GPU as captured CUDA graphs.

A graph is specialised to the sizes of one call. What the compiler can fuse (norms, rotation, gates, the sampler) is
written as plain tensor code, attention stays whole; `torch.compile` makes fused kernels of the rest. On a GPU the
compiled function is captured once for its sizes and replayed: a replay has no work on the host. Weights are arguments,
not constants of the code: one copy on the device serves every size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from cosmos_export.ir import ops
from cosmos_export.ir.dims import bind, evaluate
from cosmos_export.ir.graph import Graph, Node, is_op, map_operands, spec_of
from cosmos_export.ir.ops import aten

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
    return (x.to(torch.float32) * scale).to(dtype)


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
    """``linear(dequantize(x), dequantize(weight))`` as one FP8 product; E4M3 operands, scales of one number.

    cuBLASLt takes sides that are multiples of 16; the others are widened.
    """
    if any(side % 16 for side in weight.shape) or dtype != torch.bfloat16:
        return F.linear(dequantize(x, x_scale, dtype), dequantize(weight, w_scale, dtype), bias)
    fast = x.device.type == "cuda"
    result: torch.Tensor = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )
    return result


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """W8A8 with scales of one: cuBLASLt's product; the compiler fuses the quantization into what makes ``x``."""
    one = torch.ones((), device=x.device)
    narrow = x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    fast = x.device.type == "cuda"
    result: torch.Tensor = torch._scaled_mm(
        narrow, weight.t(), scale_a=one, scale_b=one, out_dtype=x.dtype, use_fast_accum=fast
    )
    return result if bias is None else result + bias


def joint_fp8(*operands: Any) -> torch.Tensor:
    """Our FP8 attention with scales of one; values are transposed as its matrix products want them."""
    from cosmos_export.kernels import operators

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return narrow(x).permute(1, 2, 0).contiguous().permute(2, 0, 1)

    query, key, value, prefix_key, prefix_value, scale = operands
    result: torch.Tensor = operators.joint_attention_fp8(
        narrow(query), narrow(key), transposed(value), narrow(prefix_key), transposed(prefix_value), scale
    )
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
) -> list[Chunk]:
    """``graph`` for inputs of ``sizes``, cut in front of every attention: it is a kernel of its own anyway.

    The layers of a model are then the same few chunks over and over, and compiling takes as long as for one layer.
    ValueError where sizes contradict each other or the graph.
    """
    binding = bind((name, spec_of(node).shape, sizes[name]) for name, node in graph.inputs.items())
    implementations = _implementations(attention_kind)
    parts: list[list[Node]] = [[]]
    for node in graph.calls():
        if node.target in (ops.ATTENTION, ops.JOINT_ATTENTION) and parts[-1]:
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
            chunks.append(_chunk(part, results, binding, implementations, names))
    return chunks


def _chunk(
    part: list[Node],
    results: list[Node],
    binding: Mapping[str, int],
    implementations: Mapping[Any, Callable[..., Any]],
    narrow: frozenset[str],
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

    def operand(node: Node) -> fx.Node:
        if node not in made:
            made[node] = result.placeholder(f"operand_{len(operands)}")
            operands.append(node)
            key.append((spec_of(node).dtype, *(evaluate(s, binding) for s in spec_of(node).shape)))
        return made[node]

    for node in part:
        scaled = _scaled_operands(node)
        if scaled is not None:
            made[node] = result.call_function(scaled_linear, tuple(concrete(map_operands(scaled, operand))))
            key.append((scaled_linear, str(made[node].args)))
            continue
        args = concrete(map_operands(node.args, operand))
        kwargs = {k: concrete(v) for k, v in map_operands(node.kwargs, operand).items()}
        if node.target in (aten.full.default, aten.arange.start):
            kwargs["device"] = device  # new values appear where the others are
        target = implementations.get(node.target, node.target)
        if node.target is aten.linear.default and node.args[1].name in narrow:
            target = fp8_linear
        made[node] = result.call_function(target, tuple(args), kwargs, name=f"value_{len(made)}")
        key.append((target, str(args), str(kwargs)))
    result.output(tuple(made[node] for node in results))
    key.append(tuple(made[node].name for node in results))
    module = fx.GraphModule(torch.nn.Module(), result)
    return Chunk(module, tuple(key), tuple(n.name for n in operands), tuple(n.name for n in results))


def _scaled_operands(node: Node) -> list[Any] | None:
    """Operands of `scaled_linear` where ``node`` is a linear of two dequantized values; None where it is not."""
    if not is_op(node, aten.linear.default) or not all(is_op(a, ops.DEQUANTIZE) for a in node.args[:2]):
        return None
    (x, x_scale, dtype), (weight, w_scale, _) = (a.args for a in node.args[:2])
    return [x, x_scale, weight, w_scale, dtype, *node.args[2:]]


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
                self._functions[sizes] = self._make(sizes, inputs)
            function = self._functions[sizes]
            return function(inputs, tokens or {}) if isinstance(function, Captured) else function(inputs)

    def _make(self, sizes: Sizes, inputs: Mapping[str, torch.Tensor]) -> Function:
        chunks = specialise(self.graph, dict(sizes), self.settings.attention, self.settings.narrow)
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

        if self.device.type != "cuda" or not self.settings.captured:
            return plain
        return Captured(plain, {name: inputs[name] for name in self.graph.inputs})

    def _code(self, chunk: Chunk) -> Callable[..., Any]:
        if not self.settings.compiled:
            return chunk.module
        if chunk.key not in self._compiled:
            self._compiled[chunk.key] = torch.compile(chunk.module, dynamic=False, fullgraph=True)
        return self._compiled[chunk.key]


class Captured:
    """A function of tensors as one CUDA graph, which reads its inputs from memory of its own."""

    def __init__(self, function: Function, example: Mapping[str, torch.Tensor], warm_up: int = 2) -> None:
        self._inputs = {name: t.clone() for name, t in example.items()}
        self._tokens: dict[str, object] = {}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):  # compilation, library handles and workspaces, before capture
                function(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(self._inputs)

    def __call__(self, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object]) -> dict[str, torch.Tensor]:
        for name, own in self._inputs.items():
            token = tokens.get(name)
            if token is None or self._tokens.get(name) is not token:
                own.copy_(inputs[name])
            if token is not None:
                self._tokens[name] = token  # kept alive: its identity stays its own
            else:
                self._tokens.pop(name, None)
        self._graph.replay()
        return self._outputs
