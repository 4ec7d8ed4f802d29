"""Cut a graph into graphs that run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir.dims import Size, evaluate
from cosmos_export.ir.graph import Graph, Node, copy_node, is_constant, is_input, is_op, is_weight, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Edge, Loop, Program
from cosmos_export.ir.spec import Rate
from cosmos_export.passes.base import Pass, PassResult
from cosmos_export.passes.options import Cuts, PassOptions


@dataclass(frozen=True)
class CutPlace:
    """A place where a graph can be cut: before ``node``."""

    node: Node
    crossing_bytes: int
    """Bytes that are computed before it and read after it."""
    weight_size: float
    """Size of the weights that are read from here to the next place."""


def narrow_places(
    graph: Graph, sizes: Mapping[str, int], weigh: Callable[[Node], float]
) -> tuple[float, list[CutPlace]]:
    """The places of ``graph`` where less crosses than around them, in order, and the size of the weights before them.

    ``sizes``: what dims are taken to be. ``weigh``: the size of a weight. One that several operations read counts for
    each. What is read from inputs, weights and constants crosses nowhere: every piece has its own. Quantized values do
    not cross.
    """
    order = graph.calls()
    position = {node: index for index, node in enumerate(order)}
    change, weight_at = [0] * (len(order) + 1), [0.0] * len(order)
    quantized = set[int]()
    for index, node in enumerate(order):
        users = [position[user] for user in node.users if user in position]
        if users and max(users) > index:
            size = _bytes(node, sizes)
            change[index + 1] += size
            change[max(users) + 1] -= size
            if spec_of(node).dtype.itemsize == 1:
                quantized.update(range(index + 1, max(users) + 1))
        weight_at[index] = sum(weigh(n) for n in node.all_input_nodes if is_weight(n))
    crossing, now = [], 0
    for index in range(len(order)):
        now += change[index]
        crossing.append(now)
    chosen = [i for i in range(1, len(order)) if i not in quantized and _narrow(crossing, i)]
    spans = zip(chosen, [*chosen[1:], len(order)], strict=True)
    places = [CutPlace(order[i], crossing[i], sum(weight_at[i:end])) for i, end in spans]
    return sum(weight_at[: chosen[0]] if chosen else weight_at), places


def _narrow(crossing: Sequence[int], index: int) -> bool:
    """Whether as little crosses at ``index`` as on either side, and less than where that changes to the right."""
    after = next((c for c in crossing[index + 1 :] if c != crossing[index]), 0)
    return crossing[index - 1] > crossing[index] < after


def _bytes(node: Node, sizes: Mapping[str, int]) -> int:
    spec = spec_of(node)
    count = 1
    for size in spec.shape:
        count *= evaluate(size, sizes)
    return count * spec.dtype.itemsize


class CutGraph(Pass):
    """A graph becomes several that run one after the other.

        graph(x)  =  last(x, …, second(x, first(x)))

    Each piece takes by name what it reads of the inputs and of the results of those before it, and has its own weights
    and constants; what crosses has the name of the node that it was, or another where an output has that name. An
    output of the graph is an output of the piece that computes it, or of the last where none does. Where a piece reads
    a dim that nothing it takes shows, it also takes an input that does. The pieces are ``NAME_part_1``,
    ``NAME_part_2`` …; edges join them, and other graphs to them.
    Left alone: a graph for which ``cuts`` names no node. Numerical effect: none, the same operations run.
    """

    name = "cut_graph"
    law = "graph(x) = last(x, …, second(x, first(x)))"
    phase = "cut"

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = cuts

    @classmethod
    def made(cls, options: PassOptions) -> Pass | None:
        return None if options.cuts is None else cls(options.cuts)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        graphs: dict[str, Graph] = {}
        for name, graph in program.graphs.items():
            before = self._cuts(name, graph)
            if not before:
                graphs[name] = graph
                continue
            pieces = cut(graph, before, [f"{name}_part_{index + 1}" for index in range(len(before) + 1)])
            graphs |= {piece.name: piece for piece in pieces}
            self._join(program, name, pieces)
            result.changes["pieces"] += len(pieces)
        program.graphs = graphs
        return result

    @staticmethod
    def _join(program: Program, name: str, pieces: Sequence[Graph]) -> None:
        """Edges of the graph ``name`` become edges of its ``pieces``, and what crosses gets its own."""
        edges, fed = [], {edge.input for edge in program.edges if edge.target == name}
        for edge in program.edges:
            sources = [piece.name for piece in pieces if edge.output in piece.outputs] if edge.source == name else []
            targets = [piece.name for piece in pieces if edge.input in piece.inputs] if edge.target == name else []
            edges += [
                replace(edge, source=source, target=target)
                for source in sources or [edge.source]
                for target in targets or [edge.target]
            ]
        for index, piece in enumerate(pieces):
            for given in piece.inputs:
                maker = next((one.name for one in pieces[:index] if given in one.outputs), None)
                if maker is not None and given not in fed and given not in program.rates:
                    edges.append(Edge(maker, given, piece.name, given))
        program.edges = edges
        if program.loop.body == name:
            names = tuple(piece.name for piece in pieces)
            program.loop = replace(program.loop, body=names[-1], pieces=names)


def alone(name: str, graph: Graph) -> Program:
    """``graph`` as a program of its own, whose inputs all come from the caller. The graph is shared, not copied."""
    return Program({name: graph}, {}, dict.fromkeys(graph.inputs, Rate.CARRIED), Loop(name, {}))


def cut(graph: Graph, before: Sequence[Node], names: Sequence[str]) -> list[Graph]:
    """``graph`` as graphs ``names``, a new one from each of the nodes ``before`` on."""
    starts = {node: index + 1 for index, node in enumerate(before)}
    part_of: dict[Node, int] = {}
    part = 0
    for node in graph.calls():
        part = starts.get(node, part)
        part_of[node] = part
    for key, node in graph.outputs.items():
        if graph.inputs.get(key, node) is not node:
            raise InternalError("CX207", f"graph `{graph.name}` has an input and another output called `{key}`")
        part_of.setdefault(node, len(names) - 1)
    return [_piece(graph, part_of, index, name) for index, name in enumerate(names)]


def _piece(graph: Graph, part_of: Mapping[Node, int], index: int, name: str) -> Graph:
    own = [node for node in graph.calls() if part_of[node] == index]
    read = {operand for node in own for operand in node.all_input_nodes}
    read |= {node for node in graph.outputs.values() if node.op != "call_function" and part_of[node] == index}
    piece, mapping = Graph(name), dict[Node, Node]()
    missing = _unshown(own, [n for n in read if is_input(n) or part_of.get(n, index) != index])
    for node in graph.nodes:
        if is_input(node) and (node in read or _shows(node, missing)):
            mapping[node] = copy_node(piece, node, mapping)
            missing -= _shown(node)
    for node in graph.nodes:
        if node in read and node.op == "call_function" and part_of[node] != index:
            mapping[node] = piece.add_input(_crossing(graph, node), spec_of(node))
    for node in graph.nodes:
        computed = node.op == "call_function" and part_of[node] == index
        if computed or (node in read and (is_weight(node) or is_constant(node))):
            mapping[node] = copy_node(piece, node, mapping)
    outputs = {key: mapping[node] for key, node in graph.outputs.items() if part_of.get(node) == index}
    for node in own:
        if any(part_of.get(user, index) > index for user in node.users):
            outputs[_crossing(graph, node)] = mapping[node]
    piece.set_outputs(outputs)
    return piece


def _crossing(graph: Graph, node: Node) -> str:
    """Name of ``node`` where it crosses: its own, unless another value is an output of that name."""
    taken = {**graph.outputs, **{other.name: other for other in graph.nodes}}
    name = node.name
    while graph.outputs.get(name, node) is not node or taken.get(name, node) is not node:
        name += "_crossing"
    return name


def _unshown(own: Sequence[Node], taken: Sequence[Node]) -> set[str]:
    """Dims in the arguments of ``own`` that no shape among ``taken`` gives."""
    shown = {str(size) for node in taken for size in spec_of(node).shape}
    symbols = set().union(*(_shown(node) for node in taken))
    found: set[str] = set()
    for node in own:
        sizes = list(_sizes((node.args, node.kwargs)))
        if is_op(node, aten.view.default) and len(sizes) == 1:
            continue  # the one that is left over
        for size in sizes:
            names = {symbol.name for symbol in size.free_symbols}
            if str(size) not in shown and not names <= symbols:
                found |= names
    return found - symbols


def _sizes(operands: Any) -> list[sympy.Expr]:
    if isinstance(operands, sympy.Expr):
        return [] if operands.is_number else [operands]
    if isinstance(operands, (tuple, list)):
        return [size for one in operands for size in _sizes(one)]
    return [size for one in operands.values() for size in _sizes(one)] if isinstance(operands, dict) else []


def _shown(node: Node) -> set[str]:
    """Dims that the shape of ``node`` gives."""
    return {name for size in spec_of(node).shape for name in _dim(size)}


def _dim(size: Size) -> set[str]:
    if isinstance(size, int):
        return set()
    dim = size.as_coeff_Mul()[1]
    return {dim.name} if dim.is_Symbol else set()


def _shows(node: Node, missing: set[str]) -> bool:
    return bool(missing & _shown(node))
