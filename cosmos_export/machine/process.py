"""What this process and its children take of the machine: memory by kind, and blocks from and to the disk (Linux)."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 512
"""Size of a block in the counters of `getrusage`."""


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process in bytes; 0 where the system does not tell."""

    anonymous_bytes: int = 0
    """Memory that no file backs, now."""
    peak_resident_bytes: int = 0
    """The largest resident set of the program so far. `getrusage` would hold that of whoever started the process."""


def family_memory() -> list[ProcessMemory]:
    """Memory of this process and of each of its children."""
    return [_memory(pid) for pid in (os.getpid(), *_children(os.getpid()))]


def disk_bytes() -> tuple[int, int]:
    """Bytes read from and written to the disk by this process and by the children that have ended. What the page cache
    holds is not read again."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return _BLOCK_BYTES * sum(u.ru_inblock for u in usage), _BLOCK_BYTES * sum(u.ru_oublock for u in usage)


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (task / "children").read_text(encoding="ascii").split())


def _memory(pid: int) -> ProcessMemory:
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(("RssAnon:", "VmHWM:")):
                name, kibibytes, _ = line.split()
                found[name.rstrip(":")] = int(kibibytes) * 1024
    return ProcessMemory(found.get("RssAnon", 0), found.get("VmHWM", 0))
