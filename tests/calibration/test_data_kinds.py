"""Files of data that were not downloaded, or are something else, are named where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import data_samples
import pytest

from cosmos_export.calibration.sources import read_source
from cosmos_export.calibration.table import read_scale_table
from cosmos_export.diagnostics import UserError
from cosmos_export.runtime import read_media

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4970000\n"
STAND_INS: dict[str, tuple[bytes, str, str]] = {
    "lfs": (POINTER, "a Git LFS pointer of a file of 5.0 MB", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html></html>", "an HTML page", "hf auth login"),
    "empty": (b"", "an empty file", "download"),
    "link": (b"../../blobs/0123abcd", "the text of a symbolic link", "cp -rL"),
    "xet": (b"# xet version 0\n", "a Xet pointer", "download"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), "compressed with gzip", "gunzip"),
}


def refused(code: str, call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("file", ["a.mp4", "a.png", "a.JPG", "a.webm"])
def test_pictures_and_clips(tmp_path: Path, name: str, file: str) -> None:
    data, what, hint = STAND_INS[name]
    (tmp_path / file).write_bytes(data)
    read = read_media.read_image if file.endswith(("png", "JPG")) else lambda path: read_media.read_clip(path, 5)
    error = refused("CX614", lambda: read(tmp_path / file))
    assert what in error.message and file in error.message and hint in error.hint


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"RIFF\x24\0\0\0WAVEfmt ", "a WAV file"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"%PDF-1.7", "a PDF"),
        (b"PAR1\0\0", "a Parquet file"),
        (b"\x93NUMPY\1\0", "a NumPy array"),
    ],
)
def test_other_files_as_pictures(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    assert what in refused("CX614", lambda: read_media.read_image(tmp_path / "a.png")).message


@pytest.mark.parametrize("name", [name for name in STAND_INS if name != "gzip"])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_tables_of_robot_data(tmp_path: Path, name: str, version: str) -> None:
    data, what, hint = STAND_INS[name]
    root = data_samples.write_lerobot(tmp_path / "robot", version)
    table = sorted((root / "data").rglob("*.parquet"))[0]
    table.write_bytes(data)
    error = refused("CX342", lambda: read_source(str(root)))
    assert what in error.message and table.name in error.message and hint in error.hint


@pytest.mark.parametrize("name", ["lfs", "html", "empty", "gzip"])
def test_info_of_robot_data(tmp_path: Path, name: str) -> None:
    data, what, _ = STAND_INS[name]
    root = data_samples.write_lerobot(tmp_path / "robot", "v2.1")
    (root / "meta/info.json").write_bytes(data)
    error = refused("CX101", lambda: read_source(str(root)))
    assert what in error.message and "info.json" in error.message


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("manifest.json", "a bundle"),
        ("transformer/config.json scheduler/x", "a checkpoint"),
        ("meta/info.json", "LeRobot"),
        ("adapter_config.json", "an adapter"),
        ("a.gguf", "GGUF"),
        ("", "an empty folder"),
    ],
)
def test_a_folder_that_is_no_scale_table(tmp_path: Path, name: str, what: str) -> None:
    for file in name.split():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    error = refused("CX310", lambda: read_scale_table(tmp_path))
    assert what in error.message and "cosmos-export calibrate" in error.hint
