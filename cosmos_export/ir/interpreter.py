"""Run a graph or a program on the CPU, operation by operation, with real weights. The reference for every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from cosmos_export.ir import ops
from cosmos_export.ir import packing as packs
from cosmos_export.ir.dims import bind, evaluate
from cosmos_export.ir.graph import Graph, Node, map_operands, spec_of, specs_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import E2M1, INT4, Packing, Part, Transform, WeightBinding, WeightSource

FOUR_BIT = frozenset({INT4, E2M1})
"""Types that weights may have and torch has no tensors of; see `read_weights`."""

Tensors = Mapping[str, torch.Tensor]
Weights = Callable[[WeightBinding], torch.Tensor]
Observe = Callable[[Node, Mapping[Node, torch.Tensor]], None]
"""An operation that has run, and the values at hand: its operands and its result among them."""
Follow = Callable[[Node, Mapping[Node, torch.Tensor]], torch.Tensor | None]
"""An operation that is to run, and the values at hand: its result from elsewhere, or None where it is computed."""


def weight_norm(magnitudes: torch.Tensor, directions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a weight that is stored as magnitudes and directions, computed in ``dtype`` by torch's own function."""
    return torch._weight_norm(directions.to(dtype), magnitudes.to(dtype), 0)


def read_weights(read: Callable[[WeightSource], torch.Tensor]) -> Weights:
    """Values of bindings from ``read``, which gives the tensor of one source.

    4-bit numbers come as whole numbers in int8 and as E2M1 numbers in float32: torch has no arithmetic on them.
    """

    def source_value(source: WeightSource) -> torch.Tensor:
        tensor = read(source)
        return tensor if source.scale is None else tensor.to(torch.float32) * read(source.scale).to(torch.float32)

    def value(binding: WeightBinding) -> torch.Tensor:
        if binding.keeps_bytes and binding.packing is not None and binding.packing.part is Part.SCALE:
            return kept_scale(binding, read)
        parts = [read(s) if binding.keeps_bytes else source_value(s) for s in binding.sources]
        if binding.transform is Transform.CONCATENATE:
            result = torch.cat(parts, dim=0)
        elif binding.transform is Transform.INTERLEAVE:
            result = torch.stack(parts, dim=1).flatten(0, 1)
        elif binding.transform is Transform.WEIGHT_NORM:
            result = weight_norm(parts[0], parts[1], binding.dtype)
        elif binding.transform is Transform.SCALE:
            result = parts[0].to(torch.float32) * parts[1].to(torch.float32)
        else:
            result = parts[0]
        if binding.packing is None or binding.keeps_bytes:
            return result.to(binding.dtype)
        rows = result.to(torch.float32)
        del parts, result  # a weight is large, and packing it takes another copy
        if binding.packing.divisor is not None:
            rows = rows / read(binding.packing.divisor).to(torch.float32)
        if binding.packing.low_rank is not None:
            up = [as_multiplied(read(source), binding.packing) for source in binding.packing.low_rank.up]
            together = binding.transform is Transform.INTERLEAVE
            whole = torch.stack(up, dim=1).flatten(0, 1) if together else torch.cat(up)
            rows = rows - whole @ as_multiplied(read(binding.packing.low_rank.down), binding.packing)
        return pack_rows(binding.packing, rows, tensor_scale(binding.packing, packs.largest(rows)))

    return value


