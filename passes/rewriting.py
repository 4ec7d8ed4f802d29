"""Tools that passes share: equal values made one, and slices moved towards the leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, equal, expression, non_negative, product, simplify
from cosmos_export.ir.graph import Graph, Node, is_op, map_operands, row_operands, spec_of
from cosmos_export.ir.match import behind
from cosmos_export.ir.ops import Trait, aten

ELEMENTWISE = ops.having(Trait.ELEMENTWISE)
MOVES = frozenset[Any]().union(
    *(ops.having(t) for t in (Trait.VIEW, Trait.PART, Trait.JOIN, Trait.WRITES, Trait.CREATES))
)
"""Operations that place elements."""
_COMMUTATIVE = ops.having(Trait.COMMUTATIVE)


def eliminate_common(graph: Graph) -> int:
    """Operations of equal target and operands become one. Returns how many went."""
    seen: dict[Any, Node] = {}
    count = 0
    for node in graph.calls():
        args, kwargs = list(node.args), dict(node.kwargs)
        if node.target in _COMMUTATIVE and all(isinstance(a, Node) for a in args):
            args.sort(key=lambda n: n.name)
        key = (node.target, _key(args), _key(kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            graph.replace(node, first)
            graph.erase(node)
            count += 1
    return count


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    # 1, 1.0 and True, 0.0 and -0.0 are equal to Python and different operands.
    return repr(value) if isinstance(value, (bool, int, float)) else value


def is_outer_product(node: Node) -> bool:
    """A matmul over an axis of size 1: every element is one product."""
    return is_op(node, aten.matmul.default) and spec_of(node.args[0]).shape[-1] == 1


def uniform_value(node: Any) -> float | None:
    """The one number that fills ``node``, where it is only views of a fill."""
    node = behind(node, ops.VIEWS)
    return float(node.args[1]) if is_op(node, aten.full.default) else None


class Slicer:
    """``slice(op(x))`` as ``op(slice(x))``, as far as the operations allow.

    ``of`` gives a value equal to ``value[start:end]`` along ``axis``; ``residual`` counts the slices it had to leave.
    Every rule is exact: elementwise and row-wise operations commute with taking rows. ``through`` limits the operations
    to pass; without a limit, operations that compute (linear, norm, attention) are done again for the rows taken.
    """

    def __init__(self, graph: Graph, by: str, through: frozenset[Any] | None = None) -> None:
        self._graph = graph
        self._by = by
        self._through = through
        self._memo: dict[Any, Node] = {}
        self.residual = 0

    def of(self, value: Node, axis: int, start: Size, end: Size) -> Node:
        start, end = simplify(start), simplify(end)
        if equal(start, 0) and equal(end, spec_of(value).shape[axis]):
            return value
        key = (value, axis, start, end)
        if key not in self._memo:
            allowed = value.op == "call_function" and (self._through is None or value.target in self._through)
            rule = _RULES.get(value.target, _rows) if allowed or is_outer_product(value) else None
            result = rule(self, value, axis, start, end) if rule else None
            self._memo[key] = result if result is not None else self._leave(value, axis, start, end)
        return self._memo[key]

    def _leave(self, value: Node, axis: int, start: Size, end: Size) -> Node:
        self.residual += 1
        return self.call(value, aten.slice.Tensor, value, axis, start, end)

    def call(self, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A part of ``like``, made where ``like`` is: after all that it needs, before all that reads it."""
        before = like.next
        while before.op == "placeholder":
            before = before.next
        return self._graph.call(target, *args, before=before, like=like, by=self._by, **kwargs)


SliceRule = Callable[[Slicer, Node, int, Size, Size], Node | None]


