"""What each stage of a build costs: seconds, bytes from and to the disk, and memory that no file backs.

Memory is sampled, of this process and of the builders it starts, so a peak shorter than the interval can be missed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_S = 0.05
_BLOCK_BYTES = 512
"""Size of a block in the counters of `getrusage`."""


@dataclass
class StageCost:
    """Cost of one stage, over all times it was entered."""

    seconds: float = 0.0
    read_bytes: int = 0
    """From the disk; what the page cache holds is not read again."""
    written_bytes: int = 0
    peak_anonymous_bytes: int = 0
    """Peak of this process and its builders together; 0 where the system does not tell."""


class Meter:
    """Measures stages. Use as a context manager around the build; stages do not overlap."""

    def __init__(self) -> None:
        self.stages: dict[str, StageCost] = {}
        self._current: StageCost | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="meter", daemon=True)
        self.peak_anonymous_bytes = 0
        self.peak_resident_bytes = 0
        """Largest resident set that this process or one of its builders had; 0 where the system does not tell."""

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what happens inside to stage ``name``."""
        cost = self.stages.setdefault(name, StageCost())
        before, start = _blocks(), time.perf_counter()
        outer, self._current = self._current, cost
        self._look()
        try:
            yield
        finally:
            self._look()
            self._current = outer
            cost.seconds += time.perf_counter() - start
            read, written = (after - first for after, first in zip(_blocks(), before, strict=True))
            cost.read_bytes += read * _BLOCK_BYTES
            cost.written_bytes += written * _BLOCK_BYTES

    def add(self, name: str, seconds: float) -> None:
        """Time that was measured elsewhere."""
        self.stages.setdefault(name, StageCost()).seconds += seconds

    def _sample(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        processes = [_memory(pid) for pid in (os.getpid(), *_children(os.getpid()))]
        found = sum(memory.get("RssAnon", 0) for memory in processes)
        # `getrusage` would hold the peak of whoever started this process; VmHWM is this program's own.
        resident = max(memory.get("VmHWM", 0) for memory in processes)
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, found)
        self.peak_resident_bytes = max(self.peak_resident_bytes, resident)
        current = self._current
        if current is not None:
            current.peak_anonymous_bytes = max(current.peak_anonymous_bytes, found)


def anonymous_bytes() -> int:
    """Memory no file backs, of this process and its children (Linux); 0 where it is not told."""
    return sum(_memory(pid).get("RssAnon", 0) for pid in (os.getpid(), *_children(os.getpid())))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    return found


def _memory(pid: int) -> dict[str, int]:
    """Bytes by the names that ``/proc`` has for them; empty where it does not tell."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(("RssAnon:", "VmHWM:")):
                name, kibibytes, _ = line.split()
                found[name.rstrip(":")] = int(kibibytes) * 1024
    return found


def _blocks() -> tuple[int, int]:
    """Blocks read and written by this process and by the builders that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_inblock for u in usage), sum(u.ru_oublock for u in usage)
