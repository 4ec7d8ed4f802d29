"""Symbolic dimensions: shapes are integers or expressions over named dims (`und_len`, `frames`, `height`, `width` …).

A dim is never a node of a graph. Every graph binds its dims from the shapes of its inputs, so the same expression means
the same thing in every graph of a program. ``str(expr)`` is valid Python over the dim names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TypeAlias

import sympy
from torch.utils._sympy.functions import FloorDiv

Size: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Size, ...]


@dataclass(frozen=True)
class Dim:
    """A named dimension and the inclusive range in which the program is valid."""

    name: str
    min: int
    max: int
    meaning: str = ""

    @property
    def symbol(self) -> sympy.Symbol:
        return symbol(self.name)


@cache
def symbol(name: str) -> sympy.Symbol:
    """The symbol of a dim: a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def expression(size: Size) -> sympy.Expr:
    """``size`` as an expression. TypeError for anything else: sympy would evaluate a text as Python."""
    if isinstance(size, sympy.Expr):
        return size
    if isinstance(size, int) and not isinstance(size, bool):
        return sympy.Integer(size)
    raise TypeError(f"a size is an integer or an expression, not {type(size).__name__}")


def floor_div(value: Size, divisor: int) -> Size:
    return simplify(FloorDiv(expression(value), sympy.Integer(divisor)))


@lru_cache(maxsize=65536)
def _simplify(expr: sympy.Expr) -> Size:
    expanded = sympy.expand(expr)
    return int(expanded) if expanded.is_Integer else expanded


def simplify(value: Size) -> Size:
    """Canonical form: a Python int where the value is one, an expanded expression otherwise."""
    return value if isinstance(value, int) and not isinstance(value, bool) else _simplify(expression(value))


@lru_cache(maxsize=65536)
def size_text(size: Size) -> str:
    """``str(size)``, which takes sympy long for an expression."""
    return str(size)


def simplify_shape(shape: Iterable[Size]) -> Shape:
    return tuple(simplify(s) for s in shape)


def equal(a: Size, b: Size) -> bool:
    """Provably equal for every value of the dims."""
    if a == b or (isinstance(a, int) and isinstance(b, int)):
        return bool(a == b)
    return simplify(expression(a) - expression(b)) == 0


def non_negative(value: Size) -> bool:
    """Provably ``>= 0`` for every value of the dims: a sum of products of non-negative terms."""
    value = simplify(value)
    return value >= 0 if isinstance(value, int) else bool(value.is_nonnegative)


def product(sizes: Iterable[Size]) -> Size:
    result: sympy.Expr = sympy.Integer(1)
    for size in sizes:
        result = result * size
    return simplify(result)


def evaluate(value: Size, binding: Mapping[str, int]) -> int:
    """The integer that ``value`` has under the bound dims and composite sizes. ValueError where it has none."""
    if isinstance(value, int):
        return value
    known = tuple((part, binding[name]) for part, name in _named_parts(value) if name in binding)
    result = _replaced(value, known)
    if result is None:
        raise ValueError(f"{value} is not an integer under {dict(binding)}")
    return result


@lru_cache(maxsize=65536)
def _named_parts(value: sympy.Expr) -> tuple[tuple[sympy.Expr, str], ...]:
    """The dims and composite sizes in ``value``, with the names that bindings have for them."""
    return tuple((part, str(part)) for part in value.atoms(sympy.Symbol, FloorDiv))


@lru_cache(maxsize=65536)
def _replaced(value: sympy.Expr, known: tuple[tuple[sympy.Expr, int], ...]) -> int | None:
    """``value`` with numbers in the place of parts of it; None where that is no integer."""
    result = value.xreplace({part: sympy.Integer(number) for part, number in known})
    return int(result) if result.is_Integer else None


def bind(shapes: Iterable[tuple[str, Shape, tuple[int, ...]]]) -> dict[str, int]:
    """Dim values from actual shapes; ``shapes`` holds (what, symbolic shape, actual shape).

    Raises ValueError where two inputs disagree, a fixed size differs, or a size does not follow from the dims.
    """
    binding: dict[str, int] = {}
    derived: list[tuple[str, int, sympy.Expr, int]] = []
    for what, shape, actual in shapes:
        if len(shape) != len(actual):
            raise ValueError(f"`{what}` has rank {len(actual)}, expected {len(shape)}: {shape}")
        for axis, (size, value) in enumerate(zip(shape, actual, strict=True)):
            if isinstance(size, int):
                if size != value:
                    raise ValueError(f"`{what}` has size {value} on axis {axis}, expected {size}")
            elif size.is_Symbol:
                known = binding.setdefault(size.name, value)
                if known != value:
                    raise ValueError(f"`{what}` has {size} = {value} on axis {axis}, another input has {known}")
            elif size.as_coeff_Mul()[1].is_Symbol:
                factor, dim = size.as_coeff_Mul()
                if value % factor:
                    raise ValueError(f"`{what}` has size {value} on axis {axis}, expected a multiple of {factor}")
                known = binding.setdefault(dim.name, value // int(factor))
                if known * factor != value:
                    raise ValueError(f"`{what}` has {size} = {value} on axis {axis}, another input has {dim} = {known}")
            else:
                derived.append((what, axis, size, value))
    for what, axis, size, value in derived:
        # A composite size checks the dims where they are all known; otherwise it stands for itself.
        if all(s.name in binding for s in size.free_symbols):
            expected = evaluate(size, binding)
            if expected != value:
                raise ValueError(f"`{what}` has size {value} on axis {axis}, expected {size} = {expected}")
        else:
            binding[str(size)] = value
    return binding
