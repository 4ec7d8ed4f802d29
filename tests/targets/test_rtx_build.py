"""Building engines: what comes out, and what is left when something goes wrong."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from target_graphs import FP32, Graph, generator, generator_profile

from cosmos_export.diagnostics import CosmosExportError, ToolError, UnsupportedError, UserError
from cosmos_export.progress import Silent
from cosmos_export.targets import load_target
from cosmos_export.targets.trt.common import PROGRESS_STEPS, run_build
from cosmos_export.targets.trt.engine_inspector import read_header
from cosmos_export.targets.trt.tensorrt_rtx import FLAVOR, build_engine

pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")

RTX = load_target("rtx-pro-6000")


def save(model: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model, path, save_as_external_data=external, location="weights.bin" if external else None, size_threshold=0
    )
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save(generator(), tmp_path / "graph.onnx")


@pytest.fixture
def big_graph(tmp_path: Path) -> Path:
    """Seconds of work, so that there is time to interrupt it."""
    return save(generator(16), tmp_path / "graph.onnx")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Path]:
    """Where the engine goes. An older file lies there, and must still do after any failure."""
    path = tmp_path / "out" / "graph.engine"
    path.parent.mkdir()
    path.write_bytes(b"older")
    yield path
    assert [other.name for other in path.parent.iterdir()] == [path.name], "partial files are left"


class Recorder:
    def __init__(self, at: int = -1, action: Callable[[], None] = lambda: None) -> None:
        self.events: list[tuple[str, str, int | None]] = []
        self.at, self.action = at, action

    def begin(self, task: str, total: int | None = None) -> None:
        self.events.append(("begin", task, total))

    def update(self, task: str, completed: int) -> None:
        self.events.append(("update", task, completed))
        if 0 <= self.at <= completed:
            self.at = -1
            self.action()

    def end(self, task: str) -> None:
        self.events.append(("end", task, None))


def workers() -> list[int]:
    """Build processes of this one that live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == os.getpid() and b"targets.trt.worker" in command:
                found.append(int(entry.name))
    return found


def test_report(graph: Path, engine: Path) -> None:
    recorder = Recorder()
    report = build_engine(graph, engine, target=RTX, profiles=[generator_profile()], progress=recorder)
    header = read_header(engine)
    assert report.path == engine and report.size_bytes == engine.stat().st_size == header.size_bytes
    assert header.compute_capabilities == (report.compute_capability,) == ("12.0",)
    assert ".".join(map(str, header.version)) == report.builder_version
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in report.inputs] == [
        ("x", "bf16", (1, -1, 64)),
        ("uk0", "bf16", (1, -1, 64)),
        ("uv0", "bf16", (1, -1, 64)),
    ]
    assert [tensor.name for tensor in report.outputs] == ["y"]
    assert report.attention == report.profiles == 1
    assert report.build_s > 0 and report.peak_memory_bytes > 50e6 and report.warnings == ()
    assert report.peak_anonymous_bytes is None or 0 < report.peak_anonymous_bytes <= report.peak_memory_bytes
    task = "build graph.engine"
    assert recorder.events[0] == ("begin", task, PROGRESS_STEPS) and recorder.events[-1] == ("end", task, None)
    steps = [step for kind, _, step in recorder.events if kind == "update"]
    assert steps == sorted(steps) and len(set(steps)) > 20 and steps[-1] == PROGRESS_STEPS


def test_builds_are_byte_identical(tmp_path: Path) -> None:
    """No path, time or process number gets into the engine, nor does the file the weights come from."""
    hashes = set()
    for number, external in enumerate((False, True)):
        onnx_path = save(generator(2), tmp_path / f"directory{number}" / f"graph{number}.onnx", external=external)
        report = build_engine(
            onnx_path, tmp_path / f"{number}.engine", target=RTX, profiles=[generator_profile(2)], progress=Silent()
        )
        hashes.add((report.sha256, (tmp_path / f"{number}.engine").read_bytes()))
        time.sleep(1.1 * (1 - number))
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["rtx-pro-6000", "dgx-spark", "l40s"])
def test_one_engine_a_capability(graph: Path, engine: Path, name: str) -> None:
    target = load_target(name)
    build_engine(graph, engine, target=target, profiles=[generator_profile()])
    assert read_header(engine).compute_capabilities == (target.compute_capability,)


