"""Configurations as tables: for each field its type, its range and the value that stands for a missing key.

Libraries that read these files trust them: a size of a billion hangs, a string where a number is meant ends in an error
of the library. A table is applied before any library sees the file, and the same one by every command.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_export.diagnostics import UserError, shown

_RESTORE = "compare the file with the one in the published repository"
REQUIRED: Any = object()
"""Marks a field without a default: its key must be there."""


@dataclass(frozen=True)
class Kind:
    """Values of a field. ``default`` is what the library takes where the key is missing."""

    default: Any

    def allows(self, value: Any) -> bool:
        """Whether ``value`` has the type and the range."""
        raise NotImplementedError

    def text(self) -> str:
        """The allowed values, in words."""
        raise NotImplementedError


@dataclass(frozen=True)
class Integer(Kind):
    """A whole number; a bool is none."""

    low: int
    high: int

    def allows(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def text(self) -> str:
        return f"a whole number from {self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Number(Kind):
    """A finite number, whole or not."""

    low: float
    high: float

    def allows(self, value: Any) -> bool:
        # The comparison is exact for whole numbers of any length, which no conversion to float is.
        return type(value) in (int, float) and self.low <= value <= self.high and math.isfinite(value)

    def text(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Flag(Kind):
    """True or false."""

    def allows(self, value: Any) -> bool:
        return type(value) is bool

    def text(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text(Kind):
    """A string of limited length."""

    longest: int = 1024

    def allows(self, value: Any) -> bool:
        return type(value) is str and len(value) <= self.longest

    def text(self) -> str:
        return f"text of at most {self.longest:,} characters"


@dataclass(frozen=True)
class Nullable(Kind):
    """Values that ``kind`` allows, or null."""

    kind: Kind

    def allows(self, value: Any) -> bool:
        return value is None or self.kind.allows(value)

    def text(self) -> str:
        return f"{self.kind.text()}, or null"


@dataclass(frozen=True)
class AnyOf(Kind):
    """Values that one of ``kinds`` allows."""

    kinds: tuple[Kind, ...]

    def allows(self, value: Any) -> bool:
        return any(kind.allows(value) for kind in self.kinds)

    def text(self) -> str:
        return ", or ".join(kind.text() for kind in self.kinds)


@dataclass(frozen=True)
class Items(Kind):
    """A list of ``shortest`` to ``longest`` values, each of ``kind``."""

    kind: Kind
    shortest: int
    longest: int

    def allows(self, value: Any) -> bool:
        if not isinstance(value, list | tuple) or not self.shortest <= len(value) <= self.longest:
            return False
        return all(map(self.kind.allows, value))

    def text(self) -> str:
        return f"a list of {self.shortest:,} to {self.longest:,} values, each {self.kind.text()}"


@dataclass(frozen=True)
class Record(Kind):
    """An object. Its keys in ``fields`` may be missing; others are not looked at."""

    fields: Mapping[str, Kind]

    def allows(self, value: Any) -> bool:
        return isinstance(value, dict) and all(
            kind.allows(value[name]) for name, kind in self.fields.items() if name in value
        )

    def text(self) -> str:
        fields = ", ".join(f"{name} is {kind.text()}" for name, kind in self.fields.items())
        return f"an object whose {fields}" if fields else "an object"


@dataclass(frozen=True)
class Only(Kind):
    """One of ``values``: any other names a model that this compiler does not know."""

    values: tuple[Any, ...]

    def allows(self, value: Any) -> bool:
        plain = list(value) if isinstance(value, tuple) else value
        return any(_same(plain, known) for known in self.values)

    def text(self) -> str:
        return " or ".join(map(repr, self.values))


def _same(a: Any, b: Any) -> bool:
    """Equal and of one type, also inside of lists: Python holds 1, 1.0 and True to be equal."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


Fields = Mapping[str, Kind]


def checked(config: Mapping[str, Any], fields: Fields, file: Path | str) -> dict[str, Any]:
    """Every field of ``fields`` with its value in ``config``, or its default. Keys of no field are left out.

    CX103: a value of the wrong type or out of its range, or a missing key without a default; CX104: a value that names
    another model.
    """
    values: dict[str, Any] = {}
    for name, kind in fields.items():
        value = config.get(name, kind.default)
        if value is REQUIRED:
            raise UserError("CX103", f"{file}: {name} is missing; allowed: {kind.text()}", _RESTORE)
        if not kind.allows(value):
            stated = f"{file}: {name} = {shown(value)}" if name in config else f"{file}: {name} is missing"
            if isinstance(kind, Only):
                what = f"{stated}, which is not supported" if name in config else stated
                hint = "restore the published file; a newer model needs a newer version of cosmos-export"
                raise UserError("CX104", f"{what}; this compiler knows {kind.text()}", hint)
            raise UserError("CX103", f"{stated}; allowed: {kind.text()}", _RESTORE)
        values[name] = value
    return values


def require(holds: bool, file: Path | str, what: str) -> None:
    """CX103 with ``what`` where two fields contradict each other."""
    if not holds:
        raise UserError("CX103", f"{file}: {what}", _RESTORE)
