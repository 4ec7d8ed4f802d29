"""A build that is killed goes on where it stopped, and its bundle is the one it would have been.

Builds run in children forked from this process, so that importing and the checkpoint cost once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest

from cosmos_export.bundle import BundleWriter, verify_bundle
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler import artifacts, stages
from cosmos_export.compiler.cache import Cache, copy_checked, differences
from cosmos_export.compiler.driver import build
from cosmos_export.diagnostics import ToolError
from cosmos_export.options import BuildOptions
from cosmos_export.plan.sizes import BUILDER_BYTES, compiler_bytes
from cosmos_export.targets.trt import tensorrt_rtx

pytest.importorskip("tensorrt_rtx")
_CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("resume") / "checkpoint", layers=1, dtype="bfloat16")


def options(checkpoint: Path, output: Path | None, **changed: Any) -> BuildOptions:
    return BuildOptions(
        checkpoint, output, target="rtx-pro-6000", components=("none",), modalities=("vision",), parity="never",
        **changed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, float]]:
    """A build without a pause, and the seconds it took."""
    import cosmos_export.compiler.stages  # noqa: F401  (forked children must not import it each)

    path = tmp_path_factory.mktemp("whole") / "bundle"
    start = time.perf_counter()
    in_a_child(lambda: build(options(checkpoint, path)))
    yield path, time.perf_counter() - start


def in_a_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run ``work`` in a forked child, killed after a while if asked; its exit code."""
    process = _CONTEXT.Process(target=work)
    process.start()
    process.join(kill_after)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def contents(bundle: Path) -> dict[str, Any]:
    """The manifest but for what may differ: the digests of all files are in it."""
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    del manifest["volatile"], manifest["digest"]
    return manifest


KILLS = 20


