"""A bundle as one file is the same bundle again, and nothing else comes out of an archive."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import bundle_samples
import pytest
from typer.testing import CliRunner

from cosmos_export.bundle import verify_bundle
from cosmos_export.bundle.archive import pack, unpack
from cosmos_export.cli import app
from cosmos_export.diagnostics import CosmosExportError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundle_samples.write(tmp_path / "x")
    return tmp_path / "x"


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(code: str, call: Callable[[], object]) -> CosmosExportError:
    with pytest.raises(CosmosExportError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert caught.value.hint
    return caught.value


def test_there_and_back(bundle: Path, tmp_path: Path) -> None:
    size = pack(bundle, tmp_path / "a.tar")
    assert size == (tmp_path / "a.tar").stat().st_size
    unpack(tmp_path / "a.tar", tmp_path / "y")
    assert verify_bundle(tmp_path / "y").ok and contents(tmp_path / "y") == contents(bundle)
    pack(tmp_path / "y", tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames()[0] == "manifest.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", "x", "y"]


def test_what_is_not_verified_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    name = next(name for name, data in bundle_samples.FILES.items() if data)
    (bundle / name).write_bytes(b"x" * (bundle / name).stat().st_size)
    refused("CX711", lambda: pack(bundle, tmp_path / "a.tar"))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a", "a.tar.zst"])
def test_names(bundle: Path, tmp_path: Path, name: str) -> None:
    assert f"{name}.tar" in refused("CX735", lambda: pack(bundle, tmp_path / name)).hint


def test_nothing_is_replaced(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "a.tar")
    refused("CX735", lambda: pack(bundle, tmp_path / "a.tar"))
    refused("CX735", lambda: unpack(tmp_path / "a.tar", bundle))


def members(bundle: Path) -> dict[str, bytes]:
    found = contents(bundle)
    return {"manifest.json": found.pop("manifest.json"), **found}


def archive(path: Path, files: dict[str, bytes], **fields: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if fields:
            member = tarfile.TarInfo("extra")
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member)
    return path


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key: value for key, value in files.items() if key != name}


SOME = next(name for name, data in bundle_samples.FILES.items() if data)
DAMAGED: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "no-manifest": (lambda files: without(files, "manifest.json"), "not manifest.json"),
    "manifest-last": (
        lambda files: {**without(files, "manifest.json"), "manifest.json": files["manifest.json"]},
        "first file",
    ),
    "missing": (lambda files: without(files, SOME), "missing"),
    "extra": (lambda files: {**files, "evil.py": b"x"}, "not in its manifest"),
    "above": (lambda files: {**files, "../evil": b"x"}, "not in its manifest"),
    "absolute": (lambda files: {**files, "/tmp/evil": b"x"}, "not in its manifest"),
    "size": (lambda files: {**files, SOME: files[SOME] + b"x"}, "the manifest says"),
    "bytes": (lambda files: {**files, SOME: bytes(len(files[SOME]))}, "SHA-256"),
    "manifest": (lambda files: {**files, "manifest.json": b"{}"}, "its manifest"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_archive(bundle: Path, tmp_path: Path, name: str) -> None:
    change, said = DAMAGED[name]
    archive(tmp_path / "a.tar", change(members(bundle)))
    assert said in refused("CX737", lambda: unpack(tmp_path / "a.tar", tmp_path / "y")).message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "x"]


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, {"type": tarfile.LNKTYPE, "linkname": "manifest.json"},
        {"type": tarfile.DIRTYPE}, {"type": tarfile.FIFOTYPE}, {"type": tarfile.CHRTYPE},
    ],
)  # fmt: skip
def test_only_plain_files_come_out(bundle: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    archive(tmp_path / "a.tar", members(bundle), **fields)
    assert "no plain file" in refused("CX737", lambda: unpack(tmp_path / "a.tar", tmp_path / "y")).message


@pytest.mark.parametrize("end", [100, 600, 3000, -1600])
def test_a_truncated_archive(bundle: Path, tmp_path: Path, end: int) -> None:
    pack(bundle, tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "a.tar").write_bytes(data[:end] if end > 0 else data[: len(data) + end])
    refused("CX737", lambda: unpack(tmp_path / "a.tar", tmp_path / "y"))
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04" + bytes(40), "ZIP"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "HTML"),
        (b"", "an empty file"),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert said in refused("CX737", lambda: unpack(tmp_path / "a.tar", tmp_path / "y")).message


def test_the_verbs(bundle: Path, tmp_path: Path) -> None:
    run = CliRunner()
    packed = run.invoke(app, ["bundle", "pack", str(bundle), "-o", str(tmp_path / "a.tar"), "--json"])
    assert packed.exit_code == 0 and json.loads(packed.stdout)["archive"] == str(tmp_path / "a.tar")
    unpacked = run.invoke(app, ["bundle", "unpack", str(tmp_path / "a.tar"), "-o", str(tmp_path / "y"), "--json"])
    assert unpacked.exit_code == 0 and json.loads(unpacked.stdout)["files"] == len(bundle_samples.FILES)
