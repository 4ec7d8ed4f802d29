"""Resources that processes use: memory by kind, and blocks from and to the disk (Linux)."""

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
    """Memory of one process in bytes."""

    anonymous: int
    """Memory that no file backs, now."""
    peak_resident: int
    """The largest resident set of the program so far. `getrusage` would hold that of whoever started the process."""


def process_memory(pid: int) -> ProcessMemory | None:
    """Memory of process ``pid``; None where the system does not tell."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(("RssAnon:", "VmHWM:")):
                name, kibibytes, _ = line.split()
                found[name] = int(kibibytes) * 1024
    return ProcessMemory(found["RssAnon:"], found["VmHWM:"]) if len(found) == 2 else None


def family_memory() -> list[ProcessMemory]:
    """Memory of this process and of each of its children, as far as the system tells."""
    found = (process_memory(pid) for pid in (os.getpid(), *_children(os.getpid())))
    return [memory for memory in found if memory is not None]


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (task / "children").read_text(encoding="ascii").split())


def own_peak_resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    memory = process_memory(os.getpid())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if memory is None else memory.peak_resident


def disk_bytes() -> tuple[int, int]:
    """Bytes read from and written to the disk by this process and by the children that have ended. What the page cache
    holds is not read again."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return _BLOCK_BYTES * sum(u.ru_inblock for u in usage), _BLOCK_BYTES * sum(u.ru_oublock for u in usage)


def path_of_descriptor(descriptor: int) -> Path:
    """A path that opens what ``descriptor`` of this process has open, whatever its name is by now."""
    return Path("/proc/self/fd") / str(descriptor)
