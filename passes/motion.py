"""Code motion out of the loop by binding time: the mechanism behind `split_towers` and `fold_schedule`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, copy_node, is_input, spec_of
from cosmos_export.ir.match import behind
from cosmos_export.ir.program import Edge, Program
from cosmos_export.ir.rates import rates_of, sources_of
from cosmos_export.ir.spec import Rate


def boundary(program: Program, graph: Graph, rates: Collection[Rate]) -> list[Node]:
    """Results of ``rates`` that faster operations of ``graph`` read: what has to be handed over if they move out.

    Views of an input are not results: they are repeated where they are read.
    """
    rate_of = rates_of(program, graph)
    found = []
    for node in graph.calls():
        # A user without a rate is the graph's output, which is read in every step.
        faster = any(rate_of.get(user, Rate.CARRIED) > rate_of[node] for user in node.users)
        if rate_of[node] in rates and faster and not is_input(behind(node, ops.VIEWS)):
            found.append(node)
    return found


def hoist(
    program: Program,
    body: str,
    rates: Collection[Rate],
    name: str,
    label_of: Callable[[Node], str],
    order: Sequence[Node] = (),
) -> dict[str, Node]:
    """Move what changes at ``rates`` out of graph ``body`` into a new graph ``name`` that runs before it.

    Returns the values handed over by the name that ``label_of`` gives them (made unique): those in ``order`` first and
    in its order, the others as the graph has them. Operations on constants alone are repeated in both graphs. Does
    nothing where no value would be handed over.
    """
    graph = program.graphs[body]
    handed = boundary(program, graph, rates)
    if not handed:
        return {}
    place = {node: i for i, node in enumerate(order)}
    handed.sort(key=lambda node: place.get(node, len(place)))
    needed = set().union(*(sources_of(node) for node in handed))
    moved = Graph(name)
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in needed:
            mapping[node] = copy_node(moved, node, mapping)
    outputs: dict[str, Node] = {}
    for node in handed:
        label = _unique(label_of(node), graph.names())
        outputs[label] = mapping[node]
        replacement = graph.add_input(label, spec_of(node))
        replacement.meta["module"] = node.meta.get("module", "")
        graph.replace(node, replacement)
    moved.set_outputs(outputs)
    # Edges into the body that now feed the moved graph (values handed over earlier) follow what reads them.
    for edge in list(program.edges_into(body)):
        if edge.input in moved.inputs:
            program.edges.append(Edge(edge.source, edge.output, name, edge.input))
    names_in_order = list(program.graphs)
    names_in_order.insert(names_in_order.index(body), name)
    program.graphs = {key: moved if key == name else program.graphs[key] for key in names_in_order}
    program.edges += [Edge(name, label, body, label) for label in outputs]
    tidy(program, body)
    return outputs


def tidy(program: Program, name: str) -> list[str]:
    """Remove from a graph what nothing reads, its inputs with their edges included; returns the inputs that went."""
    graph = program.graphs[name]
    graph.eliminate_dead_code()
    gone = graph.remove_unread_inputs()
    program.edges = [e for e in program.edges if not (e.target == name and e.input in gone)]
    return gone


def _unique(name: str, taken: Collection[str]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
