"""Recognise the model's building blocks in the exporter's primitives."""

from __future__ import annotations

from typing import Any, ClassVar

import sympy
import torch

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, equal, expression, non_negative, simplify
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of
from cosmos_export.ir.match import Any_, Bound, Call, OneOf, Pattern, match
from cosmos_export.ir.ops import Trait, aten
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.passes.base import Pass, PassResult
from cosmos_export.passes.rewriting import ELEMENTWISE, Slicer, eliminate_common, uniform_value

_SWAPPED = [0, 2, 1, 3]
"""The permutation between [batch, rows, heads, d] and [batch, heads, rows, d]."""


class Normalize(Pass):
    """One node for each norm, rotation, gated activation and attention; equal values once.

    * ``rms_norm(x, w) = cast(x · rsqrt(mean(x²) + eps)) · w``, with the cast where the model rounds;
    * ``rotary(x, c, s) = x · [c, c] + rotate_half(x) · [s, s]``, where the tables are shown to repeat their halves;
    * ``swiglu(g, u) = silu(g) · u``;
    * ``attention`` on rows [N, heads, d] in place of the transposed, batched form;
    * writes into a strided part become ``where`` with a constant mask; multiplication by ones goes.

    Numerical effect: none, the same operations in the same order of rounding.
    Left alone: a look-alike with another axis, another exponent, or tables that do not repeat their halves.
    """

    name = "normalize"
    law = "primitives = the building block they spell: `rms_norm`, `rotary`, `swiglu`, `attention`"
    removes: ClassVar[frozenset[object]] = frozenset({
        aten.rsqrt.default, aten.mean.dim, aten.scaled_dot_product_attention.default, aten.slice_scatter.default,
        aten.select_scatter.default,
    })  # fmt: skip
    phase = "form"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            for clean in (self._forward, self._scatters):
                clean(graph, result)
            result.changes["common subexpressions"] += eliminate_common(graph)
            for recognise in (self._norms, self._gates, self._attention, self._rotations):
                recognise(graph, result)
                graph.eliminate_dead_code()
            result.changes["common subexpressions"] += eliminate_common(graph)
        result.changes = +result.changes
        return result

    # -- clean-up -----------------------------------------------------------------------------------------------------

    def _forward(self, graph: Graph, result: PassResult) -> None:
        """Values that pass through an operation unchanged."""
        for node in graph.calls():
            value = _unchanged(node)
            if value is not None:
                graph.replace(node, value)
                result.changes["identities"] += 1
        graph.eliminate_dead_code()

    def _scatters(self, graph: Graph, result: PassResult) -> None:
        """``slice_scatter(x, y[r], r) = where(r, y, x)``: what a model writes in place, as a selection."""
        for node in graph.calls(aten.slice_scatter.default):
            base, source, *part = node.args
            axis, start, end, step = part
            size = spec_of(node).shape[axis]
            whole = source.args[0] if is_op(source, aten.slice.Tensor) and _part(source) == part else None
            if (
                whole is None
                or spec_of(whole) != spec_of(node)
                or not all(isinstance(i, int) for i in (size, start, end))
            ):
                result.decline(node, "writes a part that is not the same part of another value of fixed size")
                continue
            mask = torch.zeros(size, dtype=torch.bool)
            mask[start:end:step] = True
            shape = [1] * spec_of(node).rank
            shape[axis] = size
            constant = graph.add_constant(f"{node.name}_mask", mask.reshape(shape), module=node.meta["module"])
            new = graph.call(aten.where.self, constant, whole, base, before=node, like=node, by=self.name)
            graph.replace(node, new)
            result.changes["writes in place"] += 1
        for node in graph.calls(aten.select_scatter.default):
            base, written, *_ = node.args
            for user in list(node.users):
                same = _same_row(user, node) if is_op(user, aten.select.int) else None
                if same is None:
                    continue
                if same:
                    graph.replace(user, written)
                else:
                    user.replace_input_with(node, base)
                result.changes["writes in place"] += 1
        graph.eliminate_dead_code()

    # -- building blocks ----------------------------------------------------------------------------------------------

    def _norms(self, graph: Graph, result: PassResult) -> None:
        for end in graph.calls(aten.mul.Tensor):
            found = match(_NORM, end)
            if found is None or not _is_norm(end, found):
                continue
            norm = found["x"], found["weight"], float(found["eps"])
            graph.replace(end, graph.call(ops.RMS_NORM, *norm, before=end, like=end, by=self.name))
            result.changes["norms"] += 1
        graph.eliminate_dead_code()
        for root in graph.calls(aten.rsqrt.default):
            result.decline(root, "rsqrt that is not the root mean square of one value along its last axis")

    def _gates(self, graph: Graph, result: PassResult) -> None:
        for node in graph.calls(aten.mul.Tensor):
            found = match(_GATE, node)
            if found is not None and isinstance(found["up"], Node) and spec_of(found["silu"]) == spec_of(found["up"]):
                new = graph.call(ops.SWIGLU, found["gate"], found["up"], before=node, like=node, by=self.name)
                graph.replace(node, new)
                result.changes["gated activations"] += 1

    def _attention(self, graph: Graph, result: PassResult) -> None:
        for node in graph.calls(aten.scaled_dot_product_attention.default):
            options = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
            options |= dict(zip(options, node.args[3:], strict=False)) | node.kwargs
            plain = options["attn_mask"] is None and options["dropout_p"] == 0.0
            (end,) = _readers(node, 2) or (None,)
            found = match(_ATTENTION, end) if plain and end is not None else None
            if found is None or end is None:
                result.decline(node, "attention with a mask, dropout, a batch, or another layout")
                continue
            causal, scale = bool(options["is_causal"]), options["scale"]
            head = spec_of(node).shape[-1]
            scale = float(head) ** -0.5 if scale is None else float(scale)
            rows = (found[name] for name in "qkv")
            new = graph.call(ops.ATTENTION, *rows, causal, scale, before=end, like=node, by=self.name)
            graph.replace(end, new)
            result.changes["attentions"] += 1

    def _rotations(self, graph: Graph, result: PassResult) -> None:
        slicer = Slicer(graph, self.name)
        for node in graph.calls(aten.add.Tensor):
            found = match(_ROTATION, node)
            if found is None or not _is_rotation(found):
                continue
            x, cos, sin = (found[name] for name in ("x", "cos", "sin"))
            half = spec_of(x).shape[-1] // 2
            if not (_repeats_halves(cos) and _repeats_halves(sin)):
                result.decline(node, "the two halves of its tables are not shown to be equal")
                continue
            tables = [slicer.of(table, 1, 0, half) for table in (cos, sin)]
            new = graph.call(ops.ROTARY, x, *tables, before=node, like=node, by=self.name)
            graph.replace(node, new)
            result.changes["rotations"] += 1


