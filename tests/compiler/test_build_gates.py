"""Builds that go wrong half way: the code says what, and under the final name is what was there before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest

import cosmos_export.compiler.graphs as graphs
import cosmos_export.compiler.published as published
from cosmos_export.bundle import verify_bundle
from cosmos_export.compiler.driver import build
from cosmos_export.diagnostics import FindingError, ToolError
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.parity import Parity
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.passes.base import Pass, PassResult
from cosmos_export.targets.trt import common as trt_common
from cosmos_export.targets.trt import engine_inspector
from cosmos_export.targets.trt.engine_inspector import EngineSummary, inspect_engine

pytestmark = pytest.mark.xdist_group("builds")


@pytest.fixture(autouse=True)
def _quick(captured_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases of seven are enough to see that something is wrong."""
    monkeypatch.setattr(published, "Parity", partial(Parity, cases=CASES[3:5]))


# ---------------------------------------------------------------------------------------------------------------------
# The engines are not what was planned


def test_attention_that_is_not_fused(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfused(path: Path) -> EngineSummary:
        found = inspect_engine(path)
        return replace(found, graphs=tuple(replace(g, attention=g.attention[1:]) for g in found.graphs))

    monkeypatch.setattr(engine_inspector, "inspect_engine", unfused)
    with pytest.raises(FindingError) as caught:
        build(harness.transformer_only(omni, tmp_path / "x", target="rtx-pro-6000", parity="never"))
    assert (caught.value.code, caught.value.exit_code) == ("CX450", 1)
    assert "reasoner: profile 0: 1 fused attention kernels, expected 2" in caught.value.message
    assert "generator: profile 0: 2 fused attention kernels, expected 3" in caught.value.message
    assert "nothing was written" in caught.value.hint
    assert harness.leftovers(tmp_path) == []


def test_an_engine_for_another_gpu(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(path: Path) -> EngineSummary:
        found = inspect_engine(path)
        return replace(found, header=replace(found.header, compute_capabilities=("8.9", "12.0")))

    monkeypatch.setattr(engine_inspector, "inspect_engine", other)
    with pytest.raises(FindingError, match=r"conditioning: 8\.9, 12\.0"):
        build(harness.transformer_only(omni, tmp_path / "x", target="rtx-pro-6000", parity="never"))
    assert harness.leftovers(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# The results are not what the published implementation computes


class Perturb(Pass):
    """Makes one velocity wrong by ``factor``."""

    name = "perturb"

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def run(self, program: Program) -> PassResult:
        graph = program.graphs[program.loop.body]
        outputs = graph.outputs
        name = next(iter(outputs))
        wrong = graph.call(aten.mul.Tensor, outputs[name], self._factor)
        graph.set_outputs({**outputs, name: wrong})
        return PassResult()


@pytest.mark.parametrize("factor", [1.0001, 0.0, float("nan")])
def test_a_pass_that_changes_the_results(
    tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    passes = graphs.passes_of
    monkeypatch.setattr(graphs, "passes_of", lambda *asked: [*passes(*asked), Perturb(factor)])
    with pytest.raises(FindingError) as caught:
        build(harness.transformer_only(omni, tmp_path / "x"))
    assert (caught.value.code, caught.value.exit_code) == ("CX601", 1)
    assert "perturb: " in caught.value.message
    assert "fuse_joint_attention" not in caught.value.message  # the stage before was right
    assert "ONNX Runtime" in caught.value.message or factor == 1.0001
    assert harness.leftovers(tmp_path) == []


def test_an_older_bundle_outlives_a_build_that_fails(
    tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "x"
    build(harness.transformer_only(omni, output, parity="never", steps=2))
    before = (output / "manifest.json").read_bytes()
    passes = graphs.passes_of
    monkeypatch.setattr(graphs, "passes_of", lambda *asked: [*passes(*asked), Perturb(2.0)])
    with pytest.raises(FindingError):
        build(harness.transformer_only(omni, output, force=True))
    assert (output / "manifest.json").read_bytes() == before
    assert verify_bundle(output).ok
    assert harness.leftovers(tmp_path) == ["x"]
    monkeypatch.setattr(graphs, "passes_of", passes)
    build(harness.transformer_only(omni, output, parity="never", steps=3, force=True))
    assert (output / "manifest.json").read_bytes() != before
    assert verify_bundle(output).ok
    assert harness.leftovers(tmp_path) == ["x"]


# ---------------------------------------------------------------------------------------------------------------------
# Tools and machines


def test_a_builder_that_is_killed(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does when memory runs out: kill -9 while it works on the second engine."""
    output = tmp_path / "x"
    build(harness.transformer_only(omni, output, parity="never", steps=2))
    before = (output / "manifest.json").read_bytes()
    started: list[Any] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, **options)
        started.append(process)
        if len(started) == 2:
            os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(trt_common.subprocess, "Popen", start)
    with pytest.raises(ToolError) as caught:
        build(harness.transformer_only(omni, output, target="rtx-pro-6000", parity="never", force=True))
    assert (caught.value.code, caught.value.exit_code) == ("CX422", 4)
    assert "was ended by signal 9 (SIGKILL)" in caught.value.message
    assert "memory" in caught.value.hint
    assert (output / "manifest.json").read_bytes() == before
    assert verify_bundle(output).ok
    build(harness.transformer_only(omni, output, target="rtx-pro-6000", parity="never", force=True, resume=True))
    assert harness.leftovers(tmp_path) == ["x"]


def test_a_disk_that_fills_up(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from cosmos_export.targets.onnx import weights

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "_write", full)
    with pytest.raises(ToolError) as caught:
        build(harness.transformer_only(omni, tmp_path / "x", parity="never"))
    assert (caught.value.code, caught.value.exit_code) == ("CX440", 4)
    assert "No space left on device" in caught.value.message
    assert harness.leftovers(tmp_path) == []


@pytest.fixture
def running(tmp_path: Path, omni: Path) -> Iterator[subprocess.Popen[str]]:
    """A build in a process group of its own, as a shell starts it, when its capture has begun."""
    command = [sys.executable, "-c", _ANNOUNCED, "build", str(omni), "-o", str(tmp_path / "x")]
    process = subprocess.Popen(
        command, env=harness.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=harness.ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "capture\n"
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


_ANNOUNCED = """
import cosmos_export.compiler.stages as stages
capture = stages.capture
def announced(*arguments, **options):
    print("capture", flush=True)
    return capture(*arguments, **options)
stages.capture = announced
from cosmos_export.cli import main
main()
"""


def test_an_interrupt(tmp_path: Path, omni: Path, running: subprocess.Popen[str]) -> None:
    time.sleep(1.0)
    assert any(name.startswith(".x.partial-") for name in harness.leftovers(tmp_path))
    os.killpg(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "error[CX002]: interrupted" in err
    assert "Traceback" not in err
    # Only what is finished is left, for `--resume`.
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x.partial-")
    assert "continue with" in err and f"-o {tmp_path / 'x'} --resume" in err
    build(harness.transformer_only(omni, tmp_path / "x", parity="never"))
    assert harness.leftovers(tmp_path) == ["x"]


def test_a_killed_build_leaves_nothing_that_a_later_one_does_not_remove(
    tmp_path: Path, omni: Path, running: subprocess.Popen[str]
) -> None:
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert not (tmp_path / "x").exists()
    assert harness.leftovers(tmp_path) != []
    build(harness.transformer_only(omni, tmp_path / "x", parity="never"))
    assert harness.leftovers(tmp_path) == ["x"]
