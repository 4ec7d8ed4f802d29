"""The memory that a process may still take: what the machine has free, within the limits of its control groups.

A container, a SLURM job or a systemd scope is a control group, of version 1 or 2, and groups nest: what counts is the
narrowest limit from the process's own group up to the root of what is mounted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class _Version:
    """Names in a control group of one version."""

    limits: tuple[str, ...]
    used: str
    reclaimable: str
    """A line of ``memory.stat``: file pages that are given up for others first, of the group and those in it."""


_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping; what the page cache holds is to be had. OSError where the system does
    not say. ``root`` has ``proc`` and the control groups."""
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if free is None:
        raise OSError(f"{root / 'proc/meminfo'} has no MemAvailable")
    return min([free, *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    """Free memory within each limit that holds for this process."""
    for version, mount, group in _groups(root):
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file: no limit; "max": none either
                yield from _free_in(folder, version)
            if folder == mount:
                break


def _free_in(folder: Path, version: _Version) -> Iterator[int]:
    used = int((folder / version.used).read_text(encoding="ascii"))
    stat = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    used -= min(used, int(stat.get(version.reclaimable, 0)))
    for name in version.limits:
        with contextlib.suppress(OSError, ValueError):
            yield max(0, int((folder / name).read_text(encoding="ascii")) - used)


def _groups(root: Path) -> Iterator[tuple[_Version, Path, Path]]:
    """Where memory is accounted: the mount, and in it the group of this process."""
    paths: dict[str, str] = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if "memory" in controllers.split(","):
                paths["cgroup"] = path
            elif number == "0" and not controllers:
                paths["cgroup2"] = path
    for kind, mounted, point in _mounts(root):
        folder = root / point.lstrip("/")
        own = PurePosixPath(paths.get(kind, "/"))
        # What is mounted may be a part of the hierarchy, as in a container, whose path is then that of the host.
        inside = own.relative_to(mounted) if own.is_relative_to(mounted) else PurePosixPath()
        yield _V1 if kind == "cgroup" else _V2, folder, folder if ".." in inside.parts else folder / inside


def _mounts(root: Path) -> Iterator[tuple[str, PurePosixPath, str]]:
    """Kind, part that is mounted, and mount point of every hierarchy with memory in it."""
    try:
        lines = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 6 or len(rest) < 3:
            continue
        kind, options = rest[0], rest[2].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options):
            yield kind, PurePosixPath(_plain(fields[3])), _plain(fields[4])


def _plain(text: str) -> str:
    """A path as it is: spaces and the like are octal numbers in the table of mounts."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), text)
