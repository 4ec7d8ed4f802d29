"""Code shared by passes that put one operation in the place of several: kernels, where it goes, what reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node
from cosmos_export.passes.base import Pass
from cosmos_export.passes.options import PassOptions


class KernelPass(Pass):
    """A pass that is for one of this project's kernels, and runs where the options name it."""

    phase = "kernels"
    kernel: ClassVar[str]

    @classmethod
    def made(cls, options: PassOptions) -> Pass | None:
        return cls() if cls.kernel in options.kernels else None


def place(graph: Graph, operands: Collection[Any], readers: Collection[Node]) -> Node | None:
    """The first of ``readers``, if every one of ``operands`` is computed by then: a place for the new operation."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    # The graph's output, which reads as well, is behind every operation.
    first = min(readers, key=lambda node: order.get(node, len(order)))
    needed = [n for n in operands if isinstance(n, Node) and n.op == "call_function"]
    return first if all(order[n] < order.get(first, len(order)) for n in needed) else None


def fuse(
    graph: Graph, at: Node, target: Any, operands: Sequence[Any], results: Sequence[Node], by: str, *, one: bool = False
) -> None:
    """``target(*operands)`` before ``at``, whose results are read instead of ``results``; ``one``: its only one."""
    made = graph.call(target, *operands, before=at, like=results[0], by=by)
    pairs = []
    for i, old in enumerate(results):
        new = made if one else graph.call(ops.ITEM, made, i, before=at, like=old, by=by)
        pairs.append((old, new))
    for old, new in pairs:
        graph.replace(old, new)
    for old, _ in pairs:
        _erase(graph, old)


def _erase(graph: Graph, node: Node) -> None:
    """Remove ``node`` and what was computed for it alone: it may now read values that come after it."""
    if node.op == "call_function" and not node.users:
        read = node.all_input_nodes
        graph.erase(node)
        for one in read:
            _erase(graph, one)


def same(a: Node, b: Node) -> bool:
    """``a`` and ``b`` have one type and shape."""
    return bool(a.meta["spec"] == b.meta["spec"])
