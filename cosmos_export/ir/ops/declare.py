"""The declaration of an operation: reference, rule of types and shapes, and what passes and backends may assume of it.

An operation is one of ATen's, or one that ATen lacks: a Python function on tensors, its reference, which `new_operator`
makes an operator of torch. The interpreter runs the reference, the verifier derives every type and shape by the rule,
and the form that compilers see without data (torch's "fake") follows from the rule, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import floordiv
from typing import Any, TypeVar

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from cosmos_export.ir.dims import Shape, Size, equal
from cosmos_export.ir.spec import TensorSpec

aten = torch.ops.aten
_NAMESPACE = "cosmos_export"

Rule = Callable[..., Any]
"""Operands (TensorSpec for values, plain Python otherwise) → type and shape of the result, or a tuple of them for an
operation with several results, which `ITEM` takes apart; SpecError where operands do not fit. Annotations say which
operands a graph document may have."""
R = TypeVar("R", bound=Callable[..., Any])
Rows = Sequence[int] | Callable[..., Sequence[int]]
"""Positions of operands, or a function of the operands as a rule takes them that returns such."""


class SpecError(ValueError):
    """Operands that the operation does not take."""


class Trait(Enum):
    """Facts that may be assumed of an operation. Each is a law that tests/ir/test_operations.py checks on samples."""

    ELEMENTWISE = "each element of the result follows from the elements of the operands at its place"
    COMMUTATIVE = "the order of the two operands does not matter"
    VIEW = "moves, repeats or converts elements and computes nothing: free to repeat where it is read"
    PART = "takes some elements of one value"
    JOIN = "puts values behind each other along one axis"
    WRITES = "a value, some elements of which are those of another"
    CREATES = "reads no value"
    CONVOLUTION = "a convolution, which may pad its operand with zeros itself"
    ATTENDS = "rows of queries [N, heads, d] attend to rows of keys and values [M, heads, d]"
    JOINT = "attends to its own rows (operands 1 and 2) and to those of the prompt (operands 3 and 4)"
    ACTIVATION = "the non-linearity between the two products of an MLP"
    ROUNDS = "rounds activations to a narrow type"
    WIDENS = "narrow numbers, multiplied by their scales"
    FUSED = "what one of this project's kernels computes; only graphs for a backend that has it contain such"
    BLOCKS = "works on four-bit floats in blocks, which have a scale each"


@dataclass(frozen=True)
class Operation:
    """An operation of the dialect."""

    target: Any
    """The function that nodes call."""
    rule: Rule
    reference: Callable[..., Any]
    """The result on tensors, as the interpreter computes it."""
    traits: frozenset[Trait]
    rows: Rows
    """Operands whose rows are those of the result: its row i follows from row i of these, and from the whole of all
    other operands. An elementwise operation repeats operands of lower rank or with one row."""

    def row_positions(self, *operands: Any, **options: Any) -> Sequence[int]:
        """`rows` for these operands, as a rule takes them."""
        return self.rows(*operands, **options) if callable(self.rows) else self.rows


OPERATIONS: dict[Any, Operation] = {}
"""Target → operation, for all of the dialect."""


def operation(
    *targets: Any,
    traits: Collection[Trait] = (),
    rows: Rows = (),
    reference: Callable[..., Any] | None = None,
    first: torch.dtype | None = None,
) -> Callable[[R], R]:
    """Declare ``targets``, to which the decorated rule applies.

    ``rows``: as `Operation.rows`. ``reference``: what the interpreter runs (default: the target). ``first``: the type
    of the first operand where torch has no tensors of it; references take int8 for INT4 and float32 for E2M1.
    """

    def declare(rule: R) -> R:
        for target in targets:
            if target in OPERATIONS:
                raise ValueError(f"{target} is declared twice")
            OPERATIONS[target] = Operation(target, rule, reference or target, frozenset(traits), rows)
            if target in _DEFINITIONS:
                _DEFINITIONS[target].register_fake(_fake(rule, first))
        return rule

    return declare


def having(*traits: Trait) -> frozenset[Any]:
    """Targets of the operations that have all of ``traits``."""
    return frozenset(target for target, one in OPERATIONS.items() if one.traits.issuperset(traits))


_DEFINITIONS: dict[Any, Any] = {}
"""Target → its definition in torch, for operations that ATen lacks."""


def new_operator(reference: Callable[..., Any]) -> Any:
    """The target of an operation that ATen lacks, called as ``reference`` is, which computes it."""
    name = reference.__name__
    definition = torch.library.custom_op(f"{_NAMESPACE}::{name}", reference, mutates_args=())
    target = getattr(torch.ops, _NAMESPACE).__getattr__(name).default
    _DEFINITIONS[target] = definition
    return target


def _fake(rule: Rule, first: torch.dtype | None) -> Callable[..., Any]:
    """``rule`` as a function of tensors without data, whose sizes may be open (SymInt)."""

    def fake(*operands: Any) -> Any:
        symbols: dict[Any, sympy.Symbol] = {}
        sizes: dict[sympy.Symbol, Any] = {}

        def size(value: Any) -> Size:
            if isinstance(value, int):
                return value
            expr = value.node.expr
            if expr.is_Integer:
                return int(expr)
            if expr not in symbols:
                symbols[expr] = sympy.Symbol(f"size_{len(symbols)}", integer=True, nonnegative=True)
                sizes[symbols[expr]] = value
            return symbols[expr]

        def spec(value: Any, dtype: torch.dtype | None = None) -> Any:
            if isinstance(value, torch.Tensor):
                return TensorSpec(dtype or value.dtype, tuple(map(size, value.shape)))
            return [spec(v) for v in value] if isinstance(value, (list, tuple)) else value

        def computed(expr: Any) -> Any:
            if isinstance(expr, int) or expr.is_Integer:
                return int(expr)
            if expr in sizes:
                return sizes[expr]
            parts = [computed(part) for part in expr.args]
            if isinstance(expr, FloorDiv):
                return floordiv(*parts)
            result = parts[0]
            for part in parts[1:]:
                result = result + part if isinstance(expr, sympy.Add) else result * part
            return result

        tensor = next(o for o in operands if isinstance(o, torch.Tensor))
        found = rule(spec(operands[0], first), *map(spec, operands[1:]))
        results = [
            tensor.new_empty([computed(s) for s in one.shape], dtype=one.dtype)
            for one in (found if isinstance(found, tuple) else (found,))
        ]
        return tuple(results) if isinstance(found, tuple) else results[0]

    return fake


# -- what rules have in common -----------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """Raise SpecError with ``message`` unless ``condition``."""
    if not condition:
        raise SpecError(message)


def axis_of(dim: int, rank: int) -> int:
    """``dim`` counted from the front; raises SpecError when out of range."""
    require(-rank <= dim < rank, f"axis {dim} of a value of rank {rank}")
    return dim % rank


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape of an elementwise result; SpecError where sizes differ and neither is 1."""
    rank = max(map(len, shapes))
    result: list[Size] = []
    for axis in range(rank):
        size: Size = 1
        for shape in shapes:
            index = axis - rank + len(shape)
            if index < 0 or equal(shape[index], 1):
                continue
            if not equal(size, 1) and not equal(size, shape[index]):
                raise SpecError(f"sizes {size} and {shape[index]} do not broadcast")
            size = shape[index]
        result.append(size)
    return tuple(result)
