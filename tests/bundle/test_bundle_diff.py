"""Two bundles differ in what their builds were told and in files, and in nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bundle_samples
import pytest
from typer.testing import CliRunner

from cosmos_export.bundle import FileRecord, Manifest
from cosmos_export.bundle.differences import FileChange, SettingChange, differences
from cosmos_export.cli import app

FILES = (FileRecord("onnx/a.weights", 10, "a" * 64, "onnx"), FileRecord("engines/a.plan", 5, "b" * 64, "engine"))


def manifest(**fields: object) -> Manifest:
    return replace(bundle_samples.manifest(), files=FILES, **fields)  # type: ignore[arg-type]


def test_the_same_is_the_same() -> None:
    found = differences(manifest(), manifest())
    assert found.none and (found.same_files, found.same_bytes) == (2, 15)


def changed(**options: object) -> Callable[[Manifest], Manifest]:
    return lambda m: replace(m, options={**m.options, **options})  # type: ignore[arg-type]


CHANGES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "recipe": (lambda m: replace(m, recipe="other"), "recipe"),
    "adapter": (changed(adapters=("style",)), "options.adapters"),
    "steps": (changed(**{"schedule.steps": 7}), "options.schedule.steps"),
    "tool": (lambda m: replace(m, tools={**m.tools, "torch": "9"}), "tools.torch"),
    "model": (lambda m: replace(m, model=replace(m.model, id="other/model")), "model.id"),
    "target": (lambda m: replace(m, target=replace(m.target, name="other")), "target.name"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_is_named(name: str) -> None:
    change, setting = CHANGES[name]
    first = manifest()
    (found,) = differences(first, change(first)).settings
    assert found.name == setting and found.first != found.second
    (back,) = differences(change(first), first).settings
    assert back == SettingChange(setting, found.second, found.first)


def test_a_profile_goes_by_its_name() -> None:
    first = manifest()
    other = replace(first.profiles[0], name="another")
    found = differences(first, replace(first, profiles=(*first.profiles, other)))
    assert [one.name for one in found.settings] == ["profiles.another"] and found.settings[0].first is None


def test_files_go_by_their_digest() -> None:
    first = manifest()
    edited = replace(first, files=(replace(FILES[0], sha256="c" * 64), FileRecord("b.json", 3, "d" * 64, "data")))
    found = differences(first, edited)
    assert found.files == (
        FileChange("b.json", "data", None, 3),
        FileChange("engines/a.plan", "engine", 5, None),
        FileChange("onnx/a.weights", "onnx", 10, 10),
    )
    assert found.same_files == 0 and not found.settings


def test_times_and_measurements_are_not_compared() -> None:
    first = manifest()
    later = replace(first, volatile=replace(first.volatile, created="2030-01-01T00:00:00Z"), evaluation=())
    assert differences(first, later).none


def test_the_verb(tmp_path: Path) -> None:
    bundle_samples.write(tmp_path / "a")
    bundle_samples.write(tmp_path / "b")
    same = CliRunner().invoke(app, ["bundle", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    assert same.exit_code == 0 and json.loads(same.stdout)["same"] is True
    path = tmp_path / "b/manifest.json"
    document = json.loads(path.read_bytes())
    document["recipe"] = "other"
    from cosmos_export.bundle.strict import seal

    path.write_bytes(seal(document))
    other = CliRunner().invoke(app, ["bundle", "diff", str(tmp_path / "a"), str(tmp_path / "b")])
    assert other.exit_code == 1 and "→ other" in other.stdout
