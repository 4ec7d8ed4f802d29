"""Make the generator's rotary tables independent of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import sympy
import torch

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, equal, expression, simplify
from cosmos_export.ir.graph import Graph, Node, is_constant, is_op, is_weight, spec_of
from cosmos_export.ir.match import Any_, Call, Pattern, Through, match
from cosmos_export.ir.ops import Trait, aten
from cosmos_export.ir.program import Program
from cosmos_export.ir.rates import sources_of
from cosmos_export.passes.base import Pass, PassResult

_PLACES = ops.VIEWS | ops.having(Trait.PART)
_ON_THE_WAY = _PLACES | ops.having(Trait.JOIN) | ops.having(Trait.ELEMENTWISE) | {aten.matmul.default}
"""Operations between a position and the rotary tables made from it."""

_Moved: TypeAlias = dict[int, list[tuple[Size, Node]]]
"""Per axis: the amounts by which its rows are moved and the additions that do it."""


class ShiftRope(Pass):
    """Move the prompt's length out of the generator's positions and into the prompt's own.

    A rotary score depends on differences of angles, and angles are linear in positions: adding one number to every
    coordinate of one axis, for all tokens that attend to each other, changes no score.

        positions of generated rows  p + c   →  p
        positions of prompt rows     i       →  i − c        on that axis; the other axes stay

    Done only where it is shown that

    1. every rotated value is read as query or key of attention and in no other way, and of an attention every row of
       query and key is rotated, or none is;
    2. all tables are cosine and sine of one and the same function of positions, linear in them: a product with
       frequencies that do not follow from positions;
    3. on one axis every position is either moved by one common amount ``c`` that depends on dims, or is of a table
       none of whose positions is, and nothing else reads it.

    The sum p + c of the model rounds p to the grid of fp32 near c (2⁻¹⁰ at 15,000). The constant part of c is added and
    taken off again, so that positions stay on that grid: the published ones, as long as the prompt's length does not
    carry the sum past the next power of two.
    Numerical effect: angles of another size round differently; exact in real numbers, ≤ 1e-5 in fp32.
    """

    name = "shift_rope"
    law = "positions p + c against i = p against i − c"
    phase = "towers"

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
            stray = _other_reader(rotation, frozenset({aten.cat.default}), _scores)
            if stray is not None:
                result.decline(stray, "reads a rotated value, and not as query or key of attention")
                return
        for attention in graph.calls(ops.ATTENTION):
            if len(_rotated(attention.args[0]) | _rotated(attention.args[1])) > 1:
                result.decline(
                    attention,
                    "rotates only one of query and key, or some rows of them, so that its scores depend on positions",
                )
                return
        positions: dict[Node, None] = {}
        functions: set[Any] = set()
        for rotation in rotations:
            angle = _angle(rotation)
            found = _positions(angle) if angle is not None else None
            if found is None:
                result.decline(rotation, "its angles are not shown to be a product with positions [axes, rows]")
                return
            positions[found] = None
            functions.add(_function(angle, found))
        if len(functions) > 1:
            result.decline(rotations[-1], "its angles are another function of positions than those of other tables")
            return
        moved = {p: _moved_axes(p) for p in positions}
        amounts = self._amounts(moved, result)
        sums: dict[Node, set[int]] = {}
        for found_axes in moved.values():
            for axis, adds in found_axes.items():
                for _, add in adds:
                    sums.setdefault(add, set()).add(axis)
        steady = [(p, axis) for axis in amounts for p in positions if axis not in moved[p]]
        for node in (*sums, *(p for p, _ in steady)):
            stray = _other_reader(node, _ON_THE_WAY, _rotates_by)
            if stray is not None:
                result.decline(stray, "reads a position, and not as angle of a rotation")
                return
            if not sums.get(node, set()) <= amounts.keys():
                result.decline(node, "moves an axis that cannot be moved everywhere")
                return
        for add, axes in sums.items():
            graph.replace(add, self._without_prompt(graph, add, amounts[min(axes)]))
            result.changes["positions made independent of the prompt"] += 1
        for node, axis in steady:
            self._subtract(graph, node, axis, amounts[axis])
            result.changes["positions moved instead"] += 1

    def _amounts(self, moved: Mapping[Node, _Moved], result: PassResult) -> dict[int, Size]:
        """The one amount by which each axis is moved, for every axis that is moved as a whole or not at all."""
        amounts: dict[int, Size] = {}
        for axis in sorted({axis for found in moved.values() for axis in found}):
            found = {amount for axes in moved.values() for amount, _ in axes.get(axis, [])}
            partial = [p for p, axes in moved.items() if axis in axes and not _all_moved(p, axis)]
            if len(found) != 1 or partial:
                node = partial[0] if partial else next(iter(moved))
                reason = f"rows of axis {axis} are not all moved by one amount: {sorted(map(str, found))}"
                result.decline(node, reason)
            else:
                (amounts[axis],) = found
        return amounts

    def _without_prompt(self, graph: Graph, add: Node, amount: Size) -> Node:
        """p for p + c, on the grid to which the sum rounds p: (p + k) − k with the constant part k of c."""
        margin = int(expression(amount).as_coeff_Add()[0])
        position: Node = add.args[0]
        if margin == 0:
            return position
        rounded = graph.call(aten.add.Tensor, position, margin, before=add, like=add, by=self.name)
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


def _other_reader(node: Node, through: Collection[object], proper: Callable[[Node, Node], bool]) -> Node | None:
    """The first operation that reads ``node``, past those in ``through``, in a way that is not ``proper``."""
    for user in node.users:
        if is_op(user, *through):
            found = _other_reader(user, through, proper)
            if found is not None:
                return found
        elif not proper(user, node):
            return user
    return None


def _scores(user: Node, node: Node) -> bool:
    return is_op(user, ops.ATTENTION) and node is not user.args[2]


def _rotates_by(user: Node, node: Node) -> bool:
    return is_op(user, ops.ROTARY) and node is not user.args[0]


def _rotated(value: Node) -> set[bool]:
    """Whether the parts of ``value`` are rotated."""
    if is_op(value, aten.cat.default):
        return set[bool]().union(*map(_rotated, value.args[0]))
    return {is_op(value, ops.ROTARY)}


def _angle(rotation: Node) -> Node | None:
    """The one value of which the tables of ``rotation`` are cosine and sine."""
    found = match(_TABLES, rotation)
    return None if found is None else found["angle"]


def _shown(pattern: Pattern) -> Pattern:
    return Through(_PLACES, pattern)


_TABLES = Call(
    ops.ROTARY,
    Any_("x"),
    _shown(Call(aten.cos.default, Any_("angle"))),
    _shown(Call(aten.sin.default, Any_("angle"))),
)
_AXES = Any_("positions", lambda v: isinstance(v, Node) and spec_of(v).rank == 2 and spec_of(v).dtype == torch.float32)
"""[axes, rows], shown as [axes, 1, 1, rows]."""
_PRODUCT = _shown(Call(aten.matmul.default, Any_("others"), Through({aten.unsqueeze.default}, _AXES)))
_SELECTION = _shown(Call(aten.where.self, Any_("others"), Any_("a"), Any_("b")))


def _positions(angle: Node) -> Node | None:
    """P [axes, rows] (float) of angles that are placed from ``frequencies @ P``."""
    found = match(_PRODUCT, angle)
    if found is None:
        found = match(_SELECTION, angle)
        if found is None:
            return None
        # Both branches are parts of one product: the axes laid into one another.
        branches = {_positions(found[branch]) for branch in "ab"}
        found["positions"] = branches.pop() if len(branches) == 1 else None
    positions: Node | None = found["positions"]
    return None if positions is None or _related(found["others"], positions) else positions


def _related(value: Node, positions: Node) -> bool:
    """Whether ``value`` follows from anything but constants that ``positions`` follow from."""
    shared = sources_of(value) & sources_of(positions)
    return any(not (is_constant(node) or is_weight(node)) for node in shared)


def _function(value: Any, positions: Node) -> Any:
    """How ``value`` follows from ``positions``, equal for two values where it is the same function."""
    if value is positions:
        return "positions"
    if isinstance(value, Node) and value.op == "call_function":
        return value.target, *(_function(a, positions) for a in (*value.args, *value.kwargs.values()))
    return tuple(_function(v, positions) for v in value) if isinstance(value, (tuple, list)) else value


def _moved_axes(positions: Node) -> _Moved:
    found: _Moved = {}
    for axis, rows in _rows_by_axis(positions):
        add = _addition(rows)
        if add is not None:
            found.setdefault(axis, []).append((simplify(add.args[1]), add))
    return found


def _all_moved(positions: Node, axis: int) -> bool:
    return all(_addition(rows) is not None for a, rows in _rows_by_axis(positions) if a == axis)


def _rows_by_axis(positions: Node) -> list[tuple[int, Node]]:
    """(axis, part) for every part of ``positions``: joins along rows first, then joins along axes."""
    parts = list(positions.args[0]) if is_op(positions, aten.cat.default) and _axis(positions) == 1 else [positions]
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
    return ops.axis_of(cat.args[1] if len(cat.args) > 1 else 0, spec_of(cat).rank)


def _addition(node: Node) -> Node | None:
    """The ``x + amount`` behind views, where the amount depends on dims."""
    found = match(_MOVED, node)
    return None if found is None else found["addition"]


_MOVED = Through(
    ops.VIEWS,
    Call(
        aten.add.Tensor, Any_("x"), Any_("amount", lambda v: isinstance(v, sympy.Expr) and not equal(v, 0)),
        name="addition",
    ),
)  # fmt: skip
