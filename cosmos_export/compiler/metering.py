"""The stages of a build as they are timed and shown, and what each costs: seconds, bytes of the disk, and memory.

Memory is sampled, of this process and of the builders it starts, so a peak shorter than the interval can be missed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from cosmos_export.machine.process import disk_bytes, family_memory
from cosmos_export.progress import Progress

_INTERVAL_S = 0.05


@dataclass
class StageCost:
    """Cost of one stage, over all times it was entered."""

    seconds: float = 0.0
    read_bytes: int = 0
    """Bytes read from the disk; what the page cache holds is not read again."""
    written_bytes: int = 0
    peak_anonymous_bytes: int = 0
    """Peak of this process and its builders together; 0 where the system does not tell."""


@dataclass(frozen=True)
class Costs:
    """Time and memory of a build so far."""

    stages: Mapping[str, StageCost]
    peak_anonymous_bytes: int
    peak_resident_bytes: int
    """Largest resident set that this process or one of its builders had; 0 where the system does not tell."""

    @property
    def seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(cost.seconds for cost in self.stages.values())


class Meter:
    """Measures stages. Use as a context manager around the build; stages do not overlap."""

    def __init__(self) -> None:
        self._stages: dict[str, StageCost] = {}
        self._current: StageCost | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="meter", daemon=True)
        self._peak_anonymous_bytes = 0
        self._peak_resident_bytes = 0

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def costs(self) -> Costs:
        """The measurements until now."""
        stages = {name: replace(cost) for name, cost in self._stages.items()}
        return Costs(stages, self._peak_anonymous_bytes, self._peak_resident_bytes)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what happens inside to stage ``name``."""
        cost = self._stages.setdefault(name, StageCost())
        before, start = disk_bytes(), time.perf_counter()
        outer, self._current = self._current, cost
        self._look()
        try:
            yield
        finally:
            self._look()
            self._current = outer
            cost.seconds += time.perf_counter() - start
            read, written = (after - first for after, first in zip(disk_bytes(), before, strict=True))
            cost.read_bytes += read
            cost.written_bytes += written

    def add(self, name: str, seconds: float) -> None:
        """Add time that was measured elsewhere to a stage."""
        self._stages.setdefault(name, StageCost()).seconds += seconds

    def _sample(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        processes = family_memory()
        found = sum(memory.anonymous for memory in processes)
        self._peak_anonymous_bytes = max(self._peak_anonymous_bytes, found)
        self._peak_resident_bytes = max([self._peak_resident_bytes, *(one.peak_resident for one in processes)])
        current = self._current
        if current is not None:
            current.peak_anonymous_bytes = max(current.peak_anonymous_bytes, found)


class Stages:
    """Times stages and shows them. None begins once ``nothing_failed`` raises what happened beside them."""

    def __init__(
        self, meter: Meter, progress: Progress, nothing_failed: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        self.progress = progress
        """Progress for everything that a stage reports by itself."""
        self._meter = meter
        self._nothing_failed = nothing_failed

    @contextmanager
    def __call__(self, name: str, detail: str = "", *, shown: bool = True) -> Iterator[None]:
        """Time what happens inside as stage ``name``, and show it unless it shows itself."""
        self._nothing_failed()
        with self._meter.stage(name), self._task(f"{name} {detail}".strip()) if shown else nullcontext():
            yield

    @contextmanager
    def _task(self, name: str) -> Iterator[None]:
        self.progress.begin(name)
        try:
            yield
        finally:
            self.progress.end(name)
