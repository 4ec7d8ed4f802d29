"""One task over all stages: it only grows, ends whole, and expects of a build what the plan does."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler.cache import default_graphs_folder
from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.overall import TASK, UNITS, Overall
from cosmos_export.options import BuildOptions


class Recorder:
    """Keeps what it is told of the whole task."""

    def __init__(self) -> None:
        self.shown: list[int] = []
        self.tasks: list[str] = []

    def begin(self, task: str, total: int | None = None) -> None:
        self.tasks.append(task)

    def update(self, task: str, completed: int) -> None:
        if task == TASK:
            self.shown.append(completed)

    def end(self, task: str) -> None: ...


def test_it_grows_with_the_seconds_that_are_expected() -> None:
    recorder = Recorder()
    with Overall(recorder, {"a": 1.0, "b": 3.0}) as overall:
        overall.begin("a", 10)
        overall.update("a", 5)
        overall.end("a")
        overall.begin("not expected", 10)
        overall.update("not expected", 10)
        overall.end("not expected")
        overall.begin("b")
        overall.update("b", 100)
        overall.end("b")
    assert recorder.shown == [0, 125, 250, 250, UNITS]
    assert recorder.tasks == [TASK, "a", "not expected", "b"]


def test_what_is_skipped_counts_as_done() -> None:
    recorder = Recorder()
    with Overall(recorder, {"a": 1.0, "b": 3.0}) as overall:
        overall.begin("b", 10)
        overall.update("b", 5)
        overall.begin("a", 10)
    assert recorder.shown == [250, 625, 625]


def test_without_expectations_nothing_is_shown() -> None:
    recorder = Recorder()
    with Overall(recorder, {}) as overall:
        overall.begin("a", 1)
        overall.end("a")
    assert recorder.shown == []


@pytest.mark.parametrize("loop", ["host", "device"])
def test_every_long_task_of_a_build_is_expected(loop: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from cosmos_export.compiler.driver import build

    checkpoint = write_demo_checkpoint(tmp_path / "checkpoint", layers=1, dtype="bfloat16")
    options = BuildOptions(
        checkpoint, tmp_path / "bundle", target="rtx-pro-6000", parity="never", loop=loop,  # type: ignore[arg-type]
        graphs=default_graphs_folder(),
    )  # fmt: skip
    expected = resolve(options).plan.seconds
    recorder = Recorder()
    build(options, recorder)
    told = set(recorder.tasks)
    beside = {task for task in told if task.startswith(("build vae_", "build sound_"))}
    short = {TASK, "time table", "quantization", "cuts", "gates", "hash", "models of engines", "requests"}
    assert beside and told - set(expected) - beside <= short
    assert set(expected) <= told
    assert recorder.shown == sorted(recorder.shown)
    assert recorder.shown[-1] >= 0.99 * UNITS
