"""A bundle as one file: a tar archive with the manifest first, which plain `tar` reads too.

Packing verifies, and writes the same bytes for the same bundle. Unpacking takes what the manifest lists and nothing
else, hashes it as it is written, and puts the directory in place when all of it is right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, NoReturn

from cosmos_export import directories, files, kinds
from cosmos_export.bundle.files import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, BundleFiles
from cosmos_export.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from cosmos_export.bundle.strict import StrictError
from cosmos_export.bundle.verify import read_files
from cosmos_export.diagnostics import ToolError, UserError, shown
from cosmos_export.machine.system import free_disk
from cosmos_export.progress import Progress, Silent

SUFFIX = ".tar"
_BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 22
_NAME_BYTES = 100
_PACKING, _UNPACKING = "pack", "unpacking"


def pack(bundle: Path, output: Path, progress: Progress | None = None) -> int:
    """Write the verified ``bundle`` as the file ``output``; returns its size in bytes. CX711: it is not what its
    manifest says; CX735: the name is not one of a tar archive, or exists; CX736: too little disk space."""
    if output.suffix != SUFFIX:
        hint = f"call it {output.name}{SUFFIX}; weights do not get smaller by compression"
        raise UserError("CX735", f"{output} is not called *{SUFFIX}", hint)
    if os.path.lexists(output):
        raise UserError("CX735", f"{output} exists", "choose another name")
    report = progress or Silent()
    found = read_files(bundle, report)
    names = [MANIFEST_NAME, *([SIGNATURE_NAME] if (bundle / SIGNATURE_NAME).exists() else [])]
    names += [record.path for record in found.manifest.files]
    _require_space(output, sum(record.size_bytes for record in found.manifest.files))
    report.begin(_PACKING, len(names))
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with partial.open("xb") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for index, name in enumerate(names, 1):
                _add(archive, found, name)
                report.update(_PACKING, index)
            archive.close()
            raw.flush()
            os.fsync(raw.fileno())
        partial.rename(output)
        directories.sync_directory(output.absolute().parent)
    finally:
        partial.unlink(missing_ok=True)
    report.end(_PACKING)
    return output.stat().st_size


def _add(archive: tarfile.TarFile, found: BundleFiles, name: str) -> None:
    if len(name.encode()) > _NAME_BYTES:
        raise UserError("CX735", f"{shown(name)} is too long a name for an archive", "copy the directory instead")
    member = tarfile.TarInfo(name)
    member.mode, member.mtime = 0o644, 0
    with files.opened(found.path / name) as file:
        member.size = os.fstat(file.fileno()).st_size
        archive.addfile(member, file)


def unpack(archive: Path, output: Path, progress: Progress | None = None) -> Manifest:
    """Put the bundle in the file ``archive`` at ``output``, whole or not at all; returns its manifest.

    CX735: ``output`` exists; CX736: too little disk space; CX737: the file is no archive of a bundle, or damaged.
    """
    if os.path.lexists(output):
        raise UserError("CX735", f"{output} exists", "choose another directory")
    try:
        with files.opened(archive) as file, _new(output) as folder:
            manifest = _take(archive, file, folder, output, progress or Silent())
            directories.sync_tree(folder)
            directories.open_up(folder)
            folder.rename(output)
    except OSError as error:
        raise ToolError("CX737", f"cannot unpack {archive}: {files.reason(error)}", "check path and disk") from error
    directories.sync_directory(output.absolute().parent)
    return manifest


@contextmanager
def _new(output: Path) -> Iterator[Path]:
    directories.remove_dead(output, _UNPACKING)
    path = directories.sibling(output, _UNPACKING)
    if path is None:
        raise ToolError("CX737", f"too many unfinished directories beside {output}", "remove them")
    path.mkdir(0o700)
    descriptor = directories.lock(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _take(archive: Path, file: FileIO, folder: Path, output: Path, progress: Progress) -> Manifest:
    kind = kinds.of_file(archive)
    if kind is not None and kind.what != kinds.TAR:
        raise UserError("CX737", f"{archive} is not the archive of a bundle: it is {kind.what}", kind.hint)
    members = _members(archive, file)
    name, size = next(members, ("", 0))
    if name != MANIFEST_NAME or size > MAX_MANIFEST_BYTES:
        _refuse(archive, f"its first file is {shown(name)}, not {MANIFEST_NAME}")
    data = _exactly(archive, file, size)
    try:
        manifest = parse_manifest(data)
    except StrictError as error:
        _refuse(archive, f"its manifest: {error}")
    (folder / MANIFEST_NAME).write_bytes(data)
    left = {record.path: record for record in manifest.files}
    total = sum(record.size_bytes for record in manifest.files)
    _require_space(output, total)
    progress.begin(_UNPACKING, total)
    done, signed = 0, False
    for name, size in members:
        if name == SIGNATURE_NAME and not signed and size <= MAX_SIGNATURE_BYTES:
            (folder / name).write_bytes(_exactly(archive, file, size))
            signed = True
            continue
        record = left.pop(name, None)
        if record is None:
            _refuse(archive, f"{shown(name)} is not in its manifest, or twice in it")
        if size != record.size_bytes:
            _refuse(archive, f"{name} has {size:,} bytes, the manifest says {record.size_bytes:,}")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as target:
            digest = _copied(archive, file, target, size)
        if digest != record.sha256:
            _refuse(archive, f"SHA-256 of {name} is {digest}, the manifest says {record.sha256}")
        done += size
        progress.update(_UNPACKING, done)
    progress.end(_UNPACKING)
    if left:
        _refuse(archive, f"{len(left)} files are missing: {', '.join(sorted(left)[:3])}")
    return manifest


def _members(archive: Path, file: FileIO) -> Iterator[tuple[str, int]]:
    """Name and size of each file in the archive; what is done with it must have read it when the next is asked for.

    Plain files with short names are all that `pack` writes, so nothing else is read: no links, no extended headers.
    """
    while True:
        start = file.tell()
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            _refuse(archive, "it ends before its end mark: it is truncated")
        if not header.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError):
            _refuse(archive, "it is no tar archive, or damaged")
        if not member.isreg() or member.size < 0:
            _refuse(archive, f"{shown(member.name)} is no plain file")
        yield member.name, member.size
        file.seek(start + _BLOCK + -(-member.size // _BLOCK) * _BLOCK)


def _exactly(archive: Path, file: FileIO, size: int) -> bytes:
    return b"".join(_chunks(archive, file, size))


def _copied(archive: Path, file: FileIO, target: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(archive, file, size):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def _chunks(archive: Path, file: FileIO, size: int) -> Iterator[bytes]:
    while size:
        chunk = file.read(min(size, _CHUNK_BYTES))
        if not chunk:
            _refuse(archive, "it ends within a file: it is truncated")
        size -= len(chunk)
        yield chunk


def _require_space(output: Path, needed: int) -> None:
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = free_disk(folder)
    if free < needed:
        what = f"{needed / 1e9:,.1f} GB are needed in {folder}, and {free / 1e9:,.1f} GB are free"
        raise UserError("CX736", what, "free some space, or choose another disk")


def _refuse(archive: Path, what: str) -> NoReturn:
    raise UserError("CX737", f"{archive} is not the archive of a bundle: {what}", "copy or download it again")
