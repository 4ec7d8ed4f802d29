"""An audit trail: a file of JSON lines, each with the SHA-256 of the line before it.

A line that is changed, removed or put in is found at the line after it. Lines that are missing at the end are not: who
must know keeps the digest of the last line elsewhere, and `verify` looks for it. The trail says what this program did;
it is not signed, and who may write the file may write another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from cosmos_export import files
from cosmos_export.diagnostics import FindingError, ToolError, UserError

EVENTS = ("built", "verified", "loaded", "golden", "ready", "request", "ended")
MAX_LINE_BYTES = 64 * files.KIB
FIRST = "0" * 64
"""Digest that the first line has for the line before it."""
SYNC_S = 1.0
"""Longest time that a line is not on the disk; a line for each request would wait for the disk as long as a model."""
_DIGITS = frozenset("0123456789abcdef")


class AuditTrail:
    """A trail that is being written, by one process at a time. Its lines are whole when `record` returns."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Go on with the trail in ``path``, or begin one.

        UserError CX650: the file cannot be written, another process writes it, or it ends in the middle of a line.
        FindingError CX651: it is no trail, or a line of it was changed.
        """
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        try:
            self._descriptor = os.open(
                path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600
            )
        except (OSError, ValueError) as error:
            reason = files.reason(error) if isinstance(error, OSError) else str(error)
            raise UserError(
                "CX650", f"the audit trail {path} cannot be written: {reason}", "name another file"
            ) from error
        try:
            self._begin()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _begin(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise UserError("CX650", f"the audit trail {self.path} is not a regular file", "name another file")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            hint = "every process has a trail of its own"
            raise UserError("CX650", f"another process writes the audit trail {self.path}", hint) from error
        found = verify_trail(self.path)
        self._count, self._head = found.lines, found.head

    @property
    def head(self) -> str:
        """SHA-256 of the last line, in hexadecimal digits."""
        return self._head

    def record(self, event: str, **facts: Any) -> None:
        """Append a line for ``event``, one of `EVENTS`. ``facts`` have JSON values.

        ToolError CX652: the line was not written, which must end whatever was to be recorded.
        """
        assert event in EVENTS
        with self._lock:
            now = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
            entry = {"n": self._count, "time": now, "event": event, **facts, "previous": self._head}
            line = _encoded(entry)
            assert len(line) <= MAX_LINE_BYTES
            try:
                written = os.write(self._descriptor, line + b"\n")
                if written != len(line) + 1:
                    raise OSError(0, f"{written} of {len(line) + 1} bytes were written")
                self._sync(force=event != "request")
            except OSError as error:
                raise ToolError(
                    "CX652", f"the audit trail {self.path} cannot be written: {files.reason(error)}", "free some space"
                ) from error
            self._count, self._head = self._count + 1, hashlib.sha256(line).hexdigest()

    def _sync(self, force: bool) -> None:
        now = time.monotonic()
        if force or now - self._synced >= SYNC_S:
            os.fsync(self._descriptor)
            self._synced = now

    def close(self) -> None:
        """Bring the last lines to the disk, and let another process go on."""
        with self._lock:
            if self._descriptor >= 0:
                os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> AuditTrail:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class TrailFound:
    """Result of `verify_trail`."""

    lines: int
    head: str
    """SHA-256 of the last line; `FIRST` of an empty trail."""
    first: str | None
    """When the first line was written."""
    last: str | None
    events: Mapping[str, int]


def verify_trail(path: Path, anchor: str | None = None) -> TrailFound:
    """Look at every line of the trail in ``path``.

    ``anchor``: the digest of a line that the trail must have, as it was noted elsewhere. FindingError CX651 with the
    first line that is wrong, or without a line of the anchor's digest; UserError CX650: the file cannot be read.
    """
    head, count = FIRST, 0
    times: list[str] = []
    events: dict[str, int] = {}
    anchored = anchor is None or anchor == FIRST
    if anchor is not None and (len(anchor) != 64 or not _DIGITS.issuperset(anchor)):
        raise UserError(
            "CX650", f"{anchor[:80]!r} is no digest", "64 hexadecimal digits, as `audit verify` prints them"
        )
    try:
        for line in _lines(path):
            entry = _entry(path, count, line)
            if entry["previous"] != head:
                which = "that line was changed, or lines between them are missing" if count else "lines are missing"
                _finding(path, count, f"does not follow from the line before it: {which}")
            events[entry["event"]] = events.get(entry["event"], 0) + 1
            times = [*times[:1], entry["time"]]
            head, count = hashlib.sha256(line).hexdigest(), count + 1
            anchored = anchored or head == anchor
    except OSError as error:
        raise UserError("CX650", f"cannot read the audit trail {path}: {files.reason(error)}") from error
    if not anchored:
        raise FindingError(
            "CX651", f"audit trail {path}: none of its {count} lines has the digest {anchor}",
            "lines are missing at its end, or it is another trail",
        )  # fmt: skip
    return TrailFound(count, head, times[0] if times else None, times[-1] if times else None, events)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines without their ends."""
    with files.opened(path) as raw:
        reader, count = BufferedReader(raw), 0
        while line := reader.readline(MAX_LINE_BYTES + 2):
            if not line.endswith(b"\n"):
                what = "is too long" if len(line) > MAX_LINE_BYTES else "is not complete"
                _finding(path, count, what, "move the file away: a new trail begins")
            yield line[:-1]
            count += 1
        reader.detach()


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        written = _encoded(entry)
    except (ValueError, RecursionError):  # also NaN, and integers of thousands of digits
        _finding(path, number, "is not JSON")
    if written != line:
        _finding(path, number, "is not in the form that is written")
    if not isinstance(entry, dict) or type(entry.get("n")) is not int or entry["n"] != number:
        _finding(path, number, "is not the entry that belongs there")
    if not isinstance(entry.get("event"), str) or entry["event"] not in EVENTS:
        _finding(path, number, "is not the entry that belongs there")
    if not isinstance(entry.get("time"), str) or not isinstance(entry.get("previous"), str):
        _finding(path, number, "has no time, or no digest of the line before it")
    return entry


def _encoded(entry: Any) -> bytes:
    """The one form of a line: a key that is there twice, or a number written in another way, is not in it."""
    return json.dumps(entry, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _finding(path: Path, index: int, what: str, hint: str = "") -> NoReturn:
    raise FindingError("CX651", f"audit trail {path}: line {index + 1} {what}", hint)
