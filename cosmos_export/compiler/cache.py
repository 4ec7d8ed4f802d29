"""Engines that finished builds have left and graphs that were captured, found by the key of what they were made from.

The cache holds no engine but the place of each: in the bundle it was built for. A build that needs the same one copies
it from there and checks its digest; where the bundle is gone or has changed, the engine is built. So engines cost no
disk space, and deleting a bundle frees all of it. Captured graphs are small and are in the cache itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cosmos_export import files
from cosmos_export.bundle import strict
from cosmos_export.diagnostics import UserError
from cosmos_export.progress import Progress, Silent

_CHUNK_BYTES = 1 << 24
_ENTRY_BYTES = 4 << 20
"""No entry comes near."""
_FILE = re.compile(r"[0-9a-f]{64}\.json")
_GRAPHS = ".graphs"
_CONTENT = re.compile(rf"[0-9a-f]{{64}}\{_GRAPHS}")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.partial")
_Digest = Annotated[str, strict.Pattern("[0-9a-f]{64}", "a SHA-256 in lowercase hexadecimal")]
_Name = Annotated[str, strict.Pattern(r"[A-Za-z0-9][\w.+-]{0,199}", "the name of an engine")]
_Line = Annotated[str, strict.Pattern(r"[ -~]{0,400}", "a line of plain text")]
_Place = Annotated[str, strict.Pattern(r"/[^\x00-\x1f\x7f]{1,4095}", "the path of a file from the root")]
VARIABLE = "COSMOS_EXPORT_CACHE"
"""Environment variable with the directory of the cache; ``off`` for none."""
GRAPHS_VARIABLE = "COSMOS_EXPORT_GRAPHS"
"""Environment variable with the directory of captured graphs, which other machines can use too. Default: the cache."""


@dataclass(frozen=True)
class Entry:
    """One engine, or the graphs of one capture: what they were made from, and where they are."""

    key: _Digest
    name: _Name
    components: Mapping[str, str]
    path: _Place
    """Path of the file: an engine's in its bundle, that of graphs in the cache."""
    size_bytes: int
    sha256: _Digest
    facts: Mapping[str, Any]
    """An engine's report."""
    created: _Line

    @property
    def kind(self) -> Literal["engine", "graphs"]:
        return "graphs" if self.path.endswith(_GRAPHS) else "engine"

    @property
    def present(self) -> bool:
        """The file is there, with the size it had. Its digest is checked when it is copied."""
        with contextlib.suppress(OSError):
            return Path(self.path).stat().st_size == self.size_bytes
        return False


def key_of(components: Mapping[str, str]) -> str:
    """The key of what ``components`` describe: equal keys, equal bytes."""
    return hashlib.sha256(json.dumps(dict(components), sort_keys=True).encode()).hexdigest()


def default_folder() -> Path | None:
    """Default directory of the cache: ``$COSMOS_EXPORT_CACHE``, else below the user's cache directory."""
    given = os.environ.get(VARIABLE, "")
    if given:
        return None if given == "off" else Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmos-export" / "engines"


def default_graphs_folder() -> Path | None:
    """Default directory of captured graphs: ``$COSMOS_EXPORT_GRAPHS``, else with the engines."""
    given = os.environ.get(GRAPHS_VARIABLE, "")
    if given:
        return None if given == "off" else Path(given)
    return default_folder()


