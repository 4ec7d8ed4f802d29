"""Binding-time analysis: how often each value of a graph changes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import sympy

from cosmos_export.ir.graph import Graph, Node, is_input, spec_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Rate


def rates_of(program: Program, graph: Graph) -> dict[Node, Rate]:
    """Rate of every node: an input's own, or the join of what an operation reads.

    An input that an edge supplies is as fast as the graph it comes from makes it. A number that is computed from the
    length of the prompt follows from the prompt, as its values do.
    """
    supplied: dict[str, Rate] = {}
    for edge in program.edges_into(graph.name):
        source = program.graphs[edge.source]
        supplied[edge.input] = rates_of(program, source)[source.outputs[edge.output]]
    lengths = _prompt_lengths(program)
    rates: dict[Node, Rate] = {}
    for node in graph.nodes:
        if is_input(node):
            rates[node] = supplied[node.name] if node.name in supplied else program.rates[node.name]
        elif node.op == "placeholder":
            rates[node] = Rate.CONSTANT
        else:
            own = Rate.PROMPT if any(lengths & size.free_symbols for size in _sizes(node)) else Rate.CONSTANT
            rates[node] = reduce(Rate.join, (rates[n] for n in node.all_input_nodes), own)
    return rates


def _prompt_lengths(program: Program) -> set[sympy.Symbol]:
    """The dims that only the inputs of the prompt show."""
    shown: dict[bool, set[sympy.Symbol]] = {True: set(), False: set()}
    for graph in program.graphs.values():
        for name, node in graph.inputs.items():
            if name in program.rates:
                shape = [size for size in spec_of(node).shape if isinstance(size, sympy.Expr)]
                shown[program.rates[name] is Rate.PROMPT].update(*(size.free_symbols for size in shape))
    return shown[True] - shown[False]


def _sizes(value: Any) -> Iterator[sympy.Expr]:
    """The symbolic sizes among the arguments of a node."""
    if isinstance(value, Node):
        value = (value.args, *value.kwargs.values())
    for item in value:
        if isinstance(item, sympy.Expr):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _sizes(item)


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