def _elementwise(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node:
    rank = spec_of(node).rank

    def operand(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        shape = spec_of(value).shape
        own = axis - rank + len(shape)
        return value if own < 0 or equal(shape[own], 1) else s.of(value, own, start, end)

    return s.call(node, node.target, *map(operand, node.args), **node.kwargs)


def _cat(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node | None:
    tensors: Sequence[Node] = node.args[0]
    at = ops.axis_of(node.args[1] if len(node.args) > 1 else 0, spec_of(node).rank)
    if at != axis:
        return s.call(node, aten.cat.default, [s.of(t, axis, start, end) for t in tensors], at)
    offsets: list[Size] = [0]
    for tensor in tensors:
        offsets.append(simplify(expression(offsets[-1]) + spec_of(tensor).shape[axis]))
    first = next((i for i, o in enumerate(offsets[:-1]) if equal(o, start)), None)
    last = next((i for i, o in enumerate(offsets) if i > (first or 0) and equal(o, end)), None)
    if first is not None and last is not None:
        part = list(tensors[first:last])
        return part[0] if len(part) == 1 else s.call(node, aten.cat.default, part, axis)
    for i, tensor in enumerate(tensors):
        low, high = expression(start) - offsets[i], expression(offsets[i + 1]) - end
        if non_negative(low) and non_negative(high):
            return s.of(tensor, axis, low, expression(end) - offsets[i])
    return None


def _unsqueeze(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node | None:
    at = ops.axis_of(node.args[1], spec_of(node).rank)
    if at == axis:
        return None
    inner = s.of(node.args[0], axis - (axis > at), start, end)
    return s.call(node, node.target, inner, at)


def _dropped_axis(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node:
    """squeeze and select: the axes behind the dropped one move up."""
    source: Node = node.args[0]
    at = ops.axis_of(node.args[1], spec_of(source).rank)
    inner = s.of(source, axis + (axis >= at), start, end)
    return s.call(node, node.target, inner, *node.args[1:])


def _permute(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node:
    order: Sequence[int] = node.args[1]
    inner = s.of(node.args[0], order[axis], start, end)
    return s.call(node, node.target, inner, list(order))


def _slice(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node | None:
    source, at, first, _, *step = node.args
    if at != axis:
        left = s.residual
        inner = s.of(source, axis, start, end)
        # Two slices of one value commute; exchanging them gains nothing and would never end.
        return s.call(node, node.target, inner, *node.args[1:]) if s.residual == left else None
    if step:
        return None
    offset = expression(first)
    return s.of(source, axis, offset + start, offset + end)


def _resized(shape: Sequence[Size], axis: int, start: Size, end: Size) -> list[Size]:
    result = list(shape)
    result[axis] = simplify(expression(end) - start)
    return result


def _expand(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node:
    source: Node = node.args[0]
    shape = spec_of(source).shape
    own = axis - spec_of(node).rank + len(shape)
    inner = source if own < 0 or equal(shape[own], 1) else s.of(source, own, start, end)
    return s.call(node, node.target, inner, _resized(spec_of(node).shape, axis, start, end))


def _view(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node | None:
    """A view keeps an axis when the axes before it, taken together, and its size are the same on both sides."""
    source: Node = node.args[0]
    shape, original = spec_of(node).shape, spec_of(source).shape
    for own, size in enumerate(original):
        if equal(size, shape[axis]) and equal(product(original[:own]), product(shape[:axis])):
            inner = s.of(source, own, start, end)
            return s.call(node, node.target, inner, _resized(shape, axis, start, end))
    return None


def _linear(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node | None:
    if axis == spec_of(node).rank - 1:
        return None
    inner = s.of(node.args[0], axis, start, end)
    return s.call(node, node.target, inner, *node.args[1:])


def _matmul(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node:
    a, b = node.args
    rank = spec_of(node).rank

    def along(value: Any, skip: int) -> Any:
        shape = spec_of(value).shape
        own = axis - rank + len(shape)
        if axis == rank - skip or own < 0 or (axis < rank - 2 and equal(shape[own], 1)):
            return value
        return s.of(value, own, start, end)

    # Rows of the product are rows of `a`, columns are columns of `b`; batch axes belong to both.
    return s.call(node, node.target, along(a, 1), along(b, 2))


def _norm(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node | None:
    if axis == spec_of(node).rank - 1:
        return None
    inner = s.of(node.args[0], axis, start, end)
    return s.call(node, node.target, inner, *node.args[1:])


def _rows(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node | None:
    """Along the first axis, whatever has rows."""
    rows = row_operands(node) if axis == 0 else []
    if not rows:
        return None
    parts = {n: s.of(n, 0, start, end) for n in rows}
    args = map_operands(node.args, lambda n: parts.get(n, n))
    return s.call(node, node.target, *args, **node.kwargs)


def _scatter(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node | None:
    base, src, at, *rest = node.args
    if at == axis:
        return None
    own = axis - (axis > at) if is_op(node, aten.select_scatter.default) else axis
    parts = s.of(base, axis, start, end), s.of(src, own, start, end)
    return s.call(node, node.target, *parts, at, *rest)


def _arange(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node:
    first = expression(node.args[0])
    dtype: torch.dtype = node.kwargs["dtype"]
    return s.call(node, node.target, simplify(first + start), simplify(first + end), dtype=dtype)


def _full(s: Slicer, node: Node, axis: int, start: Size, end: Size) -> Node:
    shape = _resized(spec_of(node).shape, axis, start, end)
    return s.call(node, node.target, shape, node.args[1], **node.kwargs)


_RULES: dict[Any, SliceRule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    aten.cat.default: _cat,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _dropped_axis,
    aten.select.int: _dropped_axis,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    ops.RMS_NORM: _norm,
    aten.slice_scatter.default: _scatter,
    aten.select_scatter.default: _scatter,
    aten.arange.start: _arange,
    aten.full.default: _full,
}
