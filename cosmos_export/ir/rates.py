"""Binding-time analysis: how often each value of a graph changes."""

from __future__ import annotations

from functools import reduce

from cosmos_export.ir.graph import Graph, Node, is_input
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Rate


def rates_of(program: Program, graph: Graph) -> dict[Node, Rate]:
    """Rate of every node: an input's own, or the join of what an operation reads.

    An input that an edge supplies is as fast as the graph it comes from makes it.
    """
    supplied: dict[str, Rate] = {}
    for edge in program.edges_into(graph.name):
        source = program.graphs[edge.source]
        supplied[edge.input] = rates_of(program, source)[source.outputs[edge.output]]
    rates: dict[Node, Rate] = {}
    for node in graph.nodes:
        if is_input(node):
            rates[node] = supplied[node.name] if node.name in supplied else program.rates[node.name]
        elif node.op == "placeholder":
            rates[node] = Rate.CONSTANT
        else:
            rates[node] = reduce(Rate.join, (rates[n] for n in node.all_input_nodes), Rate.CONSTANT)
    return rates


def sources_of(node: Node) -> set[Node]:
    """Every node that ``node`` follows from, itself included."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return seen
