"""`--until PASS --dump DIR`: the program as text after each pass."""

from __future__ import annotations

import json
from pathlib import Path

import build_harness as harness
import pytest
from typer.testing import CliRunner

from cosmos_export.build.driver import build
from cosmos_export.build.options import BuildOptions
from cosmos_export.cli import app
from cosmos_export.passes.pipeline import pass_names

pytestmark = pytest.mark.xdist_group("builds")


@pytest.mark.usefixtures("captured_once")
def test_one_readable_file_a_pass(tmp_path: Path, omni: Path) -> None:
    folder = tmp_path / "a" / "dumps"
    arguments = ["build", omni, "--until", "split_towers", "--dump", folder, "--json"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    names = ["00-capture", "01-normalize", "02-resolve_packing", "03-shift_rope", "04-split_towers"]
    files = [folder / f"{name}.txt" for name in names]
    assert json.loads(result.stdout)["dumps"] == [str(f) for f in files]
    assert sorted(folder.iterdir()) == files
    assert result.stderr.splitlines()[-1] == "stopped after split_towers: 5 dumps, no bundle"
    assert harness.leftovers(tmp_path) == ["a"]
    texts = [f.read_text() for f in files]
    assert all(max(map(len, text.splitlines())) < 400 for text in texts)
    assert "generator" not in texts[0]
    assert "generator" in texts[-1]
    assert str(omni) not in "".join(texts)


@pytest.mark.usefixtures("captured_once")
def test_dumps_of_every_pass_and_twice_the_same(tmp_path: Path, omni: Path) -> None:
    for folder in ("a", "b"):
        result = build(BuildOptions(omni, until=pass_names()[-1], dump=tmp_path / folder))
        assert (result.manifest, result.engines, result.parity) == (None, [], [])
    first, second = ({p.name: p.read_text() for p in (tmp_path / f).iterdir()} for f in ("a", "b"))
    assert first == second
    assert [name[3:-4] for name in sorted(first)] == pass_names()


@pytest.mark.usefixtures("captured_once")
def test_a_dump_beside_a_bundle(tmp_path: Path, omni: Path) -> None:
    result = build(harness.transformer_only(omni, tmp_path / "x", dump=tmp_path / "dumps", parity="never"))
    assert result.manifest is not None
    assert len(result.dumps) == len(list((tmp_path / "dumps").iterdir())) == len(pass_names())


@pytest.mark.usefixtures("captured_once")
def test_until_without_dump(tmp_path: Path, omni: Path) -> None:
    result = build(BuildOptions(omni, until="capture"))
    assert (result.passes, result.dumps) == ([], [])
    assert result.program is not None
    assert list(result.program.graphs) == ["joint"]


def test_an_unknown_pass(tmp_path: Path, omni: Path) -> None:
    result = harness.cosmos_export("build", omni, "--until", "splt_towers", "--dump", tmp_path / "d")
    assert result.returncode == 2
    assert "error[CX222]: there is no pass `splt_towers`" in result.stderr
    assert f"hint: passes, in order: {', '.join(pass_names())}" in result.stderr
    assert harness.leftovers(tmp_path) == []


def test_until_with_parity_compares_what_there_is(omni: Path) -> None:
    result = build(BuildOptions(omni, until="normalize", parity="always"))
    assert [(one.stage, one.passed) for one in result.parity] == [("capture", True), ("normalize", True)]
