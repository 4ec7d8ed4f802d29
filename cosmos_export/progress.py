"""Progress as a callback: long work reports here, and the command line, a notebook or a test decides what to show."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the advance of named tasks. Tasks may nest; names are shown as they are."""

    def begin(self, task: str, total: int | None = None) -> None:
        """``task`` starts; ``total`` is its number of units where known."""

    def update(self, task: str, completed: int) -> None:
        """``completed`` units of ``task`` are done (absolute, never decreasing)."""

    def end(self, task: str) -> None:
        """``task`` is over."""


class Silent:
    """Shows nothing."""

    def begin(self, task: str, total: int | None = None) -> None: ...

    def update(self, task: str, completed: int) -> None: ...

    def end(self, task: str) -> None: ...
