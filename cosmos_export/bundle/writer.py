"""Writes a bundle: everything into a directory beside the output, the manifest last, then one rename.

Under the final name there is either nothing, the bundle of before, or the whole new bundle. What an interrupted build
leaves is a hidden directory beside it; a lock on that directory tells the next build whether its owner still lives.

A file that took long is *kept*: recorded as complete, with its digest and the key of what it was made from. A writer
that resumes takes the hidden directory over, with its kept files and nothing else; the build asks for each by its key.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
from cosmos_export.diagnostics import FindingError, InternalError, ToolError, UserError
from cosmos_export.progress import Progress, Silent

_STATE = ".state"
"""Folder of the records of kept files, in the staging directory only: no path of a bundle begins with a dot."""
# What the file system takes besides the files themselves: the manifest, directories, rounding to blocks.
_SPARE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Kept:
    """A file that is complete: what it was made from, and what it is."""

    name: str
    key: str
    size_bytes: int
    mtime_ns: int
    sha256: str
    facts: Mapping[str, Any]
    """What the build wants to know of it when it resumes."""


class BundleWriter:
    """Context manager in which a bundle comes into being; only `commit` makes it visible.

    ``required_bytes`` is what the build expects to write. It is checked before any work, as are the output, its parent
    directory and the right to replace what is there. With ``resume`` the kept files of an interrupted writer of the
    same output are taken over; ``resumed`` says how many there were. ``require_inputs`` raises where an input of the
    build is not what it was any more: it is called before a file is kept and before the bundle is put in place.

    What is left when the block ends without a commit: the files that were kept, for a writer that resumes. Nothing
    where there are none, or where a finding says that the results are not right.
    """

    def __init__(
        self,
        output: Path,
        force: bool = False,
        required_bytes: int = 0,
        progress: Progress | None = None,
        resume: bool = False,
        require_inputs: Callable[[], None] = lambda: None,
    ) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output
        self._force = force
        self._required_bytes = required_bytes
        self._progress: Progress = progress or Silent()
        self._roles: dict[str, str] = {}
        self._staging: Path | None = None
        self._lock = -1
        self._resume = resume
        self._require_inputs = require_inputs
        self._kept: dict[str, Kept] = {}
        self.resumed = 0
        self.left: Path | None = None
        """Where the kept files of a block that was interrupted are."""

    def __enter__(self) -> Self:
        self._check_output()
        self._check_parent()
        if self._resume:
            self._adopt()
        self._remove_leftovers()
        self._check_alone()
        self._check_space()
        self._stage()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        resumable = kind is not None and not issubclass(kind, FindingError) and bool(self._kept)
        if self._staging is not None and not resumable:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.left = self._staging if resumable else None
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

    def keep(self, name: str, key: str, sha256: str, facts: Mapping[str, Any] | None = None) -> None:
        """Record that the file ``name`` is complete, made from what ``key`` stands for, and has the digest ``sha256``.

        It and its record are on the disk when this returns. The file must not be written to any more: `commit` takes
        the digest from here.
        """
        path = self._open_staging() / name
        self._require_inputs()
        with _file_system_errors(self.output):
            _sync(path, os.O_RDONLY)
            status = path.stat()
            kept = Kept(name, key, status.st_size, status.st_mtime_ns, sha256, dict(facts or {}))
            record = self._record_path(name)
            record.parent.mkdir(exist_ok=True)
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(kept)), encoding="utf-8")
            _sync(partial, os.O_RDONLY)
            partial.replace(record)
            _sync_directory(record.parent)
        self._kept[name] = kept

    def kept(self, name: str, key: str) -> Kept | None:
        """The complete file ``name``, if it was kept under ``key``; one kept under another key is removed."""
        found = self._kept.get(name)
        if found is None or found.key == key:
            return found
        del self._kept[name]
        self._record_path(name).unlink(missing_ok=True)
        (self._open_staging() / name).unlink(missing_ok=True)
        return None

    def all_kept(self) -> tuple[Kept, ...]:
        """Every kept file, in the order of their names."""
        return tuple(self._kept[name] for name in sorted(self._kept))

    def digest(self, name: str) -> str | None:
        """SHA-256 of the file ``name``, where it was kept."""
        found = self._kept.get(name)
        return None if found is None else found.sha256

    def commit(self, manifest: Manifest) -> Manifest:
        """Complete ``manifest`` with the files written, write it, and put the bundle in place."""
        staging = self._open_staging()
        self._drop_unasked(staging)
        complete = replace(manifest, files=tuple(self._records(staging)))
        data = _checked(complete)
        with _file_system_errors(self.output):
            target = staging / MANIFEST_NAME
            target.write_bytes(data)
            _sync_tree(staging)
            self._require_inputs()
            self._swap_without_state(staging)
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
        if os.path.ismount(self.output):
            raise UserError(
                "CX702", f"{self.output} is a mount point, which cannot be replaced", "name a directory in it"
            )
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
        there = sum(kept.size_bytes for kept in self._kept.values())
        needed = max(0, self._required_bytes - there) + _SPARE_BYTES
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
            stale = entry.name.startswith((prefixes[0], f".{self.output.name}.state-")) or (
                entry.name.startswith(prefixes[1]) and os.path.lexists(self.output)
            )
            if not stale or entry.is_symlink() or not entry.is_dir():
                continue
            with contextlib.suppress(OSError):  # somebody has the lock, or there are no locks here: leave it
                lock = _lock(entry)
                shutil.rmtree(entry, ignore_errors=True)
                os.close(lock)

    def _check_alone(self) -> None:
        """Nobody else makes this output: the later of two would find it there at its end. `--force` replaces it."""
        if self._force or self._staging is not None:
            return
        for entry in self.output.parent.glob(f"{_escaped(f'.{self.output.name}.partial-')}*"):
            if entry.is_symlink() or not entry.is_dir():
                continue
            try:
                os.close(_lock(entry))
            except BlockingIOError:
                hint = "wait for it, choose another output, or pass `--force` to replace what it makes"
                raise UserError("CX708", f"another build of {self.output} is running", hint) from None
            except OSError:
                continue  # gone, or there are no locks here

    def _adopt(self) -> None:
        """Take over what an interrupted writer of this output left; of several, the one with the most in kept files."""
        best: tuple[tuple[int, int], Path, int] | None = None
        for entry in sorted(self.output.parent.glob(f"{_escaped(f'.{self.output.name}.partial-')}*")):
            if entry.is_symlink() or not entry.is_dir():
                continue
            with contextlib.suppress(OSError):  # a living build has the lock
                lock = _lock(entry)
                kept = _read_kept(entry)
                worth = (sum(one.size_bytes for one in kept), len(kept))
                if kept and (best is None or worth > best[0]):
                    if best is not None:
                        os.close(best[2])
                    best = (worth, entry, lock)
                else:
                    os.close(lock)
        if best is None:
            return
        _, self._staging, self._lock = best
        self._kept = {kept.name: kept for kept in _read_kept(self._staging)}
        self.resumed = len(self._kept)
        # What is not known to be complete is made again.
        for name, _ in list(_regular_files(self._staging)):
            if name not in self._kept:
                (self._staging / name).unlink()

    def _record_path(self, name: str) -> Path:
        return self._open_staging() / _STATE / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"

    def _stage(self) -> None:
        if self._staging is not None:
            return
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
        known = {name: kept for name, kept in self._kept.items() if name in found and _unchanged(staging / name, kept)}
        self._progress.begin("hash", sum(size for name, size in found.items() if name not in known))
        done = 0
        for name in sorted(found):
            if name in known:
                yield FileRecord(name, known[name].size_bytes, known[name].sha256, self._roles[name])
                continue
            with _file_system_errors(self.output), (staging / name).open("rb", buffering=0) as file:
                size, digest = hash_file(file.fileno(), partial(self._hashed, done))
            done += size
            yield FileRecord(path=name, size_bytes=size, sha256=digest, role=self._roles[name])
        self._progress.end("hash")

    def _hashed(self, before: int, read: int) -> None:
        self._progress.update("hash", before + read)

    def _drop_unasked(self, staging: Path) -> None:
        """Remove what was taken over and nobody asked for: an engine of other cuts, or of what is left out now."""
        for name in sorted(self._kept.keys() - self._roles.keys()):
            del self._kept[name]
            self._record_path(name).unlink(missing_ok=True)
            path = staging / name
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                while path.parent != staging:
                    path = path.parent
                    path.rmdir()

    def _swap_without_state(self, staging: Path) -> None:
        """Put ``staging`` in place; its records of kept files are there again where that fails."""
        state, aside = staging / _STATE, _sibling(self.output, "state")
        if not state.is_dir():
            self._swap(staging)
            return
        state.rename(aside)
        try:
            self._swap(staging)
        except BaseException:
            aside.rename(state)
            raise
        shutil.rmtree(aside, ignore_errors=True)

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


def _read_kept(staging: Path) -> list[Kept]:
    """Records of files that are still as they were when they were kept. One that cannot be read counts for none."""
    found = []
    for record in sorted((staging / _STATE).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, StrictError):
            kept = Kept(**json.loads(record.read_text(encoding="utf-8")))
            check_path(kept.name, "path")
            if _unchanged(staging / kept.name, kept):
                found.append(kept)
    return found


def _unchanged(path: Path, kept: Kept) -> bool:
    with contextlib.suppress(OSError):
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (kept.size_bytes, kept.mtime_ns)
    return False


def _escaped(text: str) -> str:
    """``text`` as a pattern that matches itself alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)


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
        if Path(directory) == root and _STATE in subdirectories:
            subdirectories.remove(_STATE)
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
