"""Values that were passed where the path of a file is accepted too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class InMemory(Generic[Value]):
    """A value in place of a file. As text it is what messages call it."""

    value: Value
    name: str
    """Name of the value in messages, such as ``the actions passed``."""

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"InMemory({self.name})"
