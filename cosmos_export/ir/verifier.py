"""Laws that every program keeps between two passes. A breach is a bug of the pass that ran last."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NoReturn

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import equal, symbol
from cosmos_export.ir.graph import Graph, Node, Specs, infer, is_input, is_weight, spec_of, specs_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import TensorSpec


def verify(program: Program, *, stage: str = "", forbidden: Iterable[object] = ()) -> None:
    """Check every law of the IR.

    * each operation is in the dialect and none is in ``forbidden`` (operations an earlier pass must have removed);
    * types and shapes follow from the operands;
    * each weight is bound to data of its shape, is read, and is bound under one name in a graph;
    * each edge joins an output to an input of equal type and shape, and none runs backwards: no value of the reasoner
      follows from a value of the generator;
    * the loop's carried values are inputs and outputs of its body, or of the pieces it was cut into, and it takes and
      returns no others.

    Raises InternalError (CX201) naming the first offending node.
    """
    gone = frozenset(forbidden)
    for graph in program.graphs.values():
        _verify_graph(program, graph, gone, stage)
    order = list(program.graphs)
    for edge in program.edges:
        where = f"edge {edge.source}.{edge.output} → {edge.target}.{edge.input}"
        if edge.source not in program.graphs or edge.target not in program.graphs:
            _fail(stage, where, "names a graph that is not there")
        source = program.graphs[edge.source].outputs.get(edge.output)
        target = program.graphs[edge.target].inputs.get(edge.input)
        if source is None or target is None:
            _fail(stage, where, "names a value that is not there")
        if not _same(_in_instance(spec_of(source), edge.instance, program.dims), spec_of(target)):
            _fail(stage, where, f"joins {spec_of(source)} to {spec_of(target)}")
        if order.index(edge.source) >= order.index(edge.target):
            _fail(stage, where, "runs backwards")
    body = program.graphs.get(program.loop.body)
    if body is None:
        _fail(stage, f"loop body `{program.loop.body}`", "is not a graph")
    parts = [program.graphs[name] for name in program.loop.pieces if name in program.graphs] or [body]
    if program.loop.pieces and (len(parts) < len(program.loop.pieces) or parts[-1] is not body):
        _fail(stage, f"loop pieces {', '.join(program.loop.pieces)}", "are not graphs that end with the body")
    for carried, result in program.loop.carried.items():
        if not any(carried in part.inputs for part in parts) or not any(result in part.outputs for part in parts):
            _fail(stage, f"loop value `{carried}` → `{result}`", "is not an input and an output of the body")
    for name in (*program.loop.taken, *program.loop.returned):
        if name not in program.loop.carried:
            _fail(stage, f"loop value `{name}`", "is taken or returned, but not carried")


def _in_instance(spec: TensorSpec, instance: str, dims: Collection[str]) -> TensorSpec:
    """``spec`` in another run of its graph: dims that run has of its own carry its name."""
    if not instance:
        return spec
    own = {symbol(name.removeprefix(f"{instance}_")): symbol(name) for name in dims if name.startswith(f"{instance}_")}
    return TensorSpec(spec.dtype, tuple(s if isinstance(s, int) else s.subs(own) for s in spec.shape))


def _same(x: Specs, y: Specs) -> bool:
    if isinstance(x, tuple) or isinstance(y, tuple):
        return isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y) and all(map(_same, x, y))
    return x.dtype == y.dtype and x.rank == y.rank and all(map(equal, x.shape, y.shape))


def _verify_graph(program: Program, graph: Graph, forbidden: frozenset[object], stage: str) -> None:
    misplaced = graph.misplaced()
    if misplaced is not None:
        _fail(stage, f"graph `{graph.name}`, node `{misplaced.name}`", "reads a value that is made after it")
    bound: dict[object, str] = {}
    for node in graph.nodes:
        where = f"graph `{graph.name}`, node `{node.name}` ({node.meta.get('module') or 'no module'})"
        if "spec" not in node.meta:
            _fail(stage, where, "has no spec")
        if is_weight(node):
            binding = node.meta["weight"]
            if not node.users:
                _fail(stage, where, "is a weight nothing reads")
            if spec_of(node) != TensorSpec(binding.dtype, binding.shape):
                _fail(stage, where, f"says {spec_of(node)}, but is bound to {TensorSpec(binding.dtype, binding.shape)}")
            other = bound.setdefault(binding, node.name)
            if other != node.name:
                _fail(stage, where, f"is bound to the same data as `{other}`")
        elif node.op == "placeholder":
            if is_input(node) and node.name not in program.rates and not _fed(program, graph, node):
                _fail(stage, where, "is an input that neither the caller nor an edge supplies")
        elif node.op != "call_function" or node.target not in ops.OPERATIONS:
            _fail(stage, where, f"is not in the dialect: {node.target}")
        else:
            if node.target in forbidden:
                _fail(stage, where, f"`{node.target}` is not legal any more")
            try:
                spec = infer(node.target, node.args, node.kwargs)
            except ops.SpecError as error:
                _fail(stage, where, str(error))
            if not _same(spec, specs_of(node)):
                _fail(stage, where, f"says {specs_of(node)}, but its operands give {spec}")
    for name, node in graph.outputs.items():
        if not isinstance(node, Node):
            _fail(stage, f"graph `{graph.name}`, output `{name}`", "is not a value")


def _fed(program: Program, graph: Graph, node: Node) -> bool:
    return any(e.input == node.name for e in program.edges_into(graph.name))


def _fail(stage: str, where: str, what: str) -> NoReturn:
    raise InternalError("CX201", f"{'after ' + stage + ': ' if stage else ''}{where} {what}")
