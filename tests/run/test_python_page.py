"""The blocks of docs/python.md run, in order, on a tiny checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from subjects import Subjects

import cosmos_export as cx
from cosmos_export.bundle import read_bundle
from cosmos_export.checkpoint import open_checkpoint

pytestmark = pytest.mark.xdist_group("run-parity")
PAGE = Path(__file__).resolve().parents[2] / "docs/python.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page(
    subjects: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = subjects.checkpoint("omni")
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace('"nano"', repr(str(checkpoint))), str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert "rtx-pro-6000 t2v-480p-189f fits" in out
    assert "Step(number=2, of=2, timestep=" in out
    assert "CX4" in out
    assert Path("towel.mp4").stat().st_size > 1000
    assert isinstance(names["last"], np.ndarray)

    # Objects that a notebook shows are one line.
    for shown in (
        read_bundle(Path("nano.bundle")),
        open_checkpoint(checkpoint),
        *map(names.get, ("compiled", "moved")),
    ):
        assert len(repr(shown)) < 200

    model = cx.open("nano.bundle")
    made = model.generate("It turns.", num_inference_steps=1)
    model.close()
    assert made.sound is None and made.actions is None
    for call in (lambda: made.frames, lambda: model.generate("x"), lambda: made.save("late.mp4")):
        with pytest.raises(cx.CosmosExportError, match="CX618"):
            call()

    def stop(step: object) -> None:
        raise KeyboardInterrupt

    with cx.open("nano.bundle") as model:
        with pytest.raises(KeyboardInterrupt):
            model.generate("x", on_step=stop)
        with pytest.raises(cx.CosmosExportError, match="CX005"):
            model.generate("x", num_frames=5, frames=9)
        with pytest.raises(cx.CosmosExportError, match="CX616"):
            model.generate("x", negative_prompt="y", guidance_scale=1)
