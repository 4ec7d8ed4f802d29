"""Verifies a bundle, failing closed, cheap checks first: manifest, directory listing, sizes, then every byte.

A later stage runs only if the earlier ones passed, and a file that was not reached is reported as such, never as good.
Files are opened as `cosmos_export.bundle.files` does, and what is hashed is what was opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path, PurePosixPath

from cosmos_export.bundle import travel
from cosmos_export.bundle.files import (
    OPEN_DIRECTORY,
    SIGNATURE_NAME,
    BundleFiles,
    hash_file,
    kind_problem,
    open_bundle,
    opened,
    reason,
    signature_problem,
)
from cosmos_export.bundle.manifest import MANIFEST_NAME, MAX_PATH_DEPTH, FileRecord, Manifest
from cosmos_export.bundle.strict import StrictError
from cosmos_export.diagnostics import FindingError, shown
from cosmos_export.progress import Progress, Silent

MAX_EXTRA_ENTRIES = 100
"""A directory with more entries that do not belong is reported up to here."""


class Status(Enum):
    """Outcome of one check."""

    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"
    """The check was not reached, because an earlier stage failed."""


@dataclass(frozen=True)
class Check:
    """One check of one entry (of the manifest itself where the path says so)."""

    path: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """All checks, in the order of the manifest; entries that the manifest does not list come last."""

    bundle: Path
    manifest: Manifest | None
    """None unless the manifest is well formed and consistent. It is to be trusted only if `ok`."""
    checks: tuple[Check, ...]
    files: BundleFiles | None = None
    """The open bundle, where its manifest is one: what was checked, whatever becomes of its path."""

    @property
    def ok(self) -> bool:
        return self.manifest is not None and all(check.status is Status.PASS for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status is Status.FAIL)


def verify_bundle(path: Path, progress: Progress | None = None) -> VerifyReport:
    """Check the bundle at ``path``. Only what is no bundle at all raises (CX700); every mismatch is in the report."""
    path = Path(path)
    try:
        files = BundleFiles(path)
    except StrictError as error:
        return VerifyReport(path, None, (Check(MANIFEST_NAME, Status.FAIL, str(error)),))
    return verify_files(files, progress)


def verify_files(files: BundleFiles, progress: Progress | None = None) -> VerifyReport:
    """Check an open bundle, whose manifest is as it was read."""
    root, manifest = files.descriptor, files.manifest
    passed = Check(MANIFEST_NAME, Status.PASS)
    wrong, extra = _compare_listing(root, manifest)
    if wrong or extra:
        checks = [_unhashed(record, wrong) for record in manifest.files]
    else:
        checks = _hash_all(root, manifest, progress or Silent())
    return VerifyReport(files.path, manifest, (passed, *checks, *extra), files)


def read_files(path: Path | BundleFiles, progress: Progress | None = None) -> BundleFiles:
    """The bundle at ``path``, after full verification; CX711 if anything is not as listed."""
    files = path if isinstance(path, BundleFiles) else open_bundle(path)
    report = verify_files(files, progress)
    if not report.ok:
        first = report.failures[0]
        more = f" (and {len(report.failures) - 1} more)" if len(report.failures) > 1 else ""
        raise FindingError(
            "CX711",
            f"{files.path} fails verification: {shown(first.path)}: {first.detail}{more}",
            f"do not use it; `cosmos-export bundle verify {files.path}` lists everything",
        )
    return files


def read_bundle(path: Path, progress: Progress | None = None) -> Manifest:
    """The manifest of the bundle at ``path``, after full verification; CX711 if anything is not as listed."""
    return read_files(path, progress).manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at ``path``, for looking at: no other file is read. CX711 where it is none."""
    return open_bundle(path).manifest


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def _compare_listing(root: int, manifest: Manifest) -> tuple[dict[str, str], list[Check]]:
    """Failures of listed files (path → reason), and a failure for each entry that is not listed."""
    listed = {record.path: record for record in manifest.files}
    directories = {str(parent) for record in manifest.files for parent in list(PurePosixPath(record.path).parents)[:-1]}
    wrong: dict[str, str] = {}
    extra: list[Check] = []
    seen: set[str] = set()
    for name, found in _walk(root, "", directories):
        status = found if isinstance(found, str) else _followed(root, name, found)
        if isinstance(status, str):
            extra.append(Check(name, Status.FAIL, status))
        elif name in listed:
            seen.add(name)
            record = listed[name]
            problem = kind_problem(status)
            if not problem and status.st_size != record.size_bytes:
                problem = f"{status.st_size:,} bytes, the manifest says {record.size_bytes:,}"
            if problem:
                wrong[name] = problem
        elif name in directories:
            if not stat.S_ISDIR(status.st_mode):
                extra.append(Check(name, Status.FAIL, kind_problem(status) or "a file, expected a directory"))
        elif name == SIGNATURE_NAME:
            if problem := signature_problem(status):
                extra.append(Check(name, Status.FAIL, problem))
        elif name != MANIFEST_NAME and not travel.of_repository(name, status):
            extra.append(Check(name, Status.FAIL, "not listed in the manifest"))
    for name in listed:
        if name not in seen:
            wrong.setdefault(name, "missing")
    extra.sort(key=lambda check: check.path)
    more = len(extra) - MAX_EXTRA_ENTRIES
    if more > 0:
        extra[MAX_EXTRA_ENTRIES:] = [Check("...", Status.FAIL, f"{more} more entries that do not belong")]
    return wrong, extra


