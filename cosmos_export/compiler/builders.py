"""Builders of engines beside the rest of a build: two at a time where memory allows it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self, TypeVar

from cosmos_export.progress import Progress

AT_A_TIME = 2
"""A builder keeps one core busy."""
T = TypeVar("T")


class Cancelled(Exception):
    """The build has failed elsewhere, and nobody wants this engine any more."""


class Builders:
    """Runs work that waits for a builder in threads. A context manager: what runs when the block fails is stopped.

    A piece of work starts when what it and those that run are expected to take is within ``memory_bytes`` (None: any
    amount) less what is held, or when none runs and nothing is held; the first that was submitted is the first that
    starts.
    """

    def __init__(self, memory_bytes: int | None, progress: Progress) -> None:
        self._memory_bytes = memory_bytes
        self._used: dict[int, int] = {}
        self._held = 0
        self._turn, self._next = 0, 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._submitted: list[Future[Any]] = []
        self._pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="builder")
        self.progress: Progress = Locked(progress)
        """Progress for everything that reports while builders run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
            with self._changed:
                self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def submit(self, work: Callable[[Progress], T], memory_bytes: int) -> Future[T]:
        """Run ``work``, which is expected to take ``memory_bytes``, with a progress that ends it when it is stopped."""
        number, self._next = self._next, self._next + 1
        future = self._pool.submit(self._run, number, work, memory_bytes)
        self._submitted.append(future)
        return future

    def require_none_failed(self) -> None:
        """Raise what the first work that failed raised."""
        for future in self._submitted:
            if future.done() and (error := future.exception()) is not None:
                raise error

    def wait(self) -> None:
        """Wait until all work is done or some has failed. A failure is raised at once, whatever else still runs."""
        wait(self._submitted, return_when=FIRST_EXCEPTION)
        self.require_none_failed()

    def hold(self, memory_bytes: int) -> None:
        """Bytes that other work of the build takes from now on."""
        with self._changed:
            self._held = memory_bytes
            self._changed.notify_all()

    def _run(self, number: int, work: Callable[[Progress], T], memory_bytes: int) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or self._may_start(number, memory_bytes))
            self._turn = number + 1
            self._used[number] = memory_bytes
            self._changed.notify_all()
        try:
            return work(Stoppable(self.progress, self._stop))
        finally:
            with self._changed:
                del self._used[number]
                self._changed.notify_all()

    def _may_start(self, number: int, memory_bytes: int) -> bool:
        if number != self._turn:
            return False
        taken = self._held + sum(self._used.values())
        return self._memory_bytes is None or taken + memory_bytes <= self._memory_bytes or not taken


class Locked:
    """A `Progress` that several threads may report to."""

    def __init__(self, inner: Progress) -> None:
        self._inner, self._lock = inner, threading.Lock()

    def begin(self, task: str, total: int | None = None) -> None:
        with self._lock:
            self._inner.begin(task, total)

    def update(self, task: str, completed: int) -> None:
        with self._lock:
            self._inner.update(task, completed)

    def end(self, task: str) -> None:
        with self._lock:
            self._inner.end(task)


class Stoppable:
    """A `Progress` that raises `Cancelled` once ``stop`` is set."""

    def __init__(self, inner: Progress, stop: threading.Event) -> None:
        self._inner, self._stop = inner, stop

    def begin(self, task: str, total: int | None = None) -> None:
        self._check()
        self._inner.begin(task, total)

    def update(self, task: str, completed: int) -> None:
        self._check()
        self._inner.update(task, completed)

    def end(self, task: str) -> None:
        self._inner.end(task)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Cancelled