def test_killed_at_random_moments(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bundle is built by children that are killed one after the other, until one of them ends; there are as many
    bundles as it takes for all kills. What is captured is remembered by the parent: it is what takes the time."""
    monkeypatch.setattr(stages, "capture", harness.remembered_capture)
    build(options(checkpoint, None, until="normalize"))
    reference, moments = tmp_path / "first", random.Random(0)
    start = time.perf_counter()
    assert in_a_child(lambda: build(options(checkpoint, reference))) == 0
    seconds = time.perf_counter() - start
    kills = bundles = 0
    while kills < KILLS:
        output, bundles = tmp_path / f"bundle-{bundles}", bundles + 1
        while not output.exists():
            last = None if kills == KILLS else moments.uniform(0, 0.6 * seconds)
            code = in_a_child(lambda: build(options(checkpoint, output, resume=True)), kill_after=last)  # noqa: B023
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert verify_bundle(output).ok
        assert contents(output) == contents(reference)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["first", *(f"bundle-{n}" for n in range(bundles))]
    )


def test_finished_engines_are_not_built_again(
    checkpoint: Path, whole: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the generator's engine is written; what was built before it stays."""
    built: list[str] = []
    full = True

    build_engine = tensorrt_rtx.build_engine

    def recording(model: Path, path: Path, **settings: Any) -> Any:
        if full and path.name == "generator.engine":
            records = path.parents[1] / ".state"
            others = ("reasoner", "conditioning")  # built beside it, and finished first
            while not all(any(f"engines/{o}.engine" in r.read_text() for r in records.glob("*.json")) for o in others):
                time.sleep(0.05)
            raise ToolError("CX424", "the engine could not be written: No space left on device", "free disk space")
        built.append(path.name)
        return build_engine(model, path, **settings)

    monkeypatch.setattr(tensorrt_rtx, "build_engine", recording)
    with pytest.raises(ToolError, match="CX424"):
        build(options(checkpoint, tmp_path / "bundle"))
    assert "reasoner.engine" in built
    before, full = list(built), False
    build(options(checkpoint, tmp_path / "bundle", resume=True))
    assert built == [*before, "generator.engine"]
    assert contents(tmp_path / "bundle") == contents(whole[0])


def test_a_changed_profile_resumes_only_what_it_does_not_touch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of other shapes are built again; weights are not written again."""
    written: list[str] = []
    original = artifacts.write_weights

    def recording(path: Path, *rest: Any) -> str:
        written.append(path.name)
        return original(path, *rest)

    def failing(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "write_weights", recording)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensorrt_rtx, "build_engine", failing)
        build(options(checkpoint, tmp_path / "bundle"))
    first = list(written)
    assert "generator.weights" in first
    build(options(checkpoint, tmp_path / "bundle", resume=True, profiles=("256p-61f",)))
    assert written == first
    assert verify_bundle(tmp_path / "bundle").ok


def test_engines_that_are_cut_elsewhere_replace_those_that_were_kept(
    omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another budget, or another amount of free memory where none is given: the pieces have other names."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BundleWriter, "commit", interrupted)
        build(options(omni, tmp_path / "bundle"))
    assert list(tmp_path.glob(".bundle.partial-*/engines/generator.engine"))
    budget = f"{(compiler_bytes(3) + BUILDER_BYTES) / 1e6 + 0.15}MB"
    build(options(omni, tmp_path / "bundle", resume=True, memory_budget=budget))
    names = {path.name for path in (tmp_path / "bundle/engines").iterdir()}
    assert "generator.engine" not in names and "generator_part_1.engine" in names
    assert verify_bundle(tmp_path / "bundle").ok


def test_engines_of_another_bundle_are_copied(checkpoint: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = build(options(checkpoint, tmp_path / "first", cache=cache))
    entries = Cache(cache).entries()
    assert {entry.name for entry in entries} == {engine.graph for engine in first.engines}
    assert all(entry.present and entry.components["target"] == "12.0" for entry in entries)
    second = build(options(checkpoint, tmp_path / "second", cache=cache))
    assert [e.report.build_s for e in second.engines] == [e.report.build_s for e in first.engines]
    assert {e.report.reused for e in first.engines} == {""} and {e.report.reused for e in second.engines} == {"cache"}
    assert contents(tmp_path / "second") == contents(tmp_path / "first") == contents(whole[0])
    # The first copy stays known: the second may go.
    assert {Path(entry.path).parents[1].name for entry in Cache(cache).entries()} == {"first"}


def test_an_engine_that_was_changed_is_not_copied(checkpoint: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    build(options(checkpoint, tmp_path / "first", cache=cache.folder))
    for entry in cache.entries():
        data = bytearray(Path(entry.path).read_bytes())
        data[len(data) // 2] ^= 1
        Path(entry.path).write_bytes(data)
        assert cache.find(entry.key) is not None
        assert not copy_checked(entry, tmp_path / "copy")
        Path(entry.path).unlink()
        assert not copy_checked(entry, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    build(options(checkpoint, tmp_path / "second", cache=cache.folder))
    assert contents(tmp_path / "second") == contents(whole[0])


def flipped(path: Path) -> None:
    """Another bit, and the size and time of before."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_engine_of_damaged_weights_is_neither_built_nor_recorded(
    checkpoint: Path, whole: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept file that is damaged before the build goes on, then one that is damaged in a finished bundle."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    cache = Cache(tmp_path / "cache")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tensorrt_rtx, "build_engine", interrupted)
        build(options(checkpoint, tmp_path / "first", cache=cache.folder))
    (weights,) = tmp_path.glob(".first.partial-*/onnx/generator.weights")
    flipped(weights)
    build(options(checkpoint, tmp_path / "first", cache=cache.folder, resume=True))
    assert contents(tmp_path / "first") == contents(whole[0]) and verify_bundle(tmp_path / "first").ok
    flipped(tmp_path / "first/onnx/generator.weights")
    second = build(options(checkpoint, tmp_path / "second", cache=cache.folder))
    assert {engine.graph: engine.report.reused for engine in second.engines}["generator"] == ""
    assert contents(tmp_path / "second") == contents(whole[0])


def test_what_is_gone_is_pruned_and_why_says_so(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    cache = Cache(tmp_path / "cache")
    build(options(checkpoint, tmp_path / "first", cache=cache.folder))
    build(options(checkpoint, tmp_path / "second", cache=cache.folder, profiles=("256p-61f",)))
    old, new = (
        next(e for e in cache.entries() if e.name == "generator" and which in e.path) for which in ("first", "second")
    )
    assert differences(old.components, new.components) == ["profiles"]
    assert "profiles differ" in cache.why("generator", {**new.components, "profiles": "others"})
    assert "no build" in cache.why("another", new.components)
    shutil.rmtree(tmp_path / "first")
    assert cache.find(old.key) is None
    assert "gone" in cache.why("generator", old.components)
    assert old.key in {entry.key for entry in cache.prune()}
    assert {entry.key for entry in cache.entries()} == {entry.key for entry in cache.entries() if entry.present}
    cache.prune(everything=True)
    assert cache.entries() == []
