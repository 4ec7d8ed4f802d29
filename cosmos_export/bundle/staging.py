"""Contents of a bundle's place before it is written, and beside it while it is: files that an earlier build kept, and
whatever does not belong there."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_export import directories, files
from cosmos_export.bundle import strict
from cosmos_export.bundle.manifest import MANIFEST_NAME, check_path
from cosmos_export.bundle.strict import StrictError
from cosmos_export.diagnostics import InternalError, ToolError, UserError

STATE = ".state"
"""Folder of the records of kept files, in the staging directory only: no path of a bundle begins with a dot."""
_RECORD_BYTES = 1 << 20
"""No record of a kept file comes near."""
_log = logging.getLogger("cosmos_export")


@dataclass(frozen=True)
class Kept:
    """A file that is complete: what it was made from, and what it is."""

    name: str
    key: str
    size_bytes: int
    mtime_ns: int
    sha256: str
    facts: Mapping[str, Any]
    """Facts that the build needs when it resumes."""


def require_replaceable(output: Path, force: bool) -> None:
    """CX701, CX702: there is something at ``output`` that a bundle may not replace."""
    if not output.name:
        raise UserError("CX701", f"{output} cannot be a bundle", "name a directory that does not exist yet")
    if not os.path.lexists(output):
        return
    if not force:
        raise UserError("CX701", f"{output} already exists", "choose another output or pass `--force`")
    # --force replaces a bundle, and never anything else: a mistyped path must not cost a home directory.
    if output.is_symlink() or not output.is_dir():
        raise UserError("CX702", f"{output} is not a directory; `--force` replaces bundles only")
    if os.path.ismount(output):
        raise UserError("CX702", f"{output} is a mount point, which cannot be replaced", "name a directory in it")
    if not (output / MANIFEST_NAME).is_file() and any(output.iterdir()):
        raise UserError(
            "CX702",
            f"{output} is not a bundle: it has files and no {MANIFEST_NAME}; `--force` replaces bundles only",
            "choose another output, or remove the directory yourself",
        )


def make_parent(output: Path) -> None:
    """Make the directory that ``output`` will be in; CX703 where that, or writing there, is not possible."""
    parent = output.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("CX703", f"cannot create {parent}: {error.strerror or error}") from error
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError("CX703", f"no permission to write in {parent}", "choose another output")


def read_kept(staging: Path) -> list[Kept]:
    """Records of files that are still as they were when they were kept. One that cannot be read counts for none."""
    found = []
    for record in sorted((staging / STATE).glob("*.json")):
        with contextlib.suppress(OSError, StrictError):
            kept = strict.decode(Kept, strict.parse_object(files.read_bytes(record, _RECORD_BYTES)))
            check_path(kept.name, "path")
            if _unchanged(staging / kept.name, kept):
                found.append(kept)
    return found


def _unchanged(path: Path, kept: Kept) -> bool:
    with contextlib.suppress(OSError):
        status = path.lstat()
        return (
            stat.S_ISREG(status.st_mode)
            and status.st_uid == os.geteuid()
            and (status.st_size, status.st_mtime_ns) == (kept.size_bytes, kept.mtime_ns)
        )
    return False


def regular_files(root: Path) -> Iterator[tuple[str, int]]:
    """Names (relative to ``root``) and sizes of all files; anything else but directories is refused."""
    for name, status in _entries(root):
        if not _is_plain(status):
            raise InternalError("CX706", f"{name} is a link or not a regular file; a bundle has files only")
        yield name, status.st_size


def remove_odd_entries(root: Path) -> None:
    """Remove links, pipes and files of several names below ``root``: no build has made them."""
    for name, status in list(_entries(root)):
        if not _is_plain(status):
            _log.warning("%s is removed: it is a link or not a regular file", root / name)
            (root / name).unlink()


def _entries(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Names (relative to ``root``) and states of all that is below it and no directory; records are left out."""
    for directory, subdirectories, plain in os.walk(root):
        if Path(directory) == root and STATE in subdirectories:
            subdirectories.remove(STATE)
        for name in (*subdirectories, *plain):
            path = Path(directory, name)
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                yield path.relative_to(root).as_posix(), status


def _is_plain(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def replace_file(root: Path, name: str, data: bytes) -> None:
    """``data`` as the file ``name`` of the directory ``root``, in one step; whatever is there stays where it fails."""
    partial = sibling(root / name, "partial")
    with file_system_errors(root):
        try:
            partial.write_bytes(data)
            directories.sync(partial)
            partial.replace(root / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        directories.sync_directory(root)


def remove_partials(root: Path, name: str) -> None:
    """Remove what a killed `replace_file` of this user left of ``name`` in ``root``."""
    for path in root.glob(f".{name}.partial-*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
            path.unlink()


def sibling(output: Path, what: str) -> Path:
    """A free hidden name beside ``output``; CX707 where there is none."""
    found = directories.sibling(output, what)
    if found is None:
        raise ToolError("CX707", f"too many unfinished builds beside {output}", f"remove .{output.name}.{what}-* there")
    return found


@contextlib.contextmanager
def file_system_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ToolError("CX707", f"cannot write {output}: {error}", "check free space and permissions") from error