def _followed(root: int, name: str, status: os.stat_result) -> os.stat_result:
    """``status`` of the entry ``name``, or that of the blob which it leads to in a Hugging Face cache."""
    if not stat.S_ISLNK(status.st_mode):
        return status
    try:
        with opened(root, name) as descriptor:
            return os.fstat(descriptor)
    except OSError:
        return status


def _walk(directory: int, prefix: str, expected: set[str]) -> Iterator[tuple[str, os.stat_result | str]]:
    """Entries below ``directory`` with their status, or the reason why there is none.

    Only directories that the manifest speaks of are entered: any other is one extra entry, however much is in it.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        yield prefix or ".", f"cannot be listed: {reason(error)}"
        return
    for name in names:
        path = f"{prefix}{name}"
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            yield path, f"cannot be read: {reason(error)}"
            continue
        yield path, status
        if stat.S_ISDIR(status.st_mode) and path in expected and path.count("/") < MAX_PATH_DEPTH:
            try:
                inner = os.open(name, OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            except OSError as error:
                yield path, f"cannot be opened: {reason(error)}"
                continue
            try:
                yield from _walk(inner, f"{path}/", expected)
            finally:
                os.close(inner)


def _unhashed(record: FileRecord, wrong: dict[str, str]) -> Check:
    if record.path in wrong:
        return Check(record.path, Status.FAIL, wrong[record.path])
    return Check(record.path, Status.SKIPPED, "not hashed, since cheaper checks failed")


def _hash_all(root: int, manifest: Manifest, progress: Progress) -> list[Check]:
    progress.begin("verify", sum(record.size_bytes for record in manifest.files))
    checks: list[Check] = []
    done = 0
    for record in manifest.files:
        checks.append(_hash_one(root, record, partial(_advance, progress, done)))
        done += record.size_bytes
    progress.end("verify")
    return checks


def _advance(progress: Progress, before: int, read: int) -> None:
    progress.update("verify", before + read)


def _hash_one(root: int, record: FileRecord, advance: Callable[[int], None]) -> Check:
    try:
        with opened(root, record.path) as descriptor:
            problem = kind_problem(os.fstat(descriptor))
            if problem:
                return Check(record.path, Status.FAIL, problem)
            size, digest = hash_file(descriptor, advance)
    except OSError as error:
        return Check(record.path, Status.FAIL, f"cannot be read: {reason(error)}")
    if size != record.size_bytes:
        return Check(record.path, Status.FAIL, f"{size:,} bytes read, the manifest says {record.size_bytes:,}")
    if digest != record.sha256:
        return Check(record.path, Status.FAIL, f"SHA-256 is {digest}, the manifest says {record.sha256}")
    return Check(record.path, Status.PASS)
