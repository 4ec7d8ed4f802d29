"""Symbolic dimensions: canonical forms, proofs of equality and sign, and the binding of dims from actual shapes."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from cosmos_export.ir.dims import (
    Dim,
    Size,
    bind,
    equal,
    evaluate,
    floor_div,
    non_negative,
    product,
    simplify,
    simplify_shape,
    symbol,
)

A, B = symbol("a"), symbol("b")
NAMES = ("a", "b")


@st.composite
def sizes(draw: st.DrawFn, depth: int = 3) -> Size:
    """Sums, products and halves of two dims and small numbers."""
    if depth == 0:
        return draw(st.one_of(st.integers(0, 9), st.sampled_from([A, B])))
    left, right = draw(sizes(depth=depth - 1)), draw(sizes(depth=depth - 1))
    kind = draw(st.sampled_from(["leaf", "add", "mul", "half"]))
    if kind == "add":
        return sympy.sympify(left) + right
    if kind == "mul":
        return sympy.sympify(left) * right
    return floor_div(sympy.sympify(left) + 1, 2) if kind == "half" else left


bindings = st.fixed_dictionaries({name: st.integers(0, 50) for name in NAMES})


def by_python(value: Size, binding: dict[str, int]) -> int:
    """``str`` of a size is Python over the names of its dims."""
    return int(eval(str(value), {}, binding))


@given(sizes(), bindings)
def test_a_size_evaluates_to_what_its_text_says(value: Size, binding: dict[str, int]) -> None:
    assert evaluate(value, binding) == by_python(value, binding)


@given(sizes(), bindings)
def test_the_canonical_form_has_the_same_value(value: Size, binding: dict[str, int]) -> None:
    canonical = simplify(value)
    assert evaluate(canonical, binding) == evaluate(value, binding)
    assert simplify(canonical) == canonical
    assert isinstance(canonical, int) or not canonical.is_number


@given(sizes(), sizes(), bindings)
def test_equal_is_sound(a: Size, b: Size, binding: dict[str, int]) -> None:
    if equal(a, b):
        assert evaluate(a, binding) == evaluate(b, binding)


@given(sizes(), sizes(), sizes())
def test_equal_sees_through_the_laws_of_sums_and_products(a: Size, b: Size, c: Size) -> None:
    x, y, z = (sympy.sympify(v) for v in (a, b, c))
    assert equal(x + y, y + x) and equal((x + y) * z, x * z + y * z)
    assert equal(x - x, 0) and not equal(x + 1, x)


@given(sizes(), sizes(), bindings)
def test_non_negative_is_sound(a: Size, b: Size, binding: dict[str, int]) -> None:
    difference = sympy.sympify(a) - b
    if non_negative(difference):
        assert evaluate(difference, binding) >= 0


@given(sizes())
def test_sizes_are_not_negative(value: Size) -> None:
    """What passes rely on: a sum of products of dims is shown to be non-negative, halves included."""
    assert non_negative(value)
    assert not non_negative(-1 - sympy.sympify(value))


@given(st.integers(0, 1000), st.integers(1, 9))
def test_floor_div_is_pythons(value: int, divisor: int) -> None:
    assert floor_div(value, divisor) == value // divisor
    assert evaluate(floor_div(A, divisor), {"a": value}) == value // divisor


def test_products_and_shapes() -> None:
    assert product([]) == 1 and product([2, 3]) == 6 and equal(product([A, B, 2]), 2 * A * B)
    assert simplify_shape([sympy.Integer(3), A + 0, 4]) == (3, A, 4)
    assert type(simplify_shape([sympy.Integer(3)])[0]) is int
    assert Dim("a", 0, 4).symbol is A


@given(st.integers(0, 99), st.integers(0, 99))
def test_dims_bind_from_shapes(a: int, b: int) -> None:
    found = bind([("x", (A, 3), (a, 3)), ("y", (B, A), (b, a)), ("z", (A + B,), (a + b,))])
    assert found == {"a": a, "b": b}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([("x", (A,), (1, 2))], r"`x` has rank 2, expected 1: \(a,\)"),
        ([("x", (A, 3), (1, 4))], "`x` has size 4 on axis 1, expected 3"),
        ([("x", (A,), (1,)), ("y", (2, A), (2, 5))], "`y` has a = 5 on axis 1, another input has 1"),
        ([("z", (A * B,), (5,)), ("x", (A, B), (2, 2))], r"`z` has size 5 on axis 0, expected a\*b = 4"),
        ([("z", (2 * A,), (5,))], "`z` has size 5 on axis 0, expected a multiple of 2"),
        ([("x", (A,), (2,)), ("z", (2 * A,), (6,))], r"`z` has 2\*a = 6 on axis 0, another input has a = 2"),
    ],
    ids=["rank", "fixed size", "two inputs disagree", "composite size", "no multiple", "multiple that disagrees"],
)
def test_shapes_that_do_not_fit_are_named(shapes: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bind(shapes)  # type: ignore[arg-type]


def test_a_composite_size_stands_for_itself_where_its_dims_are_unknown() -> None:
    """A graph that sees ⌈a/2⌉ and never a can still compute with ⌈a/2⌉."""
    half = floor_div(A + 1, 2)
    binding = bind([("rows", (half,), (4,)), ("x", (B,), (3,))])
    assert evaluate(half * B + half, binding) == 16


@pytest.mark.parametrize("value", [A, A + 1, A / 2])
def test_a_size_without_a_value_is_an_error(value: Size) -> None:
    with pytest.raises(ValueError, match="is not an integer under"):
        evaluate(value, {"b": 3} if value is not A / 2 else {"a": 3})
