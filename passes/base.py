"""A pass rewrites a program into one that computes the same function, and gives a truthful account of what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from cosmos_export.diagnostics import UserError
from cosmos_export.ir.graph import Node
from cosmos_export.ir.program import Program
from cosmos_export.passes.options import PassOptions


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


class Effect(Enum):
    """Effect of a pass on the values that a program computes."""

    LABELS = "labels"
    """Nothing: it only says something about nodes."""
    EXACT = "exact"
    """The same function; sums may be taken in another order."""
    INTERFACE = "interface"
    """The same function of other inputs and outputs, as where the sampler moves into the loop."""
    ROUNDS = "rounds"
    """Values are rounded to a narrower type, as a recipe asks."""


class Pass(ABC):
    """One rewrite. Stateless; running it twice changes nothing the second time.

    Only `pipeline.run_passes` calls the three methods, in their order, with the verifier behind them. A docstring
    states the rewrite as an equation, when it does not apply, and its numerical effect.
    """

    name: ClassVar[str]
    law: ClassVar[str]
    """The rewrite as an equation, for the list of passes in the documentation."""
    effect: ClassVar[Effect] = Effect.EXACT
    removes: ClassVar[frozenset[object]] = frozenset()
    """Operations that are illegal in every program after this pass."""
    phase: ClassVar[str]
    """The phase of `cosmos_export.passes.pipeline` that runs it."""
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    """Names of passes of its phase that run before it, and after it. Together these leave one order."""

    @classmethod
    def made(cls, options: PassOptions) -> Pass | None:
        """The pass as a build with ``options`` runs it; None where they give it nothing to do."""
        return cls()

    def requires(self, program: Program) -> None:  # noqa: B027 - most passes need nothing
        """Raise `CannotApply` where ``program`` has not the property that the rewrite needs."""

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Rewrite ``program`` in place."""

    def ensures(self, program: Program) -> None:  # noqa: B027 - the verifier says most of it
        """Raise InternalError where the rewritten ``program`` has not the property that this pass promises."""


class CannotApply(UserError):
    """The program does not have the property a pass needs; the message names the first node that breaks it."""

    def __init__(self, name: str, node: Node, reason: str) -> None:
        super().__init__("CX220", f"{name}: {describe(node)}: {reason}", "the graph is in `build --until … --dump DIR`")


def describe(node: Node) -> str:
    module = node.meta.get("module")
    return f"`{node.name}`" + (f" of module `{module}`" if module else "")
