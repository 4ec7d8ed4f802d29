"""Patterns on dataflow: what computes a value, written as an equation.

    x, weight, eps = Any_("x"), Any_("weight"), Any_("eps")
    root = Call(aten.rsqrt.default, Call(aten.add.Tensor, Call(aten.mean.dim, …), eps), sole=True)
    found = match(Call(aten.mul.Tensor, Call(aten.mul.Tensor, x, root, sole=True), weight), node)

A pattern says nothing of names, modules or layers. The two operands of a commutative operation are tried in both
orders; of several ways in which a pattern holds, the first is found, with operands in the order in which they are
written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Node, is_op

Pattern: TypeAlias = Any
"""`Any_`, `Call`, `OneOf`, `Through`; a list of patterns for a list of operands; anything else is equal to the operand.
"""
Bound = Mapping[str, Any]
"""Names of a pattern → the values that they stand for."""

_COMMUTATIVE = ops.having(ops.Trait.COMMUTATIVE)


class Any_:
    """Any operand for which ``where`` holds; wherever the name stands, it is the same one."""

    def __init__(self, name: str, where: Callable[[Any], bool] | None = None) -> None:
        self.name, self.where = name, where


class Call:
    """A call of ``target`` with operands as the patterns ``args`` say.

    ``name``: what the call itself is bound to. ``sole``: it has one reader. ``where`` holds for it. Options that it has
    are those of ``options``, where any is given; with ``more`` it may have further operands.
    """

    def __init__(
        self,
        target: Any,
        *args: Pattern,
        name: str = "",
        sole: bool = False,
        where: Callable[[Node], bool] | None = None,
        more: bool = False,
        **options: Any,
    ) -> None:
        self.target, self.args, self.options = target, args, options
        self.name, self.sole, self.where, self.more = name, sole, where, more


class OneOf:
    """The first of ``patterns`` that holds."""

    def __init__(self, *patterns: Pattern) -> None:
        self.patterns = patterns


class Through:
    """``pattern``, as it is or behind any number of ``targets`` that show its value."""

    def __init__(self, targets: Collection[Any], pattern: Pattern) -> None:
        self.targets, self.pattern = targets, pattern


def match(pattern: Pattern, value: Any, bound: Bound | None = None) -> dict[str, Any] | None:
    """The values that the names of ``pattern`` stand for where ``value`` is computed as it says; None where it is not.

    ``bound``: names that are known already.
    """
    found = next(_solutions(pattern, value, bound or {}), None)
    return None if found is None else dict(found)


def behind(value: Any, targets: Collection[Any]) -> Any:
    """The value that ``value`` shows by way of ``targets``, operations that show their first operand."""
    while is_op(value, *targets):
        value = value.args[0]
    return value


def follows_from(value: Node, source: Node) -> bool:
    """``value`` is computed from ``source``, or is it."""
    waiting, seen = [value], set[Node]()
    while waiting:
        one = waiting.pop()
        if one is source:
            return True
        if one not in seen:
            seen.add(one)
            waiting += one.all_input_nodes
    return False


def _solutions(pattern: Pattern, value: Any, bound: Bound) -> Iterator[Bound]:
    """Every way in which ``value`` is as ``pattern`` says, given what is ``bound``."""
    if isinstance(pattern, Any_):
        if pattern.where is None or pattern.where(value):
            yield from _bind(pattern.name, value, bound)
    elif isinstance(pattern, Call):
        yield from _calls(pattern, value, bound)
    elif isinstance(pattern, OneOf):
        for one in pattern.patterns:
            yield from _solutions(one, value, bound)
    elif isinstance(pattern, Through):
        yield from _solutions(pattern.pattern, behind(value, pattern.targets), bound)
    elif isinstance(pattern, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _together(pattern, value, bound)
    elif isinstance(value, bool) == isinstance(pattern, bool) and bool(pattern == value):  # 1 is 1.0, and not True
        yield bound


def _bind(name: str, value: Any, bound: Bound) -> Iterator[Bound]:
    if not name:
        yield bound
    elif name not in bound:
        yield {**bound, name: value}
    elif bound[name] is value or (not isinstance(value, Node) and bool(bound[name] == value)):
        yield bound


def _calls(pattern: Call, value: Any, bound: Bound) -> Iterator[Bound]:
    if not is_op(value, pattern.target) or (pattern.sole and len(value.users) != 1):
        return
    if len(value.args) != len(pattern.args) and not (pattern.more and len(value.args) > len(pattern.args)):
        return
    if any(value.kwargs.get(key) != wanted for key, wanted in pattern.options.items()):
        return
    if pattern.where is not None and not pattern.where(value):
        return
    for named in _bind(pattern.name, value, bound):
        yield from _together(pattern.args, value.args, named)
        if pattern.target in _COMMUTATIVE:
            yield from _together(pattern.args, value.args[::-1], named)


def _together(patterns: Sequence[Pattern], values: Sequence[Any], bound: Bound) -> Iterator[Bound]:
    """Every way in which each of ``values`` is as its pattern says, with one meaning of each name."""
    if not patterns:
        yield bound
        return
    for found in _solutions(patterns[0], values[0], bound):
        yield from _together(patterns[1:], values[1:], found)


__all__ = ["Any_", "Bound", "Call", "OneOf", "Pattern", "Through", "behind", "follows_from", "match"]
