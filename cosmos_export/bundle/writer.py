"""Writes a bundle: everything into a directory beside the output, the manifest last, then one rename.

Under the final name there is either nothing, the bundle of before, or the whole new bundle. What an interrupted build
leaves is a hidden directory beside it; a lock on that directory tells the next build whether its owner still lives.

A file that took long is *kept*: recorded as complete, with its digest and the key of what it was made from. A writer
that resumes takes the hidden directory over, with its kept files and nothing else; the build asks for each by its key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cosmos_export import directories, files
from cosmos_export.bundle import strict
from cosmos_export.bundle.files import hash_file
from cosmos_export.bundle.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    check_path,
    parse_manifest,
    problems,
)
from cosmos_export.bundle.staging import (
    STATE,
    Kept,
    file_system_errors,
    make_parent,
    read_kept,
    regular_files,
    remove_odd_entries,
    replace_file,
    require_replaceable,
    sibling,
)
from cosmos_export.bundle.strict import StrictError
from cosmos_export.diagnostics import FindingError, InternalError, ToolError, UserError
from cosmos_export.machine.system import free_disk
from cosmos_export.progress import Progress, Silent
from cosmos_export.stamps import Stamp

_SCRATCH = ".scratch"
"""Folder of what is made to be measured and is no part of the bundle."""
_STAGED, _SET_ASIDE = "partial", "state"
_log = logging.getLogger("cosmos_export")
# What the file system takes besides the files themselves: the manifest, directories, rounding to blocks.
_SPARE_BYTES = 64 * 1024 * 1024


Measure = Callable[[Path, Manifest], Manifest]
Describe = Callable[[Manifest], Mapping[str, bytes]]
DESCRIPTION_ROLE = "provenance"


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
        self._keeping = threading.RLock()
        """Engines are built and kept beside each other."""
        self._stamps: dict[str, Stamp] = {}
        """Stamps of the kept files from when their digests were made, in this process."""
        self.resumed = 0
        self.left: Path | None = None
        """Where the kept files of a block that was interrupted are."""

    def __enter__(self) -> Self:
        directories.restore(self.output)
        require_replaceable(self.output, self._force)
        make_parent(self.output)
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

    def staged(self, name: str) -> Path | None:
        """The file that will be ``name`` in the bundle, where it has been written."""
        path = self._open_staging() / name
        return path if name in self._roles and path.is_file() else None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty directory on the disk of the bundle that is no part of it and vanishes after the block. What a build
        that was killed leaves in it vanishes with its staging directory."""
        path = self._open_staging() / _SCRATCH
        with file_system_errors(self.output):
            path.mkdir(0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def keep(self, name: str, key: str, sha256: str, facts: Mapping[str, Any] | None = None) -> None:
        """Record that the file ``name`` is complete, made from what ``key`` stands for, and has the digest ``sha256``.

        It and its record are on the disk when this returns. The file must not be written to any more: `commit` takes
        the digest from here. CX710 where a file that was kept before has changed: this one may be made from it.
        """
        path = self._open_staging() / name
        self._require_inputs()
        self._require_kept()
        with file_system_errors(self.output):
            directories.sync(path)
            stamp = Stamp.settled(path)
            kept = Kept(name, key, stamp.size_bytes, stamp.mtime_ns, sha256, dict(facts or {}))
            record = self._record_path(name)
            record.parent.mkdir(exist_ok=True)
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(kept)), encoding="utf-8")
            directories.sync(partial)
            partial.replace(record)
            directories.sync_directory(record.parent)
        with self._keeping:
            self._kept[name], self._stamps[name] = kept, stamp

    def kept(self, name: str, key: str) -> Kept | None:
        """The complete file ``name``, if it was kept under ``key``; one kept under another key is removed."""
        with self._keeping:
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
        """SHA-256 of the file ``name``, where it was kept; CX710 where its bytes may be others now."""
        if name not in self._kept:
            return None
        self._require_kept(name)
        return self._kept[name].sha256

    def commit(self, manifest: Manifest, measure: Measure | None = None, describe: Describe | None = None) -> Manifest:
        """Complete ``manifest`` with the files written, write it, and put the bundle in place.

        ``measure`` is called with the directory in which the bundle is complete, and the manifest in it. It returns the
        manifest with what it measured, of the same files, or raises: the bundle is not put in place then. ``describe``
        is called last, with the manifest as it will be but for the files that it returns by name: they are written,
        with the role `provenance`, and listed.
        """
        staging = self._open_staging()
        self._drop_unasked(staging)
        complete = replace(manifest, files=tuple(self._records(staging)))
        target, data = staging / MANIFEST_NAME, _checked(complete)
        with self._without_state(staging):
            with file_system_errors(self.output):
                target.write_bytes(data)
            if measure is not None:
                complete = replace(self._measured(measure, complete), files=complete.files)
            if describe is not None:
                files = [*complete.files, *self._described(describe(complete))]
                complete = replace(complete, files=tuple(sorted(files, key=lambda file: file.path)))
            data = _checked(complete)
            with file_system_errors(self.output):
                target.write_bytes(data)
                directories.sync_tree(staging)
                self._require_inputs()
                self._require_kept()
                directories.open_up(staging)
                self._swap(staging)
        self._staging = None
        self._unlock()
        return complete

    # -- before the work ---------------------------------------------------------------------------------------------

    def _check_space(self) -> None:
        there = sum(kept.size_bytes for kept in self._kept.values())
        needed = max(0, self._required_bytes - there) + _SPARE_BYTES
        free = free_disk(self.output.parent)
        if free < needed:
            raise ToolError(
                "CX704",
                f"not enough disk space in {self.output.parent}: {_gib(needed)} needed, {_gib(free)} free",
                "free some space or choose an output on another disk",
            )

    def _remove_leftovers(self) -> None:
        """Remove what builds of this output left that died: their lock is free. A live build keeps its own."""
        directories.remove_dead(self.output, _STAGED, _SET_ASIDE, directories.REPLACED)

    def _check_alone(self) -> None:
        """Nobody else makes this output: the later of two would find it there at its end. `--force` replaces it."""
        if self._force or self._staging is not None:
            return
        for entry in directories.siblings(self.output, _STAGED):
            try:
                os.close(directories.lock(entry))
            except BlockingIOError:
                hint = "wait for it, choose another output, or pass `--force` to replace what it makes"
                raise UserError("CX708", f"another build of {self.output} is running", hint) from None
            except OSError:
                continue  # gone, or there are no locks here

    def _adopt(self) -> None:
        """Take over what an interrupted writer of this output left; of several, the one with the most in kept files.

        Only from a directory of this user that nobody else may write to, and only files whose bytes still have the
        digest that was recorded.
        """
        best: tuple[tuple[int, int], Path, int] | None = None
        for entry in directories.siblings(self.output, _STAGED):
            if not directories.private(entry):
                _log.warning("%s is not taken over: others may write to it", entry)
                continue
            with contextlib.suppress(OSError):  # a living build has the lock
                lock = directories.lock(entry)
                self._take_back_state(entry)
                remove_odd_entries(entry)
                kept = read_kept(entry)
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
        self._staging.chmod(0o700)
        self._hash_again(self._staging, read_kept(self._staging))
        self.resumed = len(self._kept)
        shutil.rmtree(self._staging / _SCRATCH, ignore_errors=True)
        # What is not known to be complete is made again.
        for name, _ in list(regular_files(self._staging)):
            if name not in self._kept:
                (self._staging / name).unlink()

    def _hash_again(self, staging: Path, found: list[Kept]) -> None:
        """Take the files of which the bytes are what was recorded."""
        self._progress.begin("hash finished files", sum(kept.size_bytes for kept in found))
        done = 0
        for kept in found:
            path = staging / kept.name
            try:
                stamp = Stamp.settled(path)
                with files.opened(path) as file:
                    size, digest = hash_file(file.fileno(), partial(self._hashed, "hash finished files", done))
            except OSError:
                continue
            done += kept.size_bytes
            if (size, digest) == (kept.size_bytes, kept.sha256):
                self._kept[kept.name], self._stamps[kept.name] = kept, stamp
            else:
                _log.warning("%s is made again: its bytes are not those that were finished", path)
        self._progress.end("hash finished files")

    def _require_kept(self, *names: str) -> None:
        """CX710 where a kept file is not what it was when its digest was made; of all where none is named."""
        with self._keeping:
            for name in names or tuple(self._kept):
                path = self._open_staging() / name
                try:
                    changed = self._stamps[name].difference(Stamp.of(path))
                except OSError as error:
                    changed = f"it cannot be read any more: {error.strerror or error}"
                if changed:
                    raise ToolError(
                        "CX710",
                        f"{path} was finished and has changed since: {changed}",
                        "something else writes to it: end that, then run the same command with `--resume`",
                    )

    def _take_back_state(self, staging: Path) -> None:
        """The records of ``staging``, where its writer died between setting them aside and giving it its name."""
        aside = self._aside(staging)
        if aside.is_dir() and not aside.is_symlink() and not (staging / STATE).exists():
            aside.rename(staging / STATE)

    def _aside(self, staging: Path) -> Path:
        """Where the records of ``staging`` are while it gets its name."""
        suffix = staging.name.removeprefix(f".{self.output.name}.{_STAGED}-")
        return staging.with_name(f".{self.output.name}.{_SET_ASIDE}-{suffix}")

    def _record_path(self, name: str) -> Path:
        return self._open_staging() / STATE / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"

    def _stage(self) -> None:
        if self._staging is not None:
            return
        with file_system_errors(self.output):
            while self._staging is None:
                staging = sibling(self.output, _STAGED)
                staging.mkdir(0o700)
                try:
                    self._lock = directories.lock(staging)
                except (BlockingIOError, FileNotFoundError):
                    continue  # another build has just taken it for a leftover
                except OSError:
                    self._lock = -1  # no locks on this file system: nobody will take it for a leftover
                self._staging = staging

    # -- commit ------------------------------------------------------------------------------------------------------

    def _records(self, staging: Path) -> Iterator[FileRecord]:
        found = dict(regular_files(staging))
        unknown, missing = sorted(set(found) - set(self._roles)), sorted(set(self._roles) - set(found))
        if unknown:
            raise InternalError("CX706", f"files without a role in the bundle: {', '.join(unknown[:5])}")
        if missing:
            raise InternalError("CX706", f"files never written: {', '.join(missing[:5])}")
        self._require_kept()
        known = self._kept
        self._progress.begin("hash", sum(size for name, size in found.items() if name not in known))
        done = 0
        for name in sorted(found):
            if name in known:
                yield FileRecord(name, known[name].size_bytes, known[name].sha256, self._roles[name])
                continue
            with file_system_errors(self.output), (staging / name).open("rb", buffering=0) as file:
                size, digest = hash_file(file.fileno(), partial(self._hashed, "hash", done))
            done += size
            yield FileRecord(path=name, size_bytes=size, sha256=digest, role=self._roles[name])
        self._progress.end("hash")

    def _described(self, found: Mapping[str, bytes]) -> Iterator[FileRecord]:
        for name, data in found.items():
            with file_system_errors(self.output):
                self.path(name, DESCRIPTION_ROLE).write_bytes(data)
            yield FileRecord(name, len(data), hashlib.sha256(data).hexdigest(), DESCRIPTION_ROLE)

    def _hashed(self, task: str, before: int, read: int) -> None:
        self._progress.update(task, before + read)

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

    def _measured(self, measure: Measure, complete: Manifest) -> Manifest:
        """Result of ``measure`` for the complete bundle. A finding is not reported where an input has changed."""
        try:
            return measure(self._open_staging(), complete)
        except FindingError:
            self._require_inputs()
            raise

    @contextlib.contextmanager
    def _without_state(self, staging: Path) -> Iterator[None]:
        """``staging`` is a bundle and nothing else; its records of kept files are there again where the block fails."""
        state, aside = staging / STATE, self._aside(staging)
        if not state.is_dir():
            yield
            return
        with file_system_errors(self.output):
            shutil.rmtree(aside, ignore_errors=True)
            state.rename(aside)
        try:
            yield
        except BaseException:
            (staging / MANIFEST_NAME).unlink(missing_ok=True)
            aside.rename(state)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _swap(self, staging: Path) -> None:
        """Rename ``staging`` to the output. With --force the bundle of before goes only when the new one is there."""
        # Once more: the build took its time, and something may have appeared.
        require_replaceable(self.output, self._force)
        previous = directories.take_place(staging, self.output)
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
    with file_system_errors(root):
        directories.sync_tree(root)
    replace_file(root, MANIFEST_NAME, _checked(manifest))


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


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
