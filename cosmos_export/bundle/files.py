"""The files of one bundle, always those of the directory that was opened and as its manifest lists them.

Everything is opened relative to one descriptor of the bundle's directory, one component at a time and without following
links, so a link to the bundle that is changed later changes nothing. A name is never a path: a file is opened only if
the manifest lists it, in the role that its reader expects. The path of the bundle itself may be a symbolic link
(`current -> release-7`); nothing in the bundle may be one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cosmos_export import kinds
from cosmos_export.bundle import travel
from cosmos_export.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRecord, Manifest, parse_manifest
from cosmos_export.bundle.strict import StrictError
from cosmos_export.diagnostics import FindingError, UserError, shown
from cosmos_export.machine.process import path_of_descriptor

SIGNATURE_NAME = "manifest.sig"
"""The one file of a bundle that its manifest does not list, since it covers the manifest."""
MAX_SIGNATURE_BYTES = 32 << 20
"""A signature lists the files that the manifest lists, which has at most half of this."""
MAX_DOCUMENT_BYTES = 256 << 20
"""The largest file that `BundleFiles.read` takes into memory."""
_CHUNK_BYTES = 4 * 1024 * 1024
# O_NONBLOCK: opening a FIFO for reading would otherwise wait for a writer for ever.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class BundleFiles:
    """A bundle whose manifest was read, and whose directory stays open for as long as this object lives."""

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        """Open the bundle at ``path`` and read its manifest, unless it is given.

        UserError CX700 where there is none; `StrictError` where it is not a manifest.
        """
        self.path = Path(path)
        self.descriptor = _open_directory(self.path)
        weakref.finalize(self, os.close, self.descriptor)
        data = b"" if manifest is not None else _read_manifest(self.descriptor, self.path)
        self.manifest = manifest if manifest is not None else parse_manifest(data)
        self.bundle_id = hashlib.sha256(data or self.manifest.to_bytes()).hexdigest()
        """SHA-256 of the manifest: what names this bundle."""
        self._records = {record.path: record for record in self.manifest.files}

    def __repr__(self) -> str:
        return f"BundleFiles({str(self.path)!r}, {self.manifest!r})"

    def record(self, name: str, role: str) -> FileRecord:
        """The manifest's entry of the file ``name``; FindingError CX711 where it lists none in this role."""
        found = self._records.get(name)
        if found is None or found.role != role:
            what = "is not in the manifest" if found is None else f"has the role {shown(found.role)}, not `{role}`"
            raise self._changed(name, what)
        return found

    @contextlib.contextmanager
    def open(self, name: str, role: str) -> Iterator[BinaryIO]:
        """The file ``name``, unbuffered. FindingError CX711 where it is not as listed: another size, no plain file."""
        record = self.record(name, role)
        with contextlib.ExitStack() as stack:
            try:
                descriptor = stack.enter_context(opened(self.descriptor, name))
                status = os.fstat(descriptor)
            except OSError as error:
                raise self._changed(name, reason(error)) from error
            problem = kind_problem(status)
            if not problem and status.st_size != record.size_bytes:
                problem = f"has {status.st_size:,} bytes, the manifest says {record.size_bytes:,}"
            if problem:
                raise self._changed(name, problem)
            yield stack.enter_context(open(descriptor, "rb", 0, closefd=False))

    def read(self, name: str, role: str) -> bytes:
        """All of the file ``name``, which is what the manifest lists; FindingError CX711 otherwise."""
        record = self.record(name, role)
        if record.size_bytes > MAX_DOCUMENT_BYTES:
            raise self._changed(name, f"has {record.size_bytes:,} bytes; read into memory: {MAX_DOCUMENT_BYTES:,}")
        with self.open(name, role) as file:
            data = b"".join(iter(lambda: file.read(_CHUNK_BYTES), b""))
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise self._changed(name, "is not the file the manifest lists")
        return data

    @property
    def has_signature(self) -> bool:
        """Whether there is something under the name of the signature."""
        try:
            os.stat(SIGNATURE_NAME, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    def read_signature(self) -> bytes | None:
        """The signature as it is, unchecked; None where there is none. FindingError CX711: it is no plain file."""
        if not self.has_signature:
            return None
        try:
            with opened(self.descriptor, SIGNATURE_NAME) as descriptor, open(descriptor, "rb", closefd=False) as file:
                problem = signature_problem(os.fstat(descriptor))
                if problem:
                    raise self._changed(SIGNATURE_NAME, problem)
                return file.read(MAX_SIGNATURE_BYTES)
        except OSError as error:
            raise self._changed(SIGNATURE_NAME, reason(error)) from error

    def location(self, name: str, role: str) -> Path:
        """A path of the file ``name`` for libraries that open paths: through the open directory where the system has
        such paths. FindingError CX711 as from `open`."""
        with self.open(name, role):
            pass
        pinned = path_of_descriptor(self.descriptor)
        if pinned.is_dir():
            return pinned / name
        resolved = self.path.resolve()
        if not os.path.samestat(resolved.stat(), os.fstat(self.descriptor)):
            raise self._changed(".", "is another directory than the one that was verified")
        return resolved / name

    def _changed(self, name: str, what: str) -> FindingError:
        return FindingError(
            "CX711",
            f"{self.path} fails verification: {shown(name)}: {what}",
            f"do not use it; `cosmos-export bundle verify {self.path}` lists everything",
        )


def open_bundle(path: Path) -> BundleFiles:
    """The bundle at ``path``, its manifest read and nothing else. CX700: there is none; CX711: it is damaged."""
    try:
        return BundleFiles(path)
    except StrictError as error:
        hint = f"`cosmos-export bundle verify {path}` lists everything"
        raise FindingError("CX711", f"{path} fails verification: {MANIFEST_NAME}: {error}", hint) from error


def hash_file(descriptor: int, advance: Callable[[int], None] = lambda read: None) -> tuple[int, str]:
    """Bytes read from ``descriptor`` to its end, and their SHA-256."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    size = 0
    while count := os.readv(descriptor, [buffer]):
        digest.update(buffer[:count])
        size += count
        advance(size)
    return size, digest.hexdigest()


@contextlib.contextmanager
def opened(root: int, path: str) -> Iterator[int]:
    """``path`` opened one component at a time, so that no directory on the way is a link either. A link of a snapshot
    to a blob of its Hugging Face cache is followed."""
    *directories, name = path.split("/")
    with contextlib.ExitStack() as stack:
        current = root
        for directory in directories:
            current = os.open(directory, OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            stack.callback(os.close, current)
        try:
            descriptor = os.open(name, _READ, dir_fd=current)
            stack.callback(os.close, descriptor)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            descriptor = stack.enter_context(travel.opened_blob(root, path, current))
        yield descriptor


def kind_problem(status: os.stat_result) -> str:
    """Why an entry cannot be a file of a bundle; empty if it can."""
    if stat.S_ISLNK(status.st_mode):
        return "a symbolic link"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    # The file can be rewritten through its other name after it was verified.
    if status.st_nlink != 1 and not travel.fixed(status):
        return (
            f"{status.st_nlink} hard links; a file of a bundle has one name, unless nobody may write to it "
            "(copy the bundle with `cp -r`, or `chmod -R a-w` it)"
        )
    return ""


def signature_problem(status: os.stat_result) -> str:
    """Why an entry cannot be the signature of a bundle; empty if it can."""
    if status.st_size > MAX_SIGNATURE_BYTES:
        return f"larger than the {MAX_SIGNATURE_BYTES:,} bytes a signature may have"
    return kind_problem(status)


def reason(error: OSError) -> str:
    return "a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, OPEN_DIRECTORY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        said = getattr(error, "strerror", None) or str(error)
        kind = kinds.of_file(path)
        if kind is not None:
            raise UserError("CX700", f"{path} is not a bundle: it is {kind.what}", kind.hint) from error
        raise UserError("CX700", f"{path} is not a bundle: {said}", "name the directory of a bundle") from error


def _read_manifest(root: int, path: Path) -> bytes:
    try:
        with opened(root, MANIFEST_NAME) as descriptor, open(descriptor, "rb", closefd=False) as file:
            status = os.fstat(descriptor)
            problem = kind_problem(status)
            if problem:
                raise StrictError("", problem)
            if status.st_size > MAX_MANIFEST_BYTES:
                raise StrictError("", f"larger than the {MAX_MANIFEST_BYTES:,} bytes a manifest may have")
            return file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        kind = kinds.of_folder(path)
        what, hint = (f"it has no {MANIFEST_NAME}", "name the directory of a bundle")
        if kind is not None:
            what, hint = f"it is {kind.what}", kind.hint
        raise UserError("CX700", f"{path} is not a bundle: {what}", hint) from None
    except OSError as error:
        raise StrictError("", f"cannot be opened: {reason(error)}") from error
