"""A checkpoint that changes while it is read: no bundle, table or checkpoint is made of two of them, and none describes
a file that it was not made from. The reason is said, whatever the change broke first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_harness as harness
import numpy as np
import pytest

import cosmos_export.compiler.published as published
from cosmos_export.bundle import BundleWriter, verify_bundle
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler import stages
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.job import Job
from cosmos_export.diagnostics import UserError
from cosmos_export.options import BuildOptions
from cosmos_export.stamps import Inputs

pytestmark = pytest.mark.usefixtures("captured_once")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("changing") / "checkpoint", layers=1, dtype="bfloat16")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return harness.copy_checkpoint(original, tmp_path / "checkpoint")


def options(checkpoint: Path, output: Path, **changed: Any) -> BuildOptions:
    return BuildOptions(
        checkpoint, output, **{"components": ("none",), "modalities": ("vision",), "parity": "never", **changed}
    )


def rewritten(checkpoint: Path) -> None:
    """Other weights in the same file, of the same size, with the time of before."""
    path = checkpoint / WEIGHTS
    status, data = path.stat(), bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    words = len(data[start:]) // 4 * 4
    data[start : start + words] = np.frombuffer(data[start : start + words], np.uint32)[::-1].tobytes()  # all finite
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncated(checkpoint: Path) -> None:
    os.truncate(checkpoint / WEIGHTS, 10_000)


def emptied(checkpoint: Path) -> None:
    os.truncate(checkpoint / WEIGHTS, 0)


def replaced(checkpoint: Path) -> None:
    """As a download does it: another file under the name."""
    path = checkpoint / WEIGHTS
    shutil.copyfile(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def removed(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()


def edited(name: str, key: str, value: object) -> Change:
    def change(checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    change.__name__ = f"edited {name}"
    return change


def joined(checkpoint: Path) -> None:
    (checkpoint / "transformer/generation_config.json").write_text("{}")


CHANGES = [
    rewritten, truncated, emptied, replaced, removed, joined, edited(CONFIG, "rms_norm_eps", 0.5),
    edited(SCHEDULER, "flow_shift", 3.0), edited("model_index.json", "default_use_system_prompt", False),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_kind_of_change_is_said(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    """Nothing is kept any more, and nothing is put in place; another error is not the one that is shown."""

    def stages_of(job: Job, writer: BundleWriter, progress: object) -> Any:
        writer.path("onnx/a.weights", "weights").write_bytes(b"weights")
        writer.keep("onnx/a.weights", "key", "0" * 64)
        raise AssertionError("it was kept")

    monkeypatch.setattr(stages, "build_bundle", stages_of)
    with pytest.raises(UserError, match="the checkpoint changed during the build: ") as failed:
        build(options(checkpoint, tmp_path / "x"), begins=lambda plan: change(checkpoint))
    assert failed.value.code == "CX118" and str(checkpoint) in failed.value.message
    assert not list(tmp_path.glob(".x.*")) and not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", [rewritten, edited(CONFIG, "rms_norm_eps", 0.5)], ids=["weights", "config"])
def test_a_change_after_the_checkpoint_was_opened(checkpoint: Path, tmp_path: Path, change: Change) -> None:
    with pytest.raises(UserError, match="CX118"):
        build(options(checkpoint, tmp_path / "x"), begins=lambda plan: change(checkpoint))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("after", [1, 2])
def test_a_change_after_a_file_was_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """What was kept is of the checkpoint before; a resumed build takes nothing of it for the one after."""
    keep, kept = BundleWriter.keep, list[str]()

    def changing(self: BundleWriter, name: str, *rest: Any) -> None:
        keep(self, name, *rest)
        kept.append(name)
        if len(kept) == after:
            rewritten(checkpoint)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="CX118"):
        patched.setattr(BundleWriter, "keep", changing)
        build(options(checkpoint, tmp_path / "x"))
    assert len(kept) == after and not (tmp_path / "x").exists()
    build(options(checkpoint, tmp_path / "x", resume=True))
    assert contents(tmp_path / "x") == contents(of_the_new(checkpoint, tmp_path))


def of_the_new(checkpoint: Path, folder: Path) -> Path:
    build(options(checkpoint, folder / "whole"))
    return folder / "whole"


def contents(bundle: Path) -> dict[str, Any]:
    assert verify_bundle(bundle).ok
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    del manifest["volatile"], manifest["digest"]
    return manifest


def test_a_change_between_an_interruption_and_the_resumed_build(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = BundleWriter.keep

    def interrupted(self: BundleWriter, *rest: Any) -> None:
        keep(self, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BundleWriter, "keep", interrupted)
        build(options(checkpoint, tmp_path / "x"))
    rewritten(checkpoint)
    build(options(checkpoint, tmp_path / "x", resume=True))
    assert contents(tmp_path / "x") == contents(of_the_new(checkpoint, tmp_path))


@pytest.mark.parametrize("change", [rewritten, truncated], ids=["rewritten", "truncated"])
def test_a_difference_from_the_published_model_is_not_called_a_bug(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    capture = stages.capture

    def after_the_reference(*given: Any, **rest: Any) -> Any:
        change(checkpoint)
        return capture(*given, **rest)

    monkeypatch.setattr(stages, "capture", after_the_reference)
    with pytest.raises(UserError, match="CX118"):
        build(options(checkpoint, tmp_path / "x", parity="always"))


def test_the_reference_reads_a_file_that_is_truncated(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = published.Parity

    def truncating(*given: Any, **rest: Any) -> Any:
        emptied(checkpoint)
        return parity(*given, **rest)

    monkeypatch.setattr(published, "Parity", truncating)
    with pytest.raises(UserError, match="CX118"):
        build(options(checkpoint, tmp_path / "x", parity="always"))


def test_a_file_that_is_truncated_between_two_rows(original: Path, checkpoint: Path) -> None:
    """Reading never maps: a mapped file that is truncated ends the process with SIGBUS."""
    opened = open_checkpoint(checkpoint)
    entry = max(opened.tensors.values(), key=lambda one: one.offset)
    assert entry.raw().any()
    truncated(checkpoint)
    with pytest.raises(UserError, match=r"CX119: .* was truncated while it was read: .* 10,000"):
        entry.raw()


def test_files_that_do_not_change_are_not_blamed(checkpoint: Path, tmp_path: Path) -> None:
    """Reading, links and files beside the components are no change; nor is another error another one."""
    opened = open_checkpoint(checkpoint)
    (checkpoint / "notes.txt").write_text("mine")
    (checkpoint / WEIGHTS).read_bytes()
    opened.inputs.require_unchanged("the test")
    one = Inputs("the file", (checkpoint / "notes.txt", checkpoint / "absent"))
    assert list(one.stamps) == [checkpoint / "notes.txt"]
