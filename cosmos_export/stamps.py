"""Tells whether a file is still the one that was read: by device, inode, size and the times of its last changes.

Every write to a file, and every change of its times, sets the time of its last change of status (``ctime``), which no
ordinary program can set back. So two equal stamps mean that the bytes were the same all the time between them, and a
digest taken in between is the digest of the bytes that were used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cosmos_export.diagnostics import UserError

_TICK_NS = 20_000_000
"""File systems take their times from a clock that advances in steps, of at most 10 ms on Linux."""


@dataclass(frozen=True)
class Stamp:
    """The file system's record of a file (links followed)."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of the file ``path``. OSError where there is none."""
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def settled(cls, path: Path) -> Stamp:
        """The same, once it is older than the last step of the clock that file systems take their times from: a write
        in the same step would leave it as it is."""
        stamp = cls.of(path)
        if abs(time.time_ns() - stamp.ctime_ns) < _TICK_NS:
            time.sleep(_TICK_NS / 1e9)
            stamp = cls.of(path)
        return stamp

    def difference(self, later: Stamp) -> str:
        """Differences in ``later``, as a phrase; empty where there are none."""
        if self == later:
            return ""
        if (self.device, self.inode) != (later.device, later.inode):
            return "another file has its name"
        if self.size_bytes != later.size_bytes:
            return f"it had {self.size_bytes:,} bytes and has {later.size_bytes:,}"
        if self.mtime_ns != later.mtime_ns:
            return "it was written to"
        return "it was written to and its time set back, or its permissions or links changed"


class Inputs:
    """The files of ``what`` (a checkpoint), which a command reads for a long time, as they were when it began.

    Files of ``folders`` that ``selects`` takes belong to them, and one that appears there later counts as a change.
    """

    def __init__(
        self,
        what: str,
        files: Iterable[Path],
        folders: Iterable[Path] = (),
        selects: Callable[[Path], bool] = lambda path: True,
    ) -> None:
        self._what, self._folders, self._selects = what, tuple(folders), selects
        self.stamps: Mapping[Path, Stamp] = MappingProxyType(_settled([*files, *self._listed()]))

    def require_unchanged(self, during: str) -> None:
        """UserError CX118 where a file is not the one that it was, or where there are others now. ``during`` names the
        work that would use it."""
        for path, stamp in self.stamps.items():
            try:
                changed = stamp.difference(Stamp.of(path))
            except OSError as error:
                changed = f"it cannot be read any more: {error.strerror or error}"
            if changed:
                raise self._changed(path, changed, during)
        for path in self._listed():
            if path not in self.stamps:
                raise self._changed(path, "it was not there at the beginning", during)

    def _listed(self) -> Iterator[Path]:
        for folder in self._folders:
            try:
                yield from (path for path in sorted(folder.iterdir()) if self._selects(path) and path.is_file())
            except OSError:  # the folder is gone, which its files tell
                continue

    def _changed(self, path: Path, how: str, during: str) -> UserError:
        return UserError(
            "CX118",
            f"{self._what} changed during {during}: {path}: {how}",
            "wait until nothing writes to it any more (a download, a copy, a `git pull`), then run the command again",
        )


def require_unchanged(inputs: Iterable[Inputs], during: str) -> None:
    """CX118 where one of ``inputs`` has changed."""
    for one in inputs:
        one.require_unchanged(during)


@contextmanager
def unchanged(during: str, *inputs: Inputs) -> Iterator[None]:
    """A block that reads ``inputs``, which have not changed at its end. However it fails, a change is the reason that
    is given."""
    with blamed(during, *inputs):
        yield
    require_unchanged(inputs, during)


@contextmanager
def blamed(during: str, *inputs: Inputs) -> Iterator[None]:
    """A block that reads ``inputs``: however it fails, a change of them is the reason that is given."""
    try:
        yield
    except Exception as error:
        try:
            require_unchanged(inputs, during)
        except UserError as changed:
            raise changed from error
        raise


def _settled(files: Iterable[Path]) -> dict[Path, Stamp]:
    """Stamps of the files that are there."""
    stamps: dict[Path, Stamp] = {}
    for path in dict.fromkeys(files):
        try:
            stamps[path] = Stamp.settled(path)
        except OSError:
            continue
    return stamps