class Cache:
    """The entries in ``folder``; of None there are none, and none are added."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, key: str) -> Entry | None:
        """The entry under ``key`` whose file is there."""
        if self.folder is None:
            return None
        entry = _read(self.folder / f"{key}.json")
        return entry if entry is not None and entry.present else None

    def add(self, entries: Iterator[Entry] | list[Entry]) -> None:
        """Record ``entries``, except those of which another copy is known and still there. A cache that cannot be
        written is left as it is: it is a convenience."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError), self._locked() as folder:
            for entry in entries:
                known = self.find(entry.key)
                if known is not None and known.sha256 == entry.sha256:
                    continue  # the copy may go with its bundle while the first one stays
                self._record(entry, folder)

    def keep(self, name: str, components: Mapping[str, str], data: bytes) -> None:
        """Keep ``data``, the graphs called ``name`` that were made from ``components``; a cache that cannot be written
        is left as it is."""
        if self.folder is None:
            return
        key, created = key_of(components), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        digest = hashlib.sha256(data).hexdigest()
        with contextlib.suppress(OSError), self._locked() as folder:
            path = folder.absolute() / f"{key}{_GRAPHS}"
            _write(folder, key, path, data)
            self._record(Entry(key, name, components, str(path), len(data), digest, {}, created), folder)

    def kept(self, key: str) -> bytes | None:
        """The graphs under ``key``, if they are still what was kept."""
        entry = self.find(key)
        if self.folder is None or entry is None or entry.kind != "graphs":
            return None
        with contextlib.suppress(OSError):
            data = files.read_bytes(self.folder / f"{key}{_GRAPHS}")
            return data if hashlib.sha256(data).hexdigest() == entry.sha256 else None
        return None

    def _record(self, entry: Entry, folder: Path) -> None:
        text = json.dumps(asdict(entry), indent=1).encode()
        if _entry(entry.key, text) is not None:  # else it would never be found again: a path that is not UTF-8
            _write(folder, entry.key, folder / f"{entry.key}.json", text)

    def entries(self) -> list[Entry]:
        """All entries, the newest first. Files that cannot be read are left out."""
        if self.folder is None or not os.access(self.folder, os.R_OK | os.X_OK) or not self.folder.is_dir():
            return []
        found = [entry for path in self._files(_FILE) if (entry := _read(path)) is not None]
        return sorted(found, key=lambda entry: (entry.created, entry.name), reverse=True)

    def prune(self, everything: bool = False) -> list[Entry]:
        """Forget the entries whose file is gone or of another size, or all of them; returns them. Graphs go with their
        entry. Files that are called like entries and are none go with all of them, and nothing else of the directory
        does. CX486: it cannot be changed."""
        if self.folder is None or not self.folder.is_dir():
            return []
        try:
            with self._locked():
                entries = self.entries()
                gone = [entry for entry in entries if everything or not entry.present]
                names = {f"{entry.key}.json" for entry in gone}
                used = {f"{entry.key}{_GRAPHS}" for entry in entries if entry not in gone}
                for path in self._files(_FILE):
                    if path.name in names or (everything and not path.is_dir()):
                        path.unlink(missing_ok=True)
                for path in (*self._files(_PARTIAL), *self._files(_CONTENT)):
                    if path.name not in used and not path.is_dir():
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                "CX486",
                f"the cache in {self.folder} cannot be changed: {files.reason(error)}",
                "see who may write to it",
            ) from error
        return gone

    def _files(self, pattern: re.Pattern[str]) -> list[Path]:
        """Files with the names that this cache gives its files."""
        assert self.folder is not None
        return sorted(path for path in self.folder.iterdir() if pattern.fullmatch(path.name))

    def why(self, name: str, components: Mapping[str, str]) -> str:
        """Why there is no entry for an engine of these components: what differs from the nearest of its name."""
        near = nearest(name, components, self.entries())
        if near is None:
            return f"no build of `{name}` is recorded"
        differing = differences(components, near.components)
        if differing:
            return f"{' and '.join(differing)} differ from the one in {near.path}"
        return f"{near.path} is gone or has changed"

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        """The folder, to be changed by this process alone."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        # A pipe would be waited for, and a link would lead to a file that is not the cache's.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(lock).st_mode):
                raise files.FileRefusedError(errno.EINVAL, f"{path.name} is not a regular file")
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self.folder
        finally:
            os.close(lock)


def nearest(name: str, components: Mapping[str, str], entries: list[Entry]) -> Entry | None:
    """The entry called ``name`` that differs in the fewest components; the newest, if there are several."""
    own = [entry for entry in entries if entry.name == name]
    return min(own, key=lambda entry: len(differences(components, entry.components)), default=None)


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Names of the components that are not the same in both."""
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


def copy_checked(entry: Entry, target: Path, progress: Progress | None = None) -> bool:
    """Copy the file of ``entry`` to ``target``, zeros as holes. False and nothing there where it cannot be read or its
    digest is not what it was."""
    partial = target.with_name(f".{target.name}.partial")
    task, shown, digest, done = f"copy {target.name}", progress or Silent(), hashlib.sha256(), 0
    opening = contextlib.ExitStack()
    try:
        source = opening.enter_context(files.opened(Path(entry.path)))
    except OSError:  # only this may fail quietly
        return False
    shown.begin(task, entry.size_bytes)
    try:
        with opening, partial.open("wb", buffering=0) as file:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                shown.update(task, done)
                if not chunk.strip(b"\0"):
                    file.seek(len(chunk), os.SEEK_CUR)
                    continue
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
            file.truncate(done)
            os.fsync(file.fileno())
        if digest.hexdigest() != entry.sha256:
            return False
        partial.replace(target)
        return True
    finally:
        partial.unlink(missing_ok=True)
        shown.end(task)


def _own(path: Path) -> bool:
    """Whether ``path`` is a file of this user or of root: who else wrote it could have it say anything."""
    return path.lstat().st_uid in (os.geteuid(), 0)


def _read(path: Path) -> Entry | None:
    """The entry in the file ``path``; None where there is none, or one under another name."""
    with contextlib.suppress(OSError):
        return _entry(path.stem, files.read_bytes(path, _ENTRY_BYTES)) if _own(path) else None
    return None


def _write(folder: Path, key: str, path: Path, data: bytes) -> None:
    """``path`` with ``data``, all of it or nothing."""
    partial = folder / f".{key}.partial"
    partial.write_bytes(data)
    partial.replace(path)


def _entry(key: str, data: bytes) -> Entry | None:
    """The entry under ``key``, if ``data`` is one: of these components, by the key that they have."""
    with contextlib.suppress(strict.StrictError):
        entry = strict.decode(Entry, strict.parse_object(data))
        return entry if entry.key == key == key_of(entry.components) else None
    return None