def as_multiplied(half: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Half of a part of low rank, as float32, with the rounding that it has in the product."""
    return half.to(packing.dtype).to(torch.float32)


def kept_scale(binding: WeightBinding, read: Callable[[WeightSource], torch.Tensor]) -> torch.Tensor:
    """The scale of a weight whose bytes are kept: that of its source, or for several one of each row, float32 [N]."""
    stored = [source.scale for source in binding.sources if source.scale is not None]
    scales = [read(scale).to(torch.float32).reshape(()) for scale in stored]
    if len(scales) == 1:
        return scales[0]
    if binding.transform is Transform.INTERLEAVE:
        return torch.stack(scales).repeat(binding.sources[0].shape[0])
    return torch.cat([scale.expand(source.shape[0]) for scale, source in zip(scales, binding.sources, strict=True)])


def tensor_scale(packing: Packing, amax: torch.Tensor) -> torch.Tensor:
    """The float32 scale of a packed weight whose largest magnitude is ``amax``; 1 where its rows have their own."""
    return torch.ones(()) if packing.format.tensor_scale is None else packing.format.tensor_scale(amax)


def pack_rows(packing: Packing, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One tensor of the packed form of float32 ``rows`` [n, K] of a weight whose `tensor_scale` is ``scale``."""
    if packing.part is Part.SCALE and not packing.format.local:
        return scale
    form = packing.format
    own = scale if form.row_scales is None else form.row_scales(rows, scale, packing.group, packing.dtype)
    return form.numbers(rows, scale, own) if packing.part is Part.VALUES else own


def run_graph(
    graph: Graph,
    inputs: Tensors,
    weights: Weights,
    binding: Mapping[str, int] | None = None,
    *,
    compute: torch.dtype | None = None,
    observe: Observe | None = None,
    follow: Follow | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs of ``graph``. Checks inputs and every result against their specs.

    ``binding`` gives dims that no input shows. ``compute`` replaces bfloat16 in every value, so that a low-precision
    program can be compared with an fp32 reference. ``observe`` sees every operation once it has run; ``follow`` may
    give the result of one in its place. Raises ValueError where an input does not fit.
    """
    widen = _Widen(compute)
    known = dict(binding or {})
    shapes = []
    for name, node in graph.inputs.items():
        if name not in inputs:
            raise ValueError(f"graph `{graph.name}` needs the input `{name}`")
        spec = spec_of(node)
        if inputs[name].dtype != widen(spec.dtype):
            raise ValueError(f"`{name}` is {inputs[name].dtype}, expected {widen(spec.dtype)}")
        shapes.append((name, spec.shape, tuple(inputs[name].shape)))
    known.update(bind(shapes))
    last_use = {n: user for user in graph.nodes for n in user.all_input_nodes}
    kept = set(graph.outputs.values())
    values: dict[Node, torch.Tensor] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if "weight" in node.meta and node not in kept:
                continue  # read where it is used: a graph lists all of its weights before what it does with them
            for operand in node.all_input_nodes:
                if operand not in values:
                    values[operand] = _value(operand, inputs, weights, known, values, widen)
            given = follow(node, values) if follow is not None and node.op == "call_function" else None
            values[node] = _value(node, inputs, weights, known, values, widen) if given is None else given
            if observe is not None and node.op == "call_function":
                observe(node, values)
            for operand in node.all_input_nodes:
                if last_use[operand] is node and operand not in kept:
                    values.pop(operand, None)
    return {name: values[node] for name, node in graph.outputs.items()}


class _Widen:
    """The type in which a value of a type is computed."""

    def __init__(self, compute: torch.dtype | None) -> None:
        self._compute = compute

    def __call__(self, dtype: torch.dtype) -> torch.dtype:
        return self._compute if self._compute is not None and dtype == torch.bfloat16 else dtype


def _value(
    node: Node,
    inputs: Tensors,
    weights: Weights,
    binding: Mapping[str, int],
    values: Mapping[Node, torch.Tensor],
    widen: _Widen,
) -> Any:
    if "weight" in node.meta:
        value, wanted = weights(node.meta["weight"]), widen(spec_of(node).dtype)
        return value if wanted in FOUR_BIT or _looked_up(node) else value.to(wanted)
    if "constant" in node.meta:
        constant = node.meta["constant"]
        assert isinstance(constant, torch.Tensor)
        return constant
    if node.op == "placeholder":
        return inputs[node.name]

    result = _call(node, binding, values, widen)
    specs = specs_of(node)
    pairs = zip(specs, result, strict=True) if isinstance(specs, tuple) else [(specs, result)]
    for spec, one in pairs:
        expected = tuple(evaluate(s, binding) for s in spec.shape)
        if tuple(one.shape) != expected or one.dtype != widen(spec.dtype):
            raise ValueError(f"`{node.name}` gave {one.dtype}{tuple(one.shape)}, its spec says {spec}")
    return result


def _call(node: Node, binding: Mapping[str, int], values: Mapping[Node, torch.Tensor], widen: _Widen) -> Any:
    """The value of an operation; a tuple for one that has several results."""

    def concrete(value: Any) -> Any:
        if isinstance(value, sympy.Expr):
            return evaluate(value, binding)
        if isinstance(value, (tuple, list)):
            return [concrete(v) for v in value]
        return widen(value) if isinstance(value, torch.dtype) else value

    args, kwargs = (map_operands(operands, values.__getitem__) for operands in (node.args, node.kwargs))
    result = ops.OPERATIONS[node.target].reference(*concrete(args), **{k: concrete(v) for k, v in kwargs.items()})
    # A table is read as it is stored, and its rows are widened: a vocabulary has more of them than a step reads.
    return result.to(widen(result.dtype)) if node.target is ops.aten.embedding.default else result


def _looked_up(node: Node) -> bool:
    """Whether only rows of this weight are read."""
    return bool(node.users) and all(
        user.target is ops.aten.embedding.default and user.args[0] is node for user in node.users
    )


def compute_value(
    node: Node, weights: Weights, values: Mapping[Node, torch.Tensor], compute: torch.dtype | None = None
) -> torch.Tensor:
    """The value of one weight, constant or operation without symbolic dims, from those of its operands.

    Its shape is not checked: ``values`` may have any number of rows.
    """
    widen = _Widen(compute)
    if node.op == "placeholder":
        known: torch.Tensor = _value(node, {}, weights, {}, values, widen)
        return known
    result: torch.Tensor = _call(node, {}, values, widen)
    return result


def program_dims(program: Program, inputs: Tensors) -> dict[str, int]:
    """The dims that ``inputs`` of the program's graphs show."""
    shapes = [
        (name, spec_of(node).shape, tuple(inputs[name].shape))
        for graph in program.graphs.values()
        for name, node in graph.inputs.items()
        if name in inputs
    ]
    return bind(shapes)


def run_program(
    program: Program,
    inputs: Tensors,
    weights: Weights,
    *,
    compute: torch.dtype | None = None,
    observe: Observe | None = None,
    follow: Follow | None = None,
) -> dict[str, torch.Tensor]:
    """One pass through the program's graphs in order: the step of the loop for the given inputs.

    A graph that an edge wants as another instance runs once more, on the inputs that carry the instance's prefix.
    Returns the outputs of the loop body.
    """
    binding = program_dims(program, inputs)
    results: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, graph in program.graphs.items():
        fed = {e.input: results[e.source, e.instance][e.output] for e in program.edges_into(name)}
        for instance in program.instances(name):
            prefix = f"{instance}_" if instance else ""
            supplied = {i: inputs[prefix + i] for i in program.free_inputs(name) if prefix + i in inputs}
            given = {**supplied, **fed}
            run = run_graph(graph, given, weights, binding, compute=compute, observe=observe, follow=follow)
            results[name, instance] = run
    return results[program.loop.body, ""]


def run_loop(
    program: Program, inputs: Tensors, rows: Tensors, weights: Weights, *, compute: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The closed loop of ``program``: every step of it, the reference for what it is lowered to.

    ``rows`` holds its step inputs for each of its steps, [steps, …]. Returns what the loop returns of the carried
    values, by the name of their input. Raises ValueError where ``inputs`` lacks a value that the loop takes.
    """
    loop, body = program.loop, program.graphs[program.loop.body]
    zeros = [name for name in loop.carried if name not in loop.taken]
    known = {name: value for name, value in inputs.items() if name not in zeros}
    shapes = [(n, spec_of(node).shape, tuple(known[n].shape)) for n, node in body.inputs.items() if n in known]
    binding = bind(shapes)
    for name in zeros:
        spec = spec_of(body.inputs[name])
        known[name] = torch.zeros([evaluate(s, binding) for s in spec.shape], dtype=spec.dtype)
    for step in range(loop.steps or 0):
        known |= {name: rows[name][step] for name in loop.rows}
        results = run_graph(body, known, weights, binding, compute=compute)
        known |= {name: results[next_name] for name, next_name in loop.carried.items()}
    return {name: known[name] for name in loop.returned}
