"""What a pass is: a rewrite of a program that computes the same function, and a truthful account of what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from cosmos_export.diagnostics import UserError
from cosmos_export.ir.graph import Node
from cosmos_export.ir.program import Program


@dataclass(frozen=True)
class Declined:
    """A place that looks like the pattern of a pass and was left alone."""

    where: str
    reason: str


@dataclass
class PassResult:
    """Counts of what changed, by kind, and the places that were declined."""

    changes: Counter[str] = field(default_factory=Counter)
    declined: list[Declined] = field(default_factory=list)

    @property
    def modified(self) -> bool:
        return bool(self.changes)

    def decline(self, node: Node, reason: str) -> None:
        self.declined.append(Declined(describe(node), reason))


class Pass(ABC):
    """One rewrite. Stateless; running it twice changes nothing the second time.

    ``removes`` lists operations that are illegal in every program after it.
    """

    name: ClassVar[str]
    removes: ClassVar[frozenset[object]] = frozenset()

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Rewrite ``program`` in place."""


class CannotApply(UserError):
    """The program does not have the property a pass needs; the message names the first node that breaks it."""

    def __init__(self, name: str, node: Node, reason: str) -> None:
        super().__init__("CX220", f"{name}: {describe(node)}: {reason}", "the graph is in `build --until … --dump DIR`")


def describe(node: Node) -> str:
    module = node.meta.get("module")
    return f"`{node.name}`" + (f" of module `{module}`" if module else "")
