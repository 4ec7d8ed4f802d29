"""Run a graph or a program on the CPU, operation by operation, with real weights. The reference for every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.node import map_arg

from cosmos_export.ir import ops
from cosmos_export.ir.dims import bind, evaluate
from cosmos_export.ir.graph import Graph, Node, spec_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Transform, WeightBinding, WeightSource

Tensors = Mapping[str, torch.Tensor]
Weights = Callable[[WeightBinding], torch.Tensor]

_NATIVE: dict[Any, Callable[..., torch.Tensor]] = {
    # These carry their type as an argument in the IR but not in ATen's overload.
    ops.aten._to_copy.default: lambda x, dtype: x.to(dtype),
    ops.aten.view.default: lambda x, shape: x.reshape(shape),
    ops.aten.full.default: lambda size, value, dtype: torch.full(size, value, dtype=dtype),
}


def read_weights(read: Callable[[WeightSource], torch.Tensor]) -> Weights:
    """Values of bindings from ``read``, which gives the tensor of one source."""

    def value(binding: WeightBinding) -> torch.Tensor:
        parts = [read(source) for source in binding.sources]
        if binding.transform is Transform.CONCATENATE:
            result = torch.cat(parts, dim=0)
        elif binding.transform is Transform.INTERLEAVE:
            result = torch.stack(parts, dim=1).flatten(0, 1)
        else:
            result = parts[0]
        return result.to(binding.dtype)

    return value


def run_graph(
    graph: Graph,
    inputs: Tensors,
    weights: Weights,
    binding: Mapping[str, int] | None = None,
    *,
    compute: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs of ``graph``. Checks inputs and every result against their specs.

    ``binding`` gives dims that no input shows. ``compute`` replaces bfloat16 in every value, so that a low-precision
    program can be compared with an fp32 reference. Raises ValueError where an input does not fit.
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
            values[node] = _value(node, inputs, weights, known, values, widen)
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
) -> torch.Tensor:
    if "weight" in node.meta:
        return weights(node.meta["weight"]).to(widen(spec_of(node).dtype))
    if "constant" in node.meta:
        constant = node.meta["constant"]
        assert isinstance(constant, torch.Tensor)
        return constant
    if node.op == "placeholder":
        return inputs[node.name]

    def concrete(value: Any) -> Any:
        if isinstance(value, sympy.Expr):
            return evaluate(value, binding)
        if isinstance(value, (tuple, list)):
            return type(value)(concrete(v) for v in value)
        return widen(value) if isinstance(value, torch.dtype) else value

    args = concrete(map_arg(node.args, lambda n: values[n]))
    kwargs = {k: concrete(v) for k, v in map_arg(node.kwargs, lambda n: values[n]).items()}
    function = _NATIVE.get(node.target, node.target)
    result = function(*args, **kwargs)  # type: ignore[operator]
    spec = spec_of(node)
    expected = tuple(evaluate(s, binding) for s in spec.shape)
    if tuple(result.shape) != expected or result.dtype != widen(spec.dtype):
        raise ValueError(f"`{node.name}` gave {result.dtype}{tuple(result.shape)}, its spec says {spec}")
    assert isinstance(result, torch.Tensor)
    return result


def run_program(
    program: Program, inputs: Tensors, weights: Weights, *, compute: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """One pass through the program's graphs in order: the step of the loop for the given inputs.

    Returns the outputs of the loop body.
    """
    shapes = [
        (name, spec_of(node).shape, tuple(inputs[name].shape))
        for graph in program.graphs.values()
        for name, node in graph.inputs.items()
        if name in inputs
    ]
    binding = bind(shapes)
    results: dict[str, dict[str, torch.Tensor]] = {}
    for name, graph in program.graphs.items():
        fed = {e.input: results[e.source][e.output] for e in program.edges_into(name)}
        supplied = {i: inputs[i] for i in program.free_inputs(name)}
        results[name] = run_graph(graph, {**supplied, **fed}, weights, binding, compute=compute)
    return results[program.loop.body]