def _unchanged(node: Node) -> Node | None:
    """The operand that ``node`` equals, where it changes nothing."""
    if is_op(node, aten.cat.default) and len(node.args[0]) == 1:
        (only,) = node.args[0]
        assert isinstance(only, Node)
        return only
    if is_op(node, aten.permute.default) and is_op(_first(node), aten.permute.default):
        inner = _first(node)
        if [_order(inner)[i] for i in _order(node)] == list(range(spec_of(node).rank)):
            return _first(inner)
    if is_op(node, aten.mul.Tensor):
        for x, factor in (node.args, node.args[::-1]):
            if not isinstance(x, Node) or spec_of(x).dtype != spec_of(node).dtype:
                continue
            if isinstance(factor, (int, float)) and factor == 1:
                return x
            if uniform_value(factor) == 1.0:
                if spec_of(x).shape == spec_of(node).shape:
                    return x
                # `a + ones · x` is `a + x`: the sum repeats the rows itself.
                if all(is_op(u, aten.add.Tensor) and _covers(u, node) for u in node.users):
                    return x
    return None


def _same_row(read: Node, scatter: Node) -> bool | None:
    """Whether ``read`` selects the row that ``scatter`` writes; None where that depends on the request, or where they
    are along different axes."""
    spec = spec_of(scatter)
    axis, written = ops.axis_of(scatter.args[2], spec.rank), scatter.args[3]
    if ops.axis_of(read.args[1], spec.rank) != axis:
        return None
    from_front = [_from_front(index, spec.shape[axis]) for index in (read.args[2], written)]
    difference = simplify(from_front[0] - from_front[1])
    if equal(difference, 0):
        return True
    return False if non_negative(difference - 1) or non_negative(-difference - 1) else None


def _from_front(index: Size, size: Size) -> sympy.Expr:
    """An index counted from the front of an axis of ``size``."""
    return expression(size) + index if isinstance(index, int) and index < 0 else expression(index)


def _covers(user: Node, node: Node) -> bool:
    other = next((a for a in user.args if a is not node), None)
    return isinstance(other, Node) and all(map(equal, spec_of(other).shape, spec_of(user).shape))


# -- building blocks as the exporter writes them -----------------------------------------------------------------------


def _root(square: Pattern) -> Pattern:
    """The reciprocal root of the mean of squares along the last axis."""
    mean = Call(aten.mean.dim, square, [-1], True)
    eps = Any_("eps", lambda value: isinstance(value, float))
    return Call(aten.rsqrt.default, Call(aten.add.Tensor, mean, eps), sole=True)


