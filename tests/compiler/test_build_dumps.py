"""`--until PASS --dump DIR`: the program as text after each pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
from typer.testing import CliRunner

from cosmos_export.cli import app
from cosmos_export.cli.build import _print, _verdict
from cosmos_export.compiler.driver import build
from cosmos_export.diagnostics import UserError
from cosmos_export.options import BuildOptions
from cosmos_export.passes.pipeline import CAPTURE, ORDER, default_passes

NAMES = [CAPTURE, *(one.name for one in default_passes())]
"""Stages of a build that quantizes nothing and leaves the loop to the host."""

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
        result = build(BuildOptions(omni, until=NAMES[-1], dump=tmp_path / folder))
        assert (result.manifest, result.engines, result.parity) == (None, (), ())
    first, second = ({p.name: p.read_text() for p in (tmp_path / f).iterdir()} for f in ("a", "b"))
    assert first == second
    assert [name[3:-4] for name in sorted(first)] == NAMES


@pytest.mark.usefixtures("captured_once")
def test_a_dump_beside_a_bundle(tmp_path: Path, omni: Path) -> None:
    result = build(harness.transformer_only(omni, tmp_path / "x", dump=tmp_path / "dumps", parity="never"))
    assert result.manifest is not None
    assert len(result.dumps) == len(list((tmp_path / "dumps").iterdir())) == len(NAMES)


@pytest.mark.usefixtures("captured_once")
def test_until_without_dump(omni: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = build(BuildOptions(omni, until="capture"))
    assert (result.passes, result.dumps) == ((), ())
    assert result.program is not None
    assert list(result.program.graphs) == ["joint"]
    _print(result)  # without a table of passes, of which none ran
    assert "Passes" not in capsys.readouterr().out


def test_an_unknown_pass(tmp_path: Path, omni: Path) -> None:
    result = harness.cosmos_export("build", omni, "--until", "splt_towers", "--dump", tmp_path / "d")
    assert result.returncode == 2
    assert "error[CX222]: there is no pass `splt_towers`" in result.stderr
    assert f"hint: passes, in order: {', '.join(ORDER)}" in result.stderr
    assert harness.leftovers(tmp_path) == []


def test_until_with_parity_compares_what_there_is(omni: Path) -> None:
    result = build(BuildOptions(omni, until="normalize", parity="always"))
    assert [(one.stage, one.passed) for one in result.parity] == [("capture", True), ("normalize", True)]


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    ("until", "loop", "last"),
    [
        ("assign_precision", "host", ["09-assign_precision"]),
        ("insert_quantization", "host", ["10-insert_quantization-generator", "11-insert_quantization-generator_2"]),
        (
            "quantize_prefix",
            "device",
            ["10-insert_quantization-generator", "11-quantize_prefix-generator", "12-batch_guidance-denoise_1"],
        ),
        ("fuse_denoise_loop", "device", ["10-batch_guidance-denoise_1", "11-fuse_denoise_loop-denoise_1"]),
    ],
)
def test_every_pass_of_a_quantized_build_can_be_the_last(
    tmp_path: Path, omni: Path, scales: Path, until: str, loop: Any, last: list[str]
) -> None:
    options = BuildOptions(omni, until=until, dump=tmp_path / "d", recipe="fp8", calibration=scales, loop=loop)
    result = build(options)
    names = [path.stem for path in result.dumps]
    assert names[: len(NAMES)] == [f"{i:02d}-{name}" for i, name in enumerate(NAMES)]
    assert names[9 : 9 + len(last) + 1][-len(last) :] == last
    assert all(ORDER.index(report.name) <= ORDER.index(until) for report in result.passes)
    assert result.passes[-1].name == until
    assert _verdict(result, None) == f"stopped after {until}: {len(names)} dumps, no bundle"
    texts = [path.read_text().partition("\n")[2] for path in result.dumps]
    trunk = [report for report in result.passes if not report.form]
    for before, after, report in zip(texts, texts[1:], trunk, strict=False):
        assert (before != after) == report.result.modified, report.name


@pytest.mark.usefixtures("captured_once")
def test_forms_that_compute_differently_print_differently(tmp_path: Path, omni: Path, scales: Path) -> None:
    build(BuildOptions(omni, until="insert_quantization", dump=tmp_path, recipe="fp8", calibration=scales))
    usual, ends = (
        (tmp_path / f"{name}.txt").read_text()
        for name in ("10-insert_quantization-generator", "11-insert_quantization-generator_2")
    )
    assert usual.count("cosmos_export.quantize(") > ends.count("cosmos_export.quantize(")
    assert "fp8-w8a16 x3, fp8 x29, fp8-w8a16 x3" in usual


@pytest.mark.parametrize("until", ["insert_quantization", "batch_guidance", "cut_graph"])
def test_a_pass_that_this_build_does_not_run(omni: Path, until: str) -> None:
    with pytest.raises(UserError, match=f"CX222: this build does not run `{until}`"):
        build(BuildOptions(omni, until=until))
