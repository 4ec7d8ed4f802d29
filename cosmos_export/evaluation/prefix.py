"""The beginning of a model that is too large to be run whole: its first linears, and all that they follow from."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_export.ir.dims import product
from cosmos_export.ir.graph import Node, is_weight
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program


@dataclass(frozen=True)
class Prefix:
    """``program`` computes ``linears`` of the labelled linears of the program it was taken from, which has ``of``."""

    program: Program
    linears: int
    of: int


def weight_bytes(program: Program) -> int:
    """Bytes of all weights that ``program`` reads, as they are stored, each once."""
    bindings = {node.meta["weight"] for graph in program.graphs.values() for node in graph.weights.values()}
    return sum(int(product(binding.shape)) * binding.dtype.itemsize for binding in bindings)


def first_linears(program: Program, budget_bytes: int) -> Prefix:
    """The linears with a precision that come first in each graph, and whatever they or later graphs need for them.

    ``program`` is labelled and not quantized. Of each graph as many are taken as follow from ``budget_bytes`` of its
    weights, one at least. Graphs without such linears keep what others read of them. The outputs of the result are
    those linears, and nothing else that its loop's body computed.
    """
    result = program.copy()
    taken = count = 0
    for name, graph in reversed(list(result.graphs.items())):
        linears = [
            n for n in graph.calls(aten.linear.default) if is_weight(n.args[1]) and "precision" in n.args[1].meta
        ]
        chosen = _within(linears, budget_bytes)
        taken, count = taken + len(chosen), count + len(linears)
        read = {edge.output for edge in result.edges if edge.source == name}
        kept = {key: node for key, node in graph.outputs.items() if key in read}
        graph.set_outputs(kept | {f"linear {node.name}": node for node in chosen})
        graph.eliminate_dead_code()
        unread = set(graph.remove_unread_inputs())
        result.edges = [edge for edge in result.edges if edge.target != name or edge.input not in unread]
    return Prefix(result, taken, count)


def _within(linears: list[Node], budget_bytes: int) -> list[Node]:
    """The first of ``linears`` that follow from ``budget_bytes`` of weights."""
    seen: set[Node] = set()
    used = 0
    for index, linear in enumerate(linears):
        used += _reach(linear, seen)
        if used > budget_bytes:
            return linears[: max(1, index)]
    return linears


def _reach(node: Node, seen: set[Node]) -> int:
    """Add all that ``node`` follows from to ``seen``; bytes of the weights among what was added."""
    found, waiting = 0, [node]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_weight(current):
            binding = current.meta["weight"]
            found += int(product(binding.shape)) * binding.dtype.itemsize
        waiting += current.all_input_nodes
    return found
