"""Take the packed sequence apart again."""

from __future__ import annotations

from typing import Any, ClassVar

from cosmos_export.ir.dims import Size, equal, expression
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.passes.base import Pass, PassResult
from cosmos_export.passes.rewriting import ELEMENTWISE, MOVES, Slicer, eliminate_common


class ResolvePacking(Pass):
    """Rows that are written into one buffer and read back are passed on directly.

    * ``index_put`` of ranges that tile the buffer = ``cat`` of the parts, whatever filled the buffer before;
    * ``index`` by a range = ``slice``;
    * a slice of rows that were joined, through every elementwise operation between, is the part itself.

    Layers are never passed: rows that a layer computes together stay together.

    Numerical effect: none, only rows move.
    Left alone: indices that are not ranges, ranges that overlap or leave a gap, values that are repeated over a range,
    slices that cut through a part.
    """

    name = "resolve_packing"
    law = "rows written into one buffer and read back = the rows"
    removes: ClassVar[frozenset[object]] = frozenset({aten.index_put.default, aten.index.Tensor})
    phase = "form"
    after = ("normalize",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            self._writes(graph, result)
            self._reads(graph, result)
            self._slices(graph, result)
            graph.eliminate_dead_code()
            result.changes["common subexpressions"] += eliminate_common(graph)
        result.changes = +result.changes
        return result

    def _writes(self, graph: Graph, result: PassResult) -> None:
        for node in graph.calls(aten.index_put.default):
            if any(is_op(user, aten.index_put.default) and user.args[0] is node for user in node.users):
                continue  # the last write of a chain stands for the buffer
            parts = _tiles(node)
            if parts is None:
                result.decline(node, "its ranges do not tile the buffer")
                continue
            new = graph.call(aten.cat.default, parts, 0, before=node, like=node, by=self.name)
            graph.replace(node, new)
            result.changes["packed buffers"] += 1
        graph.eliminate_dead_code()

    def _reads(self, graph: Graph, result: PassResult) -> None:
        for node in graph.calls(aten.index.Tensor):
            rows = _range(node.args[1][0])
            if rows is None:
                result.decline(node, "its index is not a range")
                continue
            new = graph.call(aten.slice.Tensor, node.args[0], 0, *rows, before=node, like=node, by=self.name)
            graph.replace(node, new)
            result.changes["reads by index"] += 1
        graph.eliminate_dead_code()

    def _slices(self, graph: Graph, result: PassResult) -> None:
        for node in graph.calls(aten.slice.Tensor):
            source, axis, start, end, *step = node.args
            if step or source.op == "placeholder":
                continue
            slicer = Slicer(graph, self.name, through=ELEMENTWISE | MOVES)
            new = slicer.of(source, axis, start, end)
            if slicer.residual:
                # Not a part itself. A slice of one part still frees the others of it.
                slicer = Slicer(graph, self.name, through=frozenset({aten.cat.default}))
                new = slicer.of(source, axis, start, end)
                if not is_op(new, aten.slice.Tensor) or new.args[0] is source:
                    continue
            graph.replace(node, new)
            result.changes["slices of joined rows"] += 1


def _range(index: Any) -> tuple[Size, Size] | None:
    return index.args[:2] if is_op(index, aten.arange.start) else None


def _fills(values: Node, rows: tuple[Size, Size], buffer: Node) -> bool:
    """Whether ``values`` are as many rows as are written, of the buffer's own shape: none is written several times."""
    shape, whole = spec_of(values).shape, spec_of(buffer).shape
    written = (expression(rows[1]) - expression(rows[0]), *whole[1:])
    return len(shape) == len(written) and all(map(equal, shape, written))


def _tiles(node: Node) -> list[Node] | None:
    """Values written by a chain of ``index_put``, in order, where their ranges tile the buffer."""
    written: list[tuple[Size, Size, Node]] = []
    while is_op(node, aten.index_put.default):
        base, indices, values = node.args
        rows = _range(indices[0])
        if rows is None or not _fills(values, rows, node):
            return None
        written.append((*rows, values))
        node = base
    position: Size = 0
    parts: list[Node] = []
    while written:
        found = next((w for w in written if equal(w[0], position)), None)
        if found is None:
            return None
        written.remove(found)
        parts.append(found[2])
        position = found[1]
    return parts if equal(position, spec_of(node).shape[0]) else None