_X, _WEIGHT = Any_("x"), Any_("weight", lambda value: isinstance(value, Node))
_WIDE = Call(aten._to_copy.default, _X, name="wide", dtype=torch.float32)
_SCALED = OneOf(
    Call(aten.mul.Tensor, OneOf(_X, _WIDE), _root(Call(aten.pow.Tensor_Scalar, _WIDE, 2)), sole=True),
    Call(aten.mul.Tensor, _X, _root(Call(aten.pow.Tensor_Scalar, _X, 2)), sole=True),
)
_NORM = OneOf(
    Call(aten.mul.Tensor, Call(aten._to_copy.default, _SCALED, name="rounded", sole=True), _WEIGHT),
    Call(aten.mul.Tensor, _SCALED, _WEIGHT),
)
_GATE = Call(aten.mul.Tensor, Call(aten.silu.default, Any_("gate"), name="silu", sole=True), Any_("up"))


def _batched(name: str) -> Pattern:
    return Call(aten.permute.default, Call(aten.unsqueeze.default, Any_(name), 0), _SWAPPED)


_ATTENTION = Call(
    aten.squeeze.dim,
    Call(
        aten.permute.default,
        Call(aten.scaled_dot_product_attention.default, *map(_batched, "qkv"), sole=True, more=True),
        _SWAPPED, sole=True,
    ),
    0,
)  # fmt: skip


def _turned() -> Pattern:
    """The halves of a head exchanged, the second one negated."""
    second = Call(aten.slice.Tensor, _X, Any_("last"), Any_("half"), Any_("size"))
    first = Call(aten.slice.Tensor, _X, Any_("last"), 0, Any_("half"))
    return Call(aten.cat.default, [Call(aten.neg.default, second), first], Any_("axis"))


_ROTATION = Call(
    aten.add.Tensor,
    Call(aten.mul.Tensor, _X, Call(aten.unsqueeze.default, Any_("cos"), 1)),
    Call(aten.mul.Tensor, _turned(), Call(aten.unsqueeze.default, Any_("sin"), 1)),
)
"""x · cos + cat(-x[d/2:], x[:d/2]) · sin, with tables [rows, d] for every head."""


def _is_norm(end: Node, found: Bound) -> bool:
    """Statistics in float32, and one factor per column, in the type to which the normal value is rounded."""
    x, weight = found["x"], found["weight"]
    computed = end.args[0] if end.args[1] is weight else end.args[1]
    fits = spec_of(weight) == TensorSpec(spec_of(end).dtype, spec_of(x).shape[-1:])
    return (
        fits and spec_of(found.get("wide", x)).dtype == torch.float32 and spec_of(computed).dtype == spec_of(end).dtype
    )


def _is_rotation(found: Bound) -> bool:
    """Whole heads [rows, heads, d] are turned; both halves of a table's row are looked at by the caller."""
    x = found["x"]
    rank, size = spec_of(x).rank, spec_of(x).shape[-1]
    if rank != 3 or not isinstance(size, int) or found["axis"] not in (-1, rank - 1):
        return False
    halves = (found["last"], found["half"], found["size"]) == (rank - 1, size // 2, size)
    return halves and all(spec_of(found[t]).shape == (spec_of(x).shape[0], size) for t in ("cos", "sin"))


def _readers(node: Node, steps: int) -> tuple[Node] | None:
    """The node that reads ``node`` after ``steps`` operations, each the only reader of the one before."""
    for _ in range(steps):
        if len(node.users) != 1:
            return None
        (node,) = node.users
    return (node,)


def _order(permutation: Node) -> list[int]:
    return list(permutation.args[1])


def _first(node: Node) -> Node:
    operand: Node = node.args[0]
    return operand


def _part(part: Node) -> list[Any]:
    """[axis, start, end, step] of a slice."""
    return [*part.args[1:], 1][:4]


def _repeats_halves(table: Node) -> bool:
    """``table`` [rows, d] is shown to be ``[t, t]``: elementwise work on ``cat(f, f)`` along its last axis."""
    node = table
    while True:
        rank = spec_of(node).rank
        if is_op(node, aten.cat.default):
            parts = node.args[0]
            last = (node.args[1] if len(node.args) > 1 else 0) in (-1, rank - 1)
            return last and len(parts) == 2 and parts[0] is parts[1]
        if is_op(node, *ELEMENTWISE) and len(node.all_input_nodes) == 1:
            pass
        elif is_op(node, aten.squeeze.dim, *ops.having(Trait.PART)):
            source: Node = node.args[0]
            if ops.axis_of(node.args[1], spec_of(source).rank) == spec_of(source).rank - 1:
                return False
        else:
            return False
        node = node.args[0]
