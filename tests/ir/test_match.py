"""The matcher: what binds, what commutes, and what counts readers. Each condition has a value that breaks it."""

from __future__ import annotations

from typing import Any

import torch
from sketch import N, Sketch, aten, ops

from cosmos_export.ir.match import Any_, Call, OneOf, Through, behind, follows_from, match

ADD, MUL, SUB = aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor
X, Y = Any_("x"), Any_("y")


def two() -> tuple[Sketch, Any, Any]:
    s = Sketch()
    return s, s.input("x", (N, 8)), s.input("y", (N, 8))


def test_a_name_is_one_value() -> None:
    s, x, y = two()
    square, product = s.call(MUL, x, x), s.call(MUL, x, y)
    assert match(Call(MUL, X, X), square) == {"x": x}
    assert match(Call(MUL, X, X), product) is None
    assert match(Call(MUL, X, Y), product) == {"x": x, "y": y}
    assert match(Call(MUL, X, Y), product, {"x": y}) == {"x": y, "y": x}  # known before: the other order


def test_operands_of_a_commutative_operation_are_tried_in_both_orders() -> None:
    s, x, y = two()
    pattern = Call(ADD, Call(MUL, X, 2.0), Y)
    swapped = s.call(ADD, y, s.call(MUL, x, 2.0))
    assert match(pattern, swapped) == {"x": x, "y": y}
    assert match(Call(SUB, Call(MUL, X, 2.0), Y), s.call(SUB, y, s.call(MUL, x, 2.0))) is None


def test_a_wrong_start_is_taken_back() -> None:
    """The first order binds x to the wrong operand, which only the second product shows."""
    s, x, y = two()
    value = s.call(ADD, s.call(MUL, y, x), s.call(SUB, x, y))
    assert match(Call(ADD, Call(MUL, X, Y), Call(SUB, X, Y)), value) == {"x": x, "y": y}
    assert match(Call(ADD, Call(MUL, X, X), Call(SUB, X, Y)), value) is None


def test_readers_are_counted() -> None:
    s, x, y = two()
    inner = s.call(MUL, x, y)
    once = s.call(ADD, inner, 1.0)
    pattern = Call(ADD, Call(MUL, X, Y, sole=True), 1.0)
    assert match(pattern, once) is not None
    s.call(aten.neg.default, inner)
    assert match(pattern, once) is None and match(Call(ADD, Call(MUL, X, Y), 1.0), once) is not None


def test_numbers_options_and_conditions() -> None:
    s, x, _ = two()
    power, cast = s.call(aten.pow.Tensor_Scalar, x, 2), s.call(aten._to_copy.default, x, dtype=torch.bfloat16)
    assert match(Call(aten.pow.Tensor_Scalar, X, 2.0), power) and not match(Call(aten.pow.Tensor_Scalar, X, 3), power)
    assert not match(Call(aten.pow.Tensor_Scalar, X, True), power) and not match(True, 1) and match(True, True) == {}
    assert match(Call(aten._to_copy.default, X, dtype=torch.bfloat16), cast)
    assert not match(Call(aten._to_copy.default, X, dtype=torch.float16), cast)
    assert not match(Call(aten._to_copy.default, Any_("x", lambda v: False)), cast)
    assert not match(Call(aten._to_copy.default, X, where=lambda n: False), cast)
    assert match(Call(aten.pow.Tensor_Scalar, X, Any_("e"), name="p"), power) == {"p": power, "x": x, "e": 2}
    assert not match(Call(aten.pow.Tensor_Scalar, X), power) and match(
        Call(aten.pow.Tensor_Scalar, X, more=True), power
    )


def test_lists_alternatives_and_what_shows_a_value() -> None:
    s, x, y = two()
    joined = s.call(aten.cat.default, [x, y], 0)
    assert match(Call(aten.cat.default, [X, Y], 0), joined) == {"x": x, "y": y}
    assert not match(Call(aten.cat.default, [X], 0), joined) and not match(Call(aten.cat.default, X, 1), joined)
    either = OneOf(Call(aten.neg.default, X), Call(aten.exp.default, X))
    assert match(either, s.call(aten.exp.default, x)) == {"x": x} and match(either, joined) is None
    shown = s.call(aten.unsqueeze.default, s.call(aten.permute.default, joined, [1, 0]), 0)
    assert match(Through(ops.VIEWS, Call(aten.cat.default, [X, Y], 0)), shown) and behind(shown, ops.VIEWS) is joined
    assert match(Through({aten.unsqueeze.default}, Call(aten.cat.default, [X, Y], 0)), shown) is None


def test_what_follows_from_what() -> None:
    s, x, y = two()
    value = s.call(aten.neg.default, s.call(ADD, x, 1.0))
    assert follows_from(value, x) and follows_from(x, x) and not follows_from(value, y) and not follows_from(x, value)
