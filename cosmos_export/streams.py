"""Standard streams that cannot end a command: what cannot be written is remembered, and never raised.

A closed descriptor, a full disk behind ``>``, a reader that leaves (``| head``) or an encoding without a character must
neither look like a bug nor decide what a verification has found. `guard` replaces ``sys.stdout`` and ``sys.stderr``;
`lost` says at the end why data did not get out.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Descriptor(io.RawIOBase):
    """A descriptor that takes everything; ``error`` is the first thing that went wrong with it."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.error: OSError | None = None

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        rest = view
        while rest and self.error is None:
            try:
                rest = rest[os.write(self._number, rest) :]
            except BlockingIOError:
                _wait_until_writable(self._number)
            except OSError as error:
                self.error = error
        return len(view)


def guard() -> None:
    """Make the standard streams of this process safe to print to. Streams that somebody has put in their place stay."""
    closed = _open_all()
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is not original or isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Descriptor):
            continue
        encoding = "utf-8"
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
            encoding = stream.encoding
        raw = _Descriptor(number)
        if number in closed:
            raw.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
        # Lines go out as they are printed to a terminal and to whoever follows a log.
        at_once = number == 2 or raw.isatty()
        setattr(
            sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=at_once)
        )


def lost() -> OSError | None:
    """Why data on stdout is lost, after all of it was flushed; None where it is not, or where its reader left."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(ValueError):  # closed by whoever put it there
                stream.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Descriptor) else None
    return None if error is None or error.errno == errno.EPIPE else error


def _open_all() -> set[int]:
    """The standard descriptors that are closed, which lead nowhere from now on: a file that is opened must not get the
    number of a stream that messages are written to."""
    closed = set(_closed())
    for number in sorted(closed):
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
    return closed


def _closed() -> Iterator[int]:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            yield number


def _wait_until_writable(number: int) -> None:
    import select

    poll = select.poll()
    poll.register(number, select.POLLOUT)
    poll.poll()
