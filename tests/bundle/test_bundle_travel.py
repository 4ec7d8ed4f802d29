"""Bundles are verified and read where models live, and links that lead anywhere else are not followed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import bundle_samples
import pytest

from cosmos_export.bundle import open_bundle, read_bundle, verify_bundle
from cosmos_export.diagnostics import FindingError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundle_samples.write(tmp_path / "x")
    return tmp_path / "x"


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def in_cache(bundle: Path, hub: Path) -> Path:
    """``bundle`` as `hf download` leaves it: small files by the digest of git, large ones by SHA-256."""
    cache = hub / "models--me--nano-bundle"
    snapshot = cache / "snapshots" / ("c" * 40)
    (cache / "blobs").mkdir(parents=True)
    for index, file in enumerate(files_of(bundle)):
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest() if index % 2 else hashlib.sha1(data).hexdigest()
        (cache / "blobs" / digest).write_bytes(data)
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        depth = len(file.relative_to(bundle).parts) - 1
        link.symlink_to("../" * (2 + depth) + f"blobs/{digest}")
    return snapshot


def test_a_hugging_face_cache(bundle: Path, tmp_path: Path) -> None:
    snapshot = in_cache(bundle, tmp_path / "hub")
    assert verify_bundle(snapshot).ok
    found = open_bundle(snapshot)
    record = next(one for one in found.manifest.files if one.size_bytes)
    assert found.read(record.path, record.role) == (bundle / record.path).read_bytes()
    assert found.location(record.path, record.role).read_bytes() == (bundle / record.path).read_bytes()


def test_a_blob_that_was_changed(bundle: Path, tmp_path: Path) -> None:
    snapshot = in_cache(bundle, tmp_path / "hub")
    record = next(one for one in read_bundle(bundle).files if one.size_bytes)
    blob = (snapshot / record.path).resolve()
    data = bytearray(blob.read_bytes())
    data[0] ^= 1
    blob.write_bytes(data)
    (failure,) = verify_bundle(snapshot).failures
    assert failure.path == record.path and "SHA-256" in failure.detail
    with pytest.raises(FindingError, match="CX711"):
        open_bundle(snapshot).read(record.path, record.role)


ESCAPES: dict[str, Callable[[Path, Path], str]] = {
    "absolute": lambda link, file: str(file),
    "beside": lambda link, file: os.path.relpath(file, link.parent),
    "too-high": lambda link, file: f"../../../../blobs/{'a' * 64}",
    "too-low": lambda link, file: f"../../blobs/{'a' * 64}",
    "not-a-digest": lambda link, file: "../../../blobs/weights",
    "through": lambda link, file: f"../../../blobs/../blobs/{'a' * 64}",
    "in-the-snapshot": lambda link, file: "../manifest.json",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_other_links_are_not_followed(bundle: Path, tmp_path: Path, name: str) -> None:
    snapshot = in_cache(bundle, tmp_path / "hub")
    record = next(one for one in read_bundle(bundle).files if one.size_bytes and one.path.count("/") == 1)
    link, same = snapshot / record.path, tmp_path / "same"
    same.write_bytes((bundle / record.path).read_bytes())
    (tmp_path / "hub/models--me--nano-bundle/blobs/weights").write_bytes(same.read_bytes())
    link.unlink()
    link.symlink_to(ESCAPES[name](link, same))
    failures = {check.path: check.detail for check in verify_bundle(snapshot).failures}
    assert "a symbolic link" in failures[record.path]
    with pytest.raises(FindingError, match="a symbolic link"):
        open_bundle(snapshot).read(record.path, record.role)


def test_a_blob_that_is_a_link_itself(bundle: Path, tmp_path: Path) -> None:
    snapshot = in_cache(bundle, tmp_path / "hub")
    record = next(one for one in read_bundle(bundle).files if one.size_bytes)
    blob = (snapshot / record.path).resolve()
    blob.rename(tmp_path / "moved")
    blob.symlink_to(tmp_path / "moved")
    assert record.path in {check.path for check in verify_bundle(snapshot).failures}


@pytest.mark.parametrize("name", [".gitattributes", ".gitignore", "README.md", "LICENSE", "NOTICE", ".git/HEAD",
                                  ".cache/huggingface/download/a.metadata"])  # fmt: skip
def test_what_repositories_keep_beside(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    assert verify_bundle(bundle).ok


@pytest.mark.parametrize("name", ["readme.exe", "README.md.py", "onnx/README.md", ".gitmodules", "model.safetensors"])
def test_anything_else_is_not_listed(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    assert not verify_bundle(bundle).ok


def test_a_readme_that_is_a_link_or_a_folder(bundle: Path, tmp_path: Path) -> None:
    (bundle / "README.md").symlink_to(tmp_path)
    assert not verify_bundle(bundle).ok
    (bundle / "README.md").unlink()
    (bundle / "README.md").mkdir()
    assert not verify_bundle(bundle).ok


@pytest.mark.parametrize("writable", [0o200, 0o020, 0o002, 0])
def test_hard_links_to_what_nobody_can_write(bundle: Path, tmp_path: Path, writable: int) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for index, file in enumerate(files_of(bundle)):
        os.link(file, store / str(index))
        file.chmod(0o444 | writable)
    assert verify_bundle(bundle).ok is not bool(writable)
