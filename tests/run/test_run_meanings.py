"""What a request means that does not say it exactly, and hints that go by meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import run_samples
from run_samples import MARK, ROBOT, SMALL, manifest

from cosmos_export.bundle import BundleFiles, DimRecord
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.embodiments import embodiment
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime import media
from cosmos_export.runtime.frontend import prepare
from cosmos_export.runtime.loading import _require_known
from cosmos_export.targets.profiles import parse_profile


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle directory with its tokenizer, a picture and a short clip."""
    root = run_samples.tokenizer(tmp_path_factory.mktemp("meanings"))
    media.write_png(root / "still.png", run_samples.picture(64, 96)[0], MARK)
    media.write_mp4(root / "short.mp4", [run_samples.picture(64, 96, 3)], 24.0, MARK)
    return root


def ask(files: Path, found: Any = None, **options: Any) -> Any:
    return prepare(GenerateOptions(prompt="A cube.", **options), BundleFiles(files, found or manifest()))


@pytest.mark.parametrize(("name", "said"), [("still.png", "is a still picture"), ("short.mp4", "has 3 frames")])
def test_a_clip_that_is_too_short_to_continue_is_said(files: Path, name: str, said: str) -> None:
    prepared = ask(files, video=files / name)
    assert prepared.request.mode == "v2v"
    assert any(said in note and "the last one is repeated" in note for note in prepared.notes)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("text2video", "t2v"), ("image2video", "i2v"), ("video2world", "v2v"), ("text2image", "t2i"), ("t2v", "t2v")],
)
def test_modes_have_the_names_of_the_framework_too(files: Path, name: str, mode: str) -> None:
    source = {"i2v": {"image": files / "still.png"}, "v2v": {"video": files / "short.mp4"}, "t2i": {"frames": 1}}
    assert ask(files, mode=name, **source.get(mode, {})).request.mode == mode


@pytest.mark.parametrize("name", ["caption", "reasoner", "vqa", "transfer", "T2V!"])
def test_other_modes_have_a_way_out(files: Path, name: str) -> None:
    with pytest.raises(CosmosExportError) as caught:
        ask(files, mode=name)
    assert caught.value.code == "CX604" and "is not a mode" in caught.value.message
    assert "leave --mode out" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("droid", "droid_lerobot"),
        ("franka", "robomind-franka"),
        ("bridge", "bridge_orig_lerobot"),
        ("UMI", "umi"),
        ("droid_lerobt", "droid_lerobot"),
    ],
)
def test_embodiments_go_by_their_parts(name: str, meant: str) -> None:
    with pytest.raises(CosmosExportError) as caught:
        embodiment(name, None)
    assert f"`{meant}`" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "meant"),
    [("1080p", "720p"), ("4k", "720p"), ("2160p-121f", "720p"), ("600p", "480p"), ("144p", "256p"), ("540p", "480p")],
)
def test_another_size_is_no_spelling_of_one(name: str, meant: str) -> None:
    with pytest.raises(CosmosExportError) as caught:
        parse_profile(name)
    assert f"is `{meant}`" in caught.value.hint and "did you mean" not in caught.value.hint


@pytest.mark.parametrize(
    ("backend", "device", "hint"),
    [
        ("torch", None, "bundle's own"),
        ("cuda", None, "bundle's own"),
        ("onnxruntime", "gpu", "--device"),
        ("onnxruntime", "cuda:x", "--device"),
        ("onnxruntime", "0", "--device"),
    ],
)
def test_backends_and_devices_have_a_way_out(backend: str, device: str | None, hint: str) -> None:
    with pytest.raises(CosmosExportError) as caught:
        _require_known(backend, device)
    assert caught.value.code == "CX504" and hint in caught.value.hint


def test_sound_is_generated_where_there_is_no_video_without(files: Path) -> None:
    prepared = ask(files, manifest({"sounding": {**SMALL, "sound_len": DimRecord(1, 10, 400)}, "robot": ROBOT}))
    assert prepared.request.sound and prepared.sound_len > 0
    assert any("sound is generated" in note for note in prepared.notes)
    assert not ask(files).request.sound
    quiet = manifest({"sounding": {**SMALL, "sound_len": DimRecord(1, 10, 400)}, "small": SMALL})
    assert not ask(files, quiet).request.sound
