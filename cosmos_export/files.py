"""The one way to open a file that a user names: a regular file, of limited size, without ever waiting.

A name on a command line or in a data set may lead to a pipe nobody writes to, to a device without end, to a directory
or to a file larger than the memory. `opened` finds out before a byte is read. Every failure is an ``OSError`` whose
``strerror`` is a phrase for a message, so that each reader refuses under its own code.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MAX_TEXT_BYTES = 64 * MIB
"""The largest document (JSON, TOML, text) that is read whole unless its reader allows less."""
MAX_TOML_DOTS = 200
"""Dots in one line of a TOML file."""

MAX_NAME_BYTES = 200
"""Longest name of an output. File systems allow 255, and names of unfinished work are longer than the final one."""
_ADDED_BYTES = 255 - MAX_NAME_BYTES

# Neither a pipe without a writer nor a terminal may stop the program, and no child inherits the descriptor.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: "a directory, not a file",
    stat.S_IFIFO: "a pipe, not a file: write its contents to a file first",
    stat.S_IFCHR: "a device, not a file",
    stat.S_IFBLK: "a device, not a file",
    stat.S_IFSOCK: "a socket, not a file",
}


class FileRefusedError(OSError):
    """A file that can be opened, but is not one to read: of another kind, or larger than allowed."""


@contextlib.contextmanager
def opened(path: Path, limit_bytes: int | None = None) -> Iterator[io.FileIO]:
    """``path`` open for reading, unbuffered. OSError where it cannot be opened, is no regular file (through symbolic
    links), or has more than ``limit_bytes``."""
    try:
        descriptor = os.open(path, _FLAGS)
    except ValueError as error:  # a NUL in the name
        raise FileRefusedError(errno.EINVAL, f"not a name of a file ({error})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
            raise FileRefusedError(errno.EINVAL, kind)
        if limit_bytes is not None and status.st_size > limit_bytes:
            raise FileRefusedError(errno.EFBIG, _too_large(f"{status.st_size:,}", limit_bytes))
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bytes(path: Path, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """All of ``path``, at most ``limit_bytes`` of it; OSError as `opened`, also where it grows while it is read."""
    parts: list[bytes] = []
    left = limit_bytes + 1
    with opened(path, limit_bytes) as file:
        while left and (part := file.read(min(left, MIB))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise FileRefusedError(errno.EFBIG, _too_large(f"more than {limit_bytes:,}", limit_bytes))
    return b"".join(parts)


def parse_toml(text: str) -> dict[str, Any]:
    """``text`` as TOML. ValueError: it is not, or would take more memory and time than any document of a person.

    The reader of the standard library takes time and memory with the square of a dotted key's length.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > MAX_TOML_DOTS:
            raise ValueError(f"line {number} has {line.count('.')} dots, allowed {MAX_TOML_DOTS}")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def output_problem(path: Path) -> str | None:
    """Why nothing can be written to ``path``, as a phrase; None where its name and what it leads to allow it.

    Whether it exists, and may be replaced, is for the command to decide.
    """
    try:
        name, whole = os.fsencode(path.name), os.fsencode(path)
    except UnicodeEncodeError:  # half of a character
        return "it is not a name"
    if not name or b"\0" in whole:
        return "it is not a name"
    allowed = MAX_NAME_BYTES
    with contextlib.suppress(OSError):  # some file systems allow less
        allowed = min(allowed, os.pathconf(path.parent, "PC_NAME_MAX") - _ADDED_BYTES)
    if len(name) > allowed:
        return f"its name is too long: {len(name):,} bytes; allowed: {allowed}"
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:  # a loop of links, a file in place of a directory, a closed directory, a path too long
        return reason(error)
    return None


def reason(error: OSError) -> str:
    """The cause of ``error``, as a phrase without the number and the path."""
    return error.strerror or str(error)


def _too_large(found: str, limit_bytes: int) -> str:
    return f"{found} bytes; allowed: {limit_bytes:,}"
