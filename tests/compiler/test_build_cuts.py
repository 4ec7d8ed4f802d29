"""What a memory budget refuses before any work; what it cuts is run in `tests/run`."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
from typer.testing import CliRunner

from cosmos_export.cli import verbs
from cosmos_export.cli.build import _resume_command
from cosmos_export.compiler.builders import Builders
from cosmos_export.compiler.options import resolve
from cosmos_export.diagnostics import CosmosExportError, ToolError
from cosmos_export.plan.sizes import BUILDER_BYTES, builder_bytes, compiler_bytes
from cosmos_export.progress import Progress, Silent

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    return harness.checkpoint(shared, "omni", "bfloat16")


def refused(checkpoint: Path, output: Path, **options: Any) -> tuple[str, int, str, str]:
    given = {"target": "rtx-pro-6000", "modalities": ("vision",), **options}
    with pytest.raises(CosmosExportError) as caught:
        resolve(harness.transformer_only(checkpoint, output / "bundle", **given))
    assert harness.leftovers(output) == []
    return caught.value.code, caught.value.exit_code, caught.value.message, caught.value.hint


@pytest.mark.parametrize("size", ["16", "16 gigabytes", "-1GiB", "0GiB", "GiB", "1e3MB", "nanGiB"])
def test_a_budget_that_is_not_a_size(checkpoint: Path, tmp_path: Path, size: str) -> None:
    code, status, message, hint = refused(checkpoint, tmp_path, memory_budget=size)
    assert (code, status) == ("CX456", 2)
    assert f"memory budget `{size}` is not a size" in message and "16GiB" in hint


@pytest.mark.parametrize(
    ("options", "why"),
    [({"target": "cpu"}, "for target `cpu` with onnxruntime none are built here"),
     ({"target": "h100", "backend": "tensorrt"}, "for target `h100` with tensorrt none are built here")],
)  # fmt: skip
def test_a_budget_that_bounds_nothing(checkpoint: Path, tmp_path: Path, options: dict[str, Any], why: str) -> None:
    code, status, message, _ = refused(checkpoint, tmp_path, memory_budget="16GiB", **options)
    assert (code, status) == ("CX456", 2) and why in message


def test_an_engine_that_cannot_be_cut_small_enough(checkpoint: Path, tmp_path: Path) -> None:
    code, status, message, hint = refused(checkpoint, tmp_path, memory_budget="500MB")
    assert (code, status) == ("CX457", 3)
    assert "building the engine of reasoner takes 0.7 GiB of memory, and the budget is 0.5 GiB" in message
    assert "`--memory-budget 1GiB`" in hint


def test_a_loop_on_the_device_is_not_cut(checkpoint: Path, tmp_path: Path) -> None:
    budget = f"{(compiler_bytes(3) + BUILDER_BYTES) / 1e6 + 0.15}MB"
    code, status, message, hint = refused(checkpoint, tmp_path, memory_budget=budget, loop="device")
    assert (code, status) == ("CX457", 3)
    assert "a loop on the device is one engine" in message and "`--loop host` cuts it" in hint
    host = resolve(harness.transformer_only(
        checkpoint, tmp_path / "bundle", target="rtx-pro-6000", modalities=("vision",), memory_budget=budget
    ))  # fmt: skip
    assert host.plan.engines["generator"].cut
    parts = host.plan.engines.values()
    assert all(compiler_bytes(3) + builder_bytes(part) <= (host.memory_budget or 0) for part in parts)


def test_a_plan_says_what_a_build_refuses() -> None:
    from cosmos_export.cli.plan import register

    app = verbs.Verbs()
    app.callback()(lambda: None)
    register(app)
    for options, said in (
        (["--memory-budget", "1GiB"], "building the engine of"),
        (["--memory-budget", "12GiB", "--loop", "device"], "a loop on the device is one engine"),
    ):
        command = ["plan", "--like", "nano", "--target", "rtx-pro-6000", *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 3 and "error[CX457]" in result.stderr and said in result.stderr


def test_the_command_to_resume_names_the_budget_that_was_found(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["cosmos-export", "build", "x"])
    asked = {"target": "rtx-pro-6000", "modalities": ("vision",)}
    options = harness.transformer_only(checkpoint, tmp_path / "bundle", **asked)
    job = resolve(options)
    command = _resume_command(options, job.memory_budget).split()
    assert command[:4] == ["cosmos-export", "build", "x", "--resume"]
    again = replace(options, memory_budget=command[-1])
    assert command[4] == "--memory-budget" and resolve(again).memory_budget == job.memory_budget
    assert "--memory-budget" not in _resume_command(again, job.memory_budget)
    on_cpu = replace(options, target="cpu")
    assert "--memory-budget" not in _resume_command(on_cpu, resolve(on_cpu).memory_budget)


def test_what_is_held_is_not_given_to_builders() -> None:
    started = list[str]()
    with Builders(100, Silent()) as builders:
        builders.hold(30)
        small = builders.submit(lambda _: started.append("small"), 70)
        large = builders.submit(lambda _: started.append("large"), 71)
        small.result(timeout=10)
        with pytest.raises(TimeoutError):
            large.result(timeout=0.2)
        builders.hold(0)
        large.result(timeout=10)
    assert started == ["small", "large"]


def test_a_failure_does_not_wait_for_what_still_runs() -> None:
    ended = threading.Event()

    def fails(progress: Progress) -> None:
        raise ToolError("CX440", "no space")

    with pytest.raises(ToolError, match="no space"), Builders(None, Silent()) as builders:
        builders.submit(lambda _: ended.wait(30), 1)
        first = builders.submit(fails, 1)
        with pytest.raises(ToolError):
            first.result(timeout=10)
        with pytest.raises(ToolError):
            builders.require_none_failed()
        try:
            builders.wait()
        finally:
            waited = not ended.is_set()
            ended.set()
    assert waited
