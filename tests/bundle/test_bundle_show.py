"""`bundle show`: what the manifest says, in the terms of whoever runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bundle_samples
import pytest
from typer.testing import CliRunner

from cosmos_export.bundle import DimRecord, ProfileRecord, read_manifest
from cosmos_export.cli import verbs
from cosmos_export.cli.bundle import register
from cosmos_export.diagnostics import FindingError, UserError


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    dims = {"und_len": (1, 512, 4096), "frames": (1, 31, 31), "height": (30, 30, 30), "width": (52, 52, 52)}
    dims |= {"sound_len": (0, 0, 0), "action_len": (0, 0, 0)}
    own = ProfileRecord("480p", {name: DimRecord(*span) for name, span in dims.items()})
    options = {"mode": "t2v", "modalities": ("vision", "sound"), "schedule.steps": 35, "schedule.guidance": 6.0}
    plain = bundle_samples.manifest
    changed = replace(plain(), profiles=(own,), options=options)
    monkeypatch.setattr(bundle_samples, "manifest", lambda **_: changed)
    bundle_samples.write(tmp_path / "x")
    return tmp_path / "x"


def shown(*arguments: object) -> str:
    app = verbs.Verbs()
    app.callback()(lambda: None)
    register(app)
    result = CliRunner().invoke(app, ["bundle", "show", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_what_a_bundle_takes(bundle: Path) -> None:
    (bundle / "engines/generator.plan").unlink()  # the manifest alone is read
    text = shown(bundle)
    for said in (
        "rtx-pro-6000, tensorrt-rtx, 12.0", "vision, sound", "t2v, 35 steps, guidance 6.0, loop on the host",
        "480p: frames 1 to 121, height 480, 1 to 4096 prompt tokens, width 832", "generator: 16.6 KiB",
        "velocity: pass (split_towers)",
    ):  # fmt: skip
        assert said in text, text
    assert json.loads(shown(bundle, "--json"))["recipe"] == "bf16"


def test_what_is_none_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CX700"):
        read_manifest(tmp_path)
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(FindingError, match="CX711"):
        read_manifest(bundle)