@pytest.mark.parametrize("name", ["h200", "cpu"])
def test_targets_of_other_backends(graph: Path, engine: Path, name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        build_engine(graph, engine, target=load_target(name), profiles=[generator_profile()])
    assert caught.value.code == "CX405"


def test_missing_builder_module(graph: Path, engine: Path) -> None:
    flavor = replace(FLAVOR, module="no_such_builder")
    with pytest.raises(UnsupportedError) as caught:
        run_build(flavor, graph, engine, target=RTX, profiles=[generator_profile()])
    assert caught.value.code == "CX404" and 'pip install ".[rtx]" in the checkout' in caught.value.hint


def failing(onnx_path: Path, engine: Path, **options: object) -> CosmosExportError:
    with pytest.raises(CosmosExportError) as caught:
        build_engine(onnx_path, engine, target=RTX, **{"profiles": [generator_profile()], **options})  # type: ignore[arg-type]
    assert engine.read_bytes() == b"older"
    assert not workers()
    return caught.value


def test_killed_worker(big_graph: Path, engine: Path) -> None:
    def kill() -> None:
        (pid,) = workers()
        os.kill(pid, signal.SIGKILL)

    error = failing(big_graph, engine, profiles=[generator_profile(16)], progress=Recorder(20, kill))
    assert isinstance(error, ToolError) and error.code == "CX422"
    assert "signal 9 (SIGKILL)" in error.message and "memory" in error.hint


def test_crashed_worker_names_its_signal(big_graph: Path, engine: Path) -> None:
    def crash() -> None:
        (pid,) = workers()
        os.kill(pid, signal.SIGSEGV)

    error = failing(big_graph, engine, profiles=[generator_profile(16)], progress=Recorder(20, crash))
    assert error.code == "CX422" and "SIGSEGV" in error.message and "fewer layers" in error.hint


def test_interrupt_ends_the_worker(big_graph: Path, engine: Path) -> None:
    recorder = Recorder(20, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        build_engine(big_graph, engine, target=RTX, profiles=[generator_profile(16)], progress=recorder)
    assert engine.read_bytes() == b"older"
    assert not workers()
    assert recorder.events[-1][0] == "end"


def test_the_worker_does_not_outlive_its_parent(big_graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "orphaned"
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from target_graphs import generator_profile
from cosmos_export.targets import load_target
from cosmos_export.targets.trt.tensorrt_rtx import build_engine
import os, signal

class Kill:
    def begin(self, *_): pass
    def end(self, *_): pass
    def update(self, task, done):
        if done > 10:
            os.kill(os.getpid(), signal.SIGKILL)

build_engine(Path({str(big_graph)!r}), Path({str(out)!r}) / "e", target=load_target("rtx-pro-6000"),
             profiles=[generator_profile(16)], progress=Kill())
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while _workers_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _workers_in(tmp_path)
    assert not (out / "e").exists()  # what it was writing stays under a name of its own


def _workers_in(folder: Path) -> list[str]:
    """Processes that work in ``folder``; a builder works where its model is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append(process.name)
    return found


def test_time_limit(big_graph: Path, engine: Path) -> None:
    error = failing(big_graph, engine, profiles=[generator_profile(16)], timeout_s=0.2)
    assert error.code == "CX423" and "0.2 s" in error.message


def test_disk_full(graph: Path, engine: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        error = failing(graph, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.code == "CX424" and "disk" in error.hint


def test_no_graph_file(tmp_path: Path, engine: Path) -> None:
    error = failing(tmp_path / "absent.onnx", engine)
    assert isinstance(error, UserError) and "absent.onnx" in error.message


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty"])
def test_corrupted_graph(graph: Path, engine: Path, damage: str) -> None:
    data = graph.read_bytes()
    damaged = {"truncated": data[: len(data) // 2], "noise": bytes(range(1, 256)) * 8, "empty": b""}[damage]
    graph.write_bytes(damaged)
    error = failing(graph, engine)
    assert error.code == "CX420" and "graph.onnx" in error.message


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_external_weights(tmp_path: Path, engine: Path, damage: str) -> None:
    graph = save(generator(), tmp_path / "graph.onnx", external=True)
    weights = tmp_path / "weights.bin"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    error = failing(graph, engine)
    assert error.code == "CX420" and "weights.bin" in error.message


def test_parser_errors_name_the_node(tmp_path: Path, engine: Path) -> None:
    graph = Graph()
    graph.output(graph.node("NoSuchOperator", graph.input("x", [1, 4])), "y", [1, 4])
    error = failing(save(graph.model(), tmp_path / "graph.onnx"), engine, profiles=[])
    assert error.code == "CX420" and "node `NoSuchOperator_0` (NoSuchOperator)" in error.message


def test_builder_errors_are_reported(tmp_path: Path, engine: Path) -> None:
    error = failing(save(generator(dtype=FP32), tmp_path / "graph.onnx"), engine)
    assert error.code == "CX421" and "not supported by a dedicated kernel" in error.message and "BF16" in error.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uk0": None}, "profile 0 lacks the dynamic input `uk0`"),
        ({"z": ((1,), (1,), (1,))}, "profile 0 names `z`, which is no input"),
        ({"x": ((1, 1, 32), (1, 2, 32), (1, 4, 32))}, r"profile 0 gives `x` .* but its shape is \[1, -1, 64\]"),
        ({"x": ((1, 1), (1, 2), (1, 4))}, "but its shape is"),
        ({"x": ((1, 9, 64), (1, 2, 64), (1, 4, 64))}, "profile 0"),
    ],
)
def test_profiles_that_do_not_fit(graph: Path, engine: Path, change: dict[str, object], message: str) -> None:
    profile = {name: shapes for name, shapes in {**generator_profile(), **change}.items() if shapes is not None}
    with pytest.raises(UserError, match=message) as caught:
        build_engine(graph, engine, target=RTX, profiles=[profile])  # type: ignore[dict-item]
    assert caught.value.code == "CX413"


def test_dynamic_inputs_need_a_profile(graph: Path, engine: Path) -> None:
    assert "no profile is given" in failing(graph, engine, profiles=[]).message


def test_the_working_directory_is_not_imported_from(
    graph: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    build_engine(graph, engine, target=RTX, profiles=[generator_profile()])
