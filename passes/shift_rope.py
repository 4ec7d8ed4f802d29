"""Make the generator's rotary tables independent of the prompt."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, equal, simplify
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.passes.base import Pass, PassResult
from cosmos_export.passes.rewriting import UNARY

_THROUGH = ops.VIEWS | UNARY | {aten.slice.Tensor, aten.select.int}


class ShiftRope(Pass):
    """Move the prompt's length out of the generator's positions and into the prompt's own.

    A rotary score depends on differences of angles, and angles are linear in positions: adding one number to every
    coordinate of one axis, for all tokens that attend to each other, changes no score.

        positions of generated rows  p + c   →  p
        positions of prompt rows     i       →  i − c        on that axis; the other axes stay

    Done only where it is shown that (1) every value rotated by any table is read by attention alone, as query or key,
    and (2) on one axis every position is either moved by one common amount ``c`` that depends on dims, or belongs to
    the tables that are not.
    The sum p + c of the model rounds p to the grid of fp32 near c (2⁻¹⁰ at 15,000). The constant part of c is added and
    taken off again, so that positions stay on that grid: the published ones, as long as the prompt's length does not
    carry the sum past the next power of two.
    Numerical effect: angles of another size round differently; exact in real numbers, ≤ 1e-5 in fp32.
    """

    name = "shift_rope"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            self._shift(graph, result)
            graph.eliminate_dead_code()
        result.changes = +result.changes
        return result

    def _shift(self, graph: Graph, result: PassResult) -> None:
        rotations = graph.calls(ops.ROTARY)
        for rotation in rotations:
            stray = _reader_besides_attention(rotation)
            if stray is not None:
                result.decline(stray, "reads a rotated value, and not as query or key of attention")
                return
        positions: dict[Node, None] = {}
        for rotation in rotations:
            for table in rotation.args[1:]:
                found = _positions(table)  # type: ignore[arg-type]
                if found is None:
                    result.decline(rotation, "its angles are not shown to be a product with positions [axes, rows]")
                    return
                positions[found] = None
        moved = {p: _moved_axes(p) for p in positions}
        axes = {axis for found in moved.values() if found for axis in found}
        for axis in sorted(axes):
            amounts = {amount for found in moved.values() for amount, _ in found.get(axis, [])}
            steady = [p for p in positions if axis not in moved[p]]
            partial = [p for p in positions if axis in moved[p] and not _all_moved(p, axis)]
            if len(amounts) != 1 or partial:
                node = partial[0] if partial else next(iter(positions))
                result.decline(node, f"rows of axis {axis} are not all moved by one amount: {sorted(map(str, amounts))}")
                continue
            (amount,) = amounts
            for found in moved.values():
                for _, add in found.get(axis, []):
                    graph.replace(add, self._without_prompt(graph, add, amount))
                    result.changes["positions made independent of the prompt"] += 1
            for node in steady:
                self._subtract(graph, node, axis, amount)
                result.changes["positions moved instead"] += 1

    def _without_prompt(self, graph: Graph, add: Node, amount: Size) -> Node:
        """p for p + c, on the grid to which the sum rounds p: (p + k) − k with the constant part k of c."""
        margin = int(sympy.sympify(amount).as_coeff_Add()[0])
        if margin == 0:
            return add.args[0]  # type: ignore[return-value]
        rounded = graph.call(aten.add.Tensor, add.args[0], margin, before=add, like=add, by=self.name)
        return graph.call(aten.sub.Tensor, rounded, margin, before=add, like=add, by=self.name)

    def _subtract(self, graph: Graph, positions: Node, axis: int, amount: Size) -> None:
        """positions[axis] − amount, the other axes as they are."""
        spec = spec_of(positions)
        after = positions.next

        def call(target: Any, *args: Any) -> Node:
            return graph.call(target, *args, before=after, like=positions, by=self.name)

        readers = list(positions.users)
        rows = [call(aten.slice.Tensor, positions, 0, a, a + 1) for a in range(int(spec.shape[0]))]
        rows[axis] = call(aten.sub.Tensor, rows[axis], amount)
        new = call(aten.cat.default, rows, 0)
        for reader in readers:
            reader.replace_input_with(positions, new)


def _reader_besides_attention(rotation: Node) -> Node | None:
    for user in rotation.users:
        if is_op(user, aten.cat.default):
            bad = _reader_besides_attention(user)
            if bad is not None:
                return bad
        elif not (is_op(user, ops.ATTENTION) and rotation in user.args[:2] and rotation is not user.args[2]):
            return user
    return None


def _positions(table: Node) -> Node | None:
    """P [axes, rows] (float) of a table that is elementwise work on ``frequencies @ P``."""
    node = table
    while True:
        if is_op(node, aten.matmul.default):
            return _behind_views(node.args[1])  # type: ignore[arg-type]
        if is_op(node, aten.where.self):
            # Both branches are parts of one product: the axes laid into one another.
            found = {_positions(b) for b in node.args[1:]}  # type: ignore[arg-type]
            return found.pop() if len(found) == 1 else None
        if not is_op(node, *_THROUGH):
            return None
        node = node.args[0]  # type: ignore[assignment]


def _behind_views(node: Node) -> Node | None:
    """The value [axes, rows] that ``node`` [axes, 1, 1, rows] shows."""
    while is_op(node, aten.unsqueeze.default):
        node = node.args[0]  # type: ignore[assignment]
    return node if spec_of(node).rank == 2 and spec_of(node).dtype == torch.float32 else None


def _moved_axes(positions: Node) -> dict[int, list[tuple[Size, Node]]]:
    """Per axis, the ``x + amount`` nodes that its rows are made from."""
    found: dict[int, list[tuple[Size, Node]]] = {}
    for axis, rows in _rows_by_axis(positions):
        add = _addition(rows)
        if add is not None:
            found.setdefault(axis, []).append((simplify(add.args[1]), add))  # type: ignore[arg-type]
    return found


def _all_moved(positions: Node, axis: int) -> bool:
    return all(_addition(rows) is not None for a, rows in _rows_by_axis(positions) if a == axis)


def _rows_by_axis(positions: Node) -> list[tuple[int, Node]]:
    """(axis, part) for every part of ``positions``: joins along rows first, then joins along axes."""
    parts = list(positions.args[0]) if is_op(positions, aten.cat.default) and _axis(positions) == 1 else [positions]  # type: ignore[arg-type]
    found: list[tuple[int, Node]] = []
    for part in parts:
        offset = 0
        if is_op(part, aten.cat.default) and _axis(part) == 0:
            for piece in part.args[0]:
                size = spec_of(piece).shape[0]
                found += [(offset + i, piece) for i in range(int(size))]
                offset += int(size)
        else:
            found += [(i, part) for i in range(int(spec_of(part).shape[0]))]
    return found


def _axis(cat: Node) -> int:
    return ops.axis_of(cat.args[1] if len(cat.args) > 1 else 0, spec_of(cat).rank)  # type: ignore[arg-type]


def _addition(node: Node) -> Node | None:
    """The ``x + amount`` behind views, where the amount depends on dims."""
    while is_op(node, *ops.VIEWS):
        node = node.args[0]  # type: ignore[assignment]
    if is_op(node, aten.add.Tensor) and isinstance(node.args[1], sympy.Expr) and not equal(node.args[1], 0):
        return node
    return None
