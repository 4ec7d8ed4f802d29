"""Writes a bundle: everything into a directory beside the output, the manifest last, then one rename.

Under the final name there is either nothing, the bundle of before, or the whole new bundle. What an interrupted build
leaves is a hidden directory beside it; a lock on that directory tells the next build whether its owner still lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from cosmos_export.bundle import strict
from cosmos_export.bundle.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    check_path,
    parse_manifest,
    problems,
)
from cosmos_export.bundle.strict import StrictError
from cosmos_export.bundle.verify import hash_file
from cosmos_export.diagnostics import InternalError, ToolError, UserError
from cosmos_export.progress import Progress, Silent

# What the file system takes besides the files themselves: the manifest, directories, rounding to blocks.
_SPARE_BYTES = 64 * 1024 * 1024


class BundleWriter:
    """Context manager in which a bundle comes into being; only `commit` makes it visible.

    ``required_bytes`` is what the build expects to write. It is checked before any work, as are the output, its parent
    directory and the right to replace what is there.
    """

    def __init__(
        self, output: Path, force: bool = False, required_bytes: int = 0, progress: Progress | None = None
    ) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output
        self._force = force
        self._required_bytes = required_bytes
        self._progress: Progress = progress or Silent()
        self._roles: dict[str, str] = {}
        self._staging: Path | None = None
        self._lock = -1

    def __enter__(self) -> Self:
        self._check_output()
        self._check_parent()
        self._remove_leftovers()
        self._check_space()
        self._stage()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        self._unlock()

    def path(self, name: str, role: str) -> Path:
        """Where to write the file that will be ``name`` in the bundle; its directory exists."""
        try:
            check_path(name, "path")
        except StrictError as error:
            raise InternalError("CX705", f"not a path for a bundle: {error}") from error
        if self._roles.setdefault(name, role) != role:
            raise InternalError("CX705", f"{name} has two roles: {self._roles[name]} and {role}")
        path = self._open_staging() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, manifest: Manifest) -> Manifest:
        """Complete ``manifest`` with the files written, write it, and put the bundle in place."""
        staging = self._open_staging()
        complete = replace(manifest, files=tuple(self._records(staging)))
        data = _checked(complete)
        with _file_system_errors(self.output):
            target = staging / MANIFEST_NAME
            target.write_bytes(data)
            _sync_tree(staging)
            self._swap(staging)
        self._staging = None
        self._unlock()
        return complete

    # -- before the work ---------------------------------------------------------------------------------------------

    def _check_output(self) -> None:
        if not self.output.name:
            raise UserError("CX701", f"{self.output} cannot be a bundle", "name a directory that does not exist yet")
        if not os.path.lexists(self.output):
            return
        if not self._force:
            raise UserError("CX701", f"{self.output} already exists", "choose another output or pass `--force`")
        # --force replaces a bundle, and never anything else: a mistyped path must not cost a home directory.
        if self.output.is_symlink() or not self.output.is_dir():
            raise UserError("CX702", f"{self.output} is not a directory; `--force` replaces bundles only")
        if not (self.output / MANIFEST_NAME).is_file() and any(self.output.iterdir()):
            raise UserError(
                "CX702",
                f"{self.output} is not a bundle: it has files and no {MANIFEST_NAME}; `--force` replaces bundles only",
                "choose another output, or remove the directory yourself",
            )

    def _check_parent(self) -> None:
        parent = self.output.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("CX703", f"cannot create {parent}: {error.strerror or error}") from error
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError("CX703", f"no permission to write in {parent}", "choose another output")

    def _check_space(self) -> None:
        needed = self._required_bytes + _SPARE_BYTES
        free = shutil.disk_usage(self.output.parent).free
        if free < needed:
            raise ToolError(
                "CX704",
                f"not enough disk space in {self.output.parent}: {_gib(needed)} needed, {_gib(free)} free",
                "free some space or choose an output on another disk",
            )

    def _remove_leftovers(self) -> None:
        """Remove what builds of this output left that died: their lock is free. A live build keeps its own."""
        prefixes = (f".{self.output.name}.partial-", f".{self.output.name}.replaced-")
        for entry in self.output.parent.iterdir():
            # A replaced bundle is the only one there is if the build died between the two renames: keep it then.
            stale = entry.name.startswith(prefixes[0]) or (
                entry.name.startswith(prefixes[1]) and os.path.lexists(self.output)
            )
            if not stale or entry.is_symlink() or not entry.is_dir():
                continue
            with contextlib.suppress(OSError):  # somebody has the lock, or there are no locks here: leave it
                lock = _lock(entry)
                shutil.rmtree(entry, ignore_errors=True)
                os.close(lock)

    def _stage(self) -> None:
        with _file_system_errors(self.output):
            while self._staging is None:
                staging = _sibling(self.output, "partial")
                staging.mkdir()
                try:
                    self._lock = _lock(staging)
                except (BlockingIOError, FileNotFoundError):
                    continue  # another build has just taken it for a leftover
                except OSError:
                    self._lock = -1  # no locks on this file system: nobody will take it for a leftover
                self._staging = staging

    # -- commit ------------------------------------------------------------------------------------------------------

    def _records(self, staging: Path) -> Iterator[FileRecord]:
        found = dict(_regular_files(staging))
        unknown, missing = sorted(set(found) - set(self._roles)), sorted(set(self._roles) - set(found))
        if unknown:
            raise InternalError("CX706", f"files without a role in the bundle: {', '.join(unknown[:5])}")
        if missing:
            raise InternalError("CX706", f"files never written: {', '.join(missing[:5])}")
        self._progress.begin("hash", sum(found.values()))
        done = 0
        for name in sorted(found):
            with _file_system_errors(self.output), (staging / name).open("rb", buffering=0) as file:
                size, digest = hash_file(file.fileno(), partial(self._hashed, done))
            done += size
            yield FileRecord(path=name, size_bytes=size, sha256=digest, role=self._roles[name])
        self._progress.end("hash")

    def _hashed(self, before: int, read: int) -> None:
        self._progress.update("hash", before + read)

    def _swap(self, staging: Path) -> None:
        """Rename ``staging`` to the output. With --force the bundle of before goes only when the new one is there."""
        previous: Path | None = None
        self._check_output()  # once more: the build took its time, and something may have appeared
        if os.path.lexists(self.output):
            previous = _sibling(self.output, "replaced")
            self.output.rename(previous)
        try:
            staging.rename(self.output)
        except OSError:
            if previous is not None:
                previous.rename(self.output)
            raise
        _sync_directory(self.output.parent)
        if previous is not None:
            shutil.rmtree(previous, ignore_errors=True)

    def _open_staging(self) -> Path:
        if self._staging is None:
            raise InternalError("CX705", "the bundle writer is not open: use it in a `with`, and commit once")
        return self._staging

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def replace_manifest(root: Path, manifest: Manifest) -> None:
    """``manifest`` in place of the one of the bundle at ``root``, in one step; its files are there already."""
    data = _checked(manifest)
    partial = _sibling(root / MANIFEST_NAME, "partial")
    with _file_system_errors(root):
        partial.write_bytes(data)
        _sync_tree(root)
        partial.replace(root / MANIFEST_NAME)
        _sync_directory(root)


def _checked(manifest: Manifest) -> bytes:
    """The bytes of ``manifest``, after making sure that what is written can be read."""
    for problem in problems(manifest):
        raise InternalError("CX709", f"the build made an inconsistent manifest: {problem}")
    try:
        data = manifest.to_bytes()
        again = parse_manifest(data)
    except (StrictError, TypeError, ValueError) as error:
        raise InternalError("CX709", f"the build made a manifest that cannot be read back: {error}") from error
    if strict.encode(again) != strict.encode(manifest):
        raise InternalError("CX709", "the build made a manifest that reads back differently")
    return data


def _regular_files(root: Path) -> Iterator[tuple[str, int]]:
    """Names (relative to ``root``) and sizes of all files; anything else but directories is refused."""
    for directory, subdirectories, files in os.walk(root):
        for name in (*subdirectories, *files):
            path = Path(directory, name)
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            relative = path.relative_to(root).as_posix()
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise InternalError("CX706", f"{relative} is a link or not a regular file; a bundle has files only")
            yield relative, status.st_size


def _sibling(output: Path, what: str) -> Path:
    """A free hidden name beside ``output``: process ids come round again, so the number may not be the first."""
    for attempt in range(1000):
        suffix = f"-{attempt}" if attempt else ""
        candidate = output.with_name(f".{output.name}.{what}-{os.getpid()}{suffix}")
        if not os.path.lexists(candidate):
            return candidate
    raise ToolError("CX707", f"too many unfinished builds beside {output}", f"remove .{output.name}.{what}-* there")


def _lock(directory: Path) -> int:
    """A descriptor that holds the lock of ``directory`` until closed. `BlockingIOError` where it is taken."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync_tree(root: Path) -> None:
    """Files first, then directories from the leaves up: after this the bundle survives a power cut."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            _sync(Path(directory, name), os.O_RDONLY)
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _file_system_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ToolError("CX707", f"cannot write {output}: {error}", "check free space and permissions") from error


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
