"""Directories that appear under their name whole or not at all: made beside it, locked, put in place by one rename.

While one is made it is called ``.NAME.WHAT-PID`` and its maker has a lock on it, which ends with the process however it
ends. So whoever comes next can tell what a living command works on from what a dead one has left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
REPLACED = "replaced"
"""Name of a directory that was moved aside."""


def sibling(output: Path, what: str) -> Path | None:
    """A free hidden name beside ``output``: process ids come round again, so the number may not be the first. None
    where there are too many."""
    for attempt in range(1000):
        suffix = f"-{attempt}" if attempt else ""
        candidate = output.with_name(f".{output.name}.{what}-{os.getpid()}{suffix}")
        if not os.path.lexists(candidate):
            return candidate
    return None


def siblings(output: Path, *kinds: str) -> Iterator[Path]:
    """Directories of this user beside ``output`` that `sibling` may have named so, sorted. Links are none."""
    prefixes = tuple(f".{output.name}.{what}-" for what in kinds)
    try:
        entries = sorted(output.parent.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(prefixes) and _owned(entry):
            yield entry


def private(path: Path) -> bool:
    """Whether ``path`` is a directory of this user that nobody else may write to."""
    return _owned(path) and not path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _owned(path: Path) -> bool:
    with contextlib.suppress(OSError):
        status = path.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return False


def lock(directory: Path) -> int:
    """A descriptor that holds the lock of ``directory`` until closed. `BlockingIOError` where it is taken."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def remove_dead(output: Path, *kinds: str) -> None:
    """Remove what commands that have died left beside ``output``: their lock is free. A directory that was moved aside
    stays while nothing has its name."""
    for entry in siblings(output, *kinds):
        if entry.name.startswith(f".{output.name}.{REPLACED}-") and not os.path.lexists(output):
            continue
        with contextlib.suppress(OSError):  # somebody has the lock, or there are no locks here: leave it
            descriptor = lock(entry)
            shutil.rmtree(entry, ignore_errors=True)
            os.close(descriptor)


def restore(output: Path) -> None:
    """Give ``output`` back what was moved aside for it by a command that died before anything took its place."""
    if os.path.lexists(output):
        return
    for entry in siblings(output, REPLACED):
        with contextlib.suppress(OSError):
            descriptor = lock(entry)
            try:
                entry.rename(output)
                sync_directory(output.parent)
            finally:
                os.close(descriptor)
            return


def take_place(new: Path, output: Path) -> Path | None:
    """Rename ``new`` to ``output`` in one step; returns where what was there is now, None where nothing was.

    A kill at any moment leaves the one or the other under the name. Only on a file system that cannot exchange two
    names there is a moment with none, in which what was there is called ``.NAME.replaced-PID``; `restore` finds it.
    """
    previous: Path | None = None
    with contextlib.ExitStack() as undo:
        if not os.path.lexists(output):
            new.rename(output)
            undo.callback(output.rename, new)
        elif exchange(new, output):
            previous = new
            undo.callback(exchange, new, output)
        else:
            previous = sibling(output, REPLACED)
            if previous is None:
                raise OSError(errno.EEXIST, f"too many .{output.name}.{REPLACED}-* beside it")
            output.rename(previous)
            undo.callback(previous.rename, output)
            new.rename(output)
            undo.callback(output.rename, new)
        sync_directory(output.parent)
        undo.pop_all()
    return previous


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or directories; False where the file system or the C library cannot."""
    try:
        rename: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def open_up(directory: Path) -> None:
    """Give a directory that was made for this user alone the mode of any other that is made there."""
    example = directory / ".mode"
    example.mkdir(exist_ok=True)  # there where a command was killed in the next line
    try:
        directory.chmod(stat.S_IMODE(example.stat().st_mode))
    finally:
        example.rmdir()


def sync_tree(root: Path) -> None:
    """Files first, then directories from the leaves up: after this what is there survives a power cut."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(directory, name), os.O_RDONLY)
        sync_directory(Path(directory))


def sync_directory(path: Path) -> None:
    sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync(path: Path, flags: int = os.O_RDONLY) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
