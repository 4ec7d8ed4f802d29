"""Sizes as trees of JSON, and back by constructors alone: no text of a document is evaluated.

A size is an integer, ``{"dim": name}``, or ``{kind: [size, …]}`` with one of the four kinds of nodes. What is read is
bounded, so that no document takes long: an expression has few nodes, and few terms once its products are written out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from keyword import iskeyword
from typing import Any, TypeAlias

import sympy
from torch.utils._sympy.functions import FloorDiv

from cosmos_export.diagnostics import shown
from cosmos_export.ir.dims import Size, simplify, symbol
from cosmos_export.ir.spec import TensorSpec

MAX_INTEGER = 2**63 - 1
MAX_NODES = 256
"""Nodes of one expression."""
MAX_DEPTH = 32
MAX_TERMS = 64
"""Terms of one expression, and of the product of all sizes of a value, once written out as a sum of products."""
MAX_DEGREE = 32
"""Factors of one term."""
MAX_SIZES = 4096
"""Different expressions in one document: published models have some dozens."""
MAX_RANK = 16
MAX_NAME = 256

_KINDS: Mapping[str, Any] = {"add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow, "floordiv": FloorDiv}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def size_tree(value: Size) -> Any:
    """``value`` as plain data. ValueError where it has no form in a document."""
    value = simplify(value)
    if isinstance(value, int):
        return value
    if isinstance(value, sympy.Symbol):
        return {"dim": value.name}
    for kind, constructor in _KINDS.items():
        if isinstance(value, constructor):
            if kind == "pow" and not (value.exp.is_Integer and value.exp > 0):
                break
            return {kind: [size_tree(term) for term in value.args]}
    raise ValueError(f"size {value} has no form in a document")


def identifier(value: Any) -> str:
    """``value`` where it is a name as Python has them, which code may be generated with; ValueError otherwise."""
    if isinstance(value, str) and len(value) <= MAX_NAME and _IDENTIFIER.fullmatch(value) and not iskeyword(value):
        return value
    raise ValueError(f"{shown(value)} is not a name of letters, digits and _")


def integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER:
        return value
    raise ValueError(f"{shown(value)} is not an integer of 64 bits")


def check_sizes(spec: TensorSpec) -> TensorSpec:
    """``spec`` where a value may have it: ValueError for negative sizes and for more than the limits allow."""
    if spec.rank > MAX_RANK:
        raise ValueError(f"a value has {spec.rank} axes, at most {MAX_RANK} are allowed")
    for size in spec.shape:
        if not isinstance(size, int):
            _check_expression(size)
        elif not 0 <= size <= MAX_INTEGER:
            raise ValueError(f"size {size} is outside 0 … {MAX_INTEGER}")
    check_product(spec.shape)
    return spec


def check_product(sizes: Iterable[Size]) -> None:
    """ValueError where the product of ``sizes`` has too many terms once it is written out."""
    if math.prod(len(sympy.Add.make_args(size)) for size in sizes if not isinstance(size, int)) > MAX_TERMS:
        raise ValueError(f"the product of the sizes of a value has more than {MAX_TERMS} terms")


@lru_cache(maxsize=65536)
def _check_expression(size: sympy.Expr) -> None:
    if not size.is_integer or size.is_nonpositive:
        raise ValueError(f"{shown(str(size))} is not a size")
    if sum(1 for _ in islice(sympy.preorder_traversal(size), MAX_NODES + 1)) > MAX_NODES:
        raise ValueError(f"a size has more than {MAX_NODES} nodes")


@dataclass(frozen=True)
class _Tree:
    expression: sympy.Expr
    nodes: int
    terms: int
    degree: int


class SizeReader:
    """Reads the sizes of one document, each different one once."""

    def __init__(self) -> None:
        self._known: dict[_Plain, Size] = {}

    def read(self, value: Any) -> Size:
        """The size that ``value`` describes. ValueError where it describes none, or more than the limits allow."""
        plain = _checked(value, 0)
        if isinstance(plain, int):
            return plain
        if plain not in self._known:
            if len(self._known) >= MAX_SIZES:
                raise ValueError(f"more than {MAX_SIZES} different sizes")
            size = simplify(_tree(plain).expression)
            self._known[plain] = integer(size) if isinstance(size, int) else size
        return self._known[plain]


_Plain: TypeAlias = "int | tuple[str, str] | tuple[str, tuple[_Plain, ...]]"
"""A tree whose types and names are right."""


def _checked(value: Any, depth: int) -> _Plain:
    if not isinstance(value, dict):
        return integer(value)
    if len(value) != 1:
        raise ValueError(f"{shown(value)} is not a size: one kind is expected")
    ((kind, content),) = value.items()
    if kind == "dim":
        return "dim", identifier(content)
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of size {shown(kind)}")
    if not isinstance(content, list) or not 0 < len(content) <= MAX_NODES:
        raise ValueError(f"`{kind}` of {shown(content)} is not a list of at most {MAX_NODES} sizes")
    if depth >= MAX_DEPTH:
        raise ValueError(f"a size is nested more than {MAX_DEPTH} deep")
    return kind, tuple(_checked(item, depth + 1) for item in content)


def _tree(plain: _Plain) -> _Tree:
    if isinstance(plain, int):
        return _Tree(sympy.Integer(plain), 1, 1, 1)
    kind, content = plain
    if isinstance(content, str):
        return _Tree(symbol(content), 1, 1, 1)
    parts = [_tree(item) for item in content]
    make, terms, degree = _joined(kind, parts)
    nodes = 1 + sum(part.nodes for part in parts)
    for name, found, most in (
        ("nodes", nodes, MAX_NODES),
        ("terms", terms, MAX_TERMS),
        ("factors", degree, MAX_DEGREE),
    ):
        if found > most:
            raise ValueError(f"a size has more than {most} {name}")
    return _Tree(make(), nodes, terms, degree)


def _joined(kind: str, parts: list[_Tree]) -> tuple[Callable[[], sympy.Expr], int, int]:
    """The function that makes a node of ``parts``, with its terms and factors; nothing is computed before these are
    checked."""

    def make() -> sympy.Expr:
        return _KINDS[kind](*(part.expression for part in parts))

    terms, degrees = [part.terms for part in parts], [part.degree for part in parts]
    if kind == "add":
        return make, sum(terms), max(degrees)
    if kind == "mul":
        return make, math.prod(terms), sum(degrees)
    if len(parts) != 2 or not parts[1].expression.is_Integer or parts[1].expression < 1:
        raise ValueError(f"`{kind}` takes a size and a positive integer")
    if kind == "floordiv":
        return make, 1, max(degrees)
    power = min(int(parts[1].expression), MAX_DEGREE + 1)
    return make, min(terms[0], MAX_TERMS + 1) ** power, degrees[0] * power
