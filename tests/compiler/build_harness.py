"""Builds for the tests: through the command line in a process of their own, or in this one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_export.bundle import Manifest, read_bundle
from cosmos_export.checkpoint import demo_components
from cosmos_export.compiler.cache import default_graphs_folder
from cosmos_export.options import BuildOptions

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMER_ONLY = ("--target", "rtx-pro-6000", "--components", "none")
"""A build without the other components: most tests are not about them, and they take longer than the rest."""


@dataclass(frozen=True)
class Built:
    """A bundle and what the command said about it."""

    path: Path
    document: Mapping[str, Any]
    stderr: str

    @property
    def manifest(self) -> Manifest:
        return read_bundle(self.path)


def cosmos_export(*arguments: object, threads: int = 1, **settings: Any) -> subprocess.CompletedProcess[str]:
    """`cosmos-export ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cosmos_export", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(threads),
        **{"cwd": ROOT, **settings},
    )


def environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def once(path: Path, make: Callable[[], None]) -> Path:
    """``path``, made by ``make`` in the first process of this test run that asks; the others wait for it."""
    done = path.with_name(f"{path.name}.done")
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make()
            done.touch()
    return path


def checkpoint(folder: Path, variant: str, dtype: str) -> Path:
    from cosmos_export.checkpoint.demo import write_demo_checkpoint

    path = folder / f"{variant}-{dtype}"

    def make() -> None:
        write_demo_checkpoint(path, variant, dtype=dtype)

    return once(path, make)


def command_line_build(folder: Path, name: str, *arguments: object, threads: int = 1, **settings: Any) -> Built:
    """`build ARGUMENTS -o folder/name --json`, which must succeed."""
    path, document, log = folder / name, folder / f"{name}.json", folder / f"{name}.log"

    def make() -> None:
        result = cosmos_export("build", *arguments, "-o", path, "--json", threads=threads, **settings)
        assert result.returncode == 0, result.stderr
        document.write_text(result.stdout)
        log.write_text(result.stderr)

    once(path, make)
    return Built(path, json.loads(document.read_text()), log.read_text())


def transformer_only(checkpoint: Path, output: Path | None = None, **options: Any) -> BuildOptions:
    """A request without the other components."""
    return BuildOptions(checkpoint, output, **{"components": ("none",), **options})


def remembered_codec(name: str, config: Mapping[str, Any], sources: Mapping[str, Any], _: Path | None = None) -> Any:
    """`capture_codec` with the graphs of this test run, whatever a build is told."""
    from cosmos_export.compiler.captures import capture_codec

    return capture_codec(name, config, sources, default_graphs_folder())


def remembered_capture(
    config: Mapping[str, Any], sources: Mapping[str, Any], *, modalities: Collection[str], graphs: Path | None = None
) -> Any:
    """`capture` of the step in the same way."""
    from cosmos_export.compiler.captures import capture

    return capture(config, sources, modalities=modalities, graphs=default_graphs_folder())


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target


def distilled(source: Path, target: Path) -> Path:
    """``source`` with the sampler files of a published 4-step checkpoint, at ``target``."""
    copy_checkpoint(source, target)
    scheduler, modular = demo_components.DISTILLED_SCHEDULER, demo_components.DISTILLED_INDEX
    (target / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    (target / "modular_model_index.json").write_text(json.dumps(modular), encoding="utf-8")
    return target


def policy(source: Path, target: Path) -> Path:
    """``source`` as a policy that is given the robot's state, at ``target``."""
    copy_checkpoint(source, target)
    said = {"domain_name": "umi", "use_state": True, "action_chunk_size": 8}
    (target / "checkpoint.json").write_text(json.dumps({"policy": said}), encoding="utf-8")
    return target


def leftovers(folder: Path) -> list[str]:
    """Names in ``folder``, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def chain(bundle: Path, inputs: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """Run the ONNX form of the loop's body and of all that leads to it on the CPU; the body's results.

    What a reader of bundles would write: it knows the manifest and ONNX Runtime, nothing of the compiler.
    """
    import onnxruntime

    manifest = read_bundle(bundle)
    paths = {Path(f.path).name.removesuffix(suffix): f.path for f in manifest.files if f.path.endswith(suffix)}
    results: dict[str, dict[str, Any]] = {}
    assert manifest.loop is not None
    waiting, last = set[str](), {manifest.loop.body}
    while last:
        waiting |= last
        last = {edge.source for edge in manifest.edges if edge.target in last} - waiting
    while waiting:
        feeds = {name: [e for e in manifest.edges if e.target == name] for name in waiting}
        name = min(name for name, edges in feeds.items() if all(e.source in results for e in edges))
        contract = manifest.graphs[name]
        feed = {e.input: results[e.source][e.output] for e in feeds[name]}
        feed |= {t.name: inputs[t.name] for t in contract.inputs if t.name not in feed}
        session = onnxruntime.InferenceSession(str(bundle / paths[name]), providers=["CPUExecutionProvider"])
        names = [t.name for t in contract.outputs]
        results[name] = dict(zip(names, session.run(names, feed), strict=True))
        waiting.remove(name)
    return results[manifest.loop.body]


def scale_table(checkpoint: Path, output: Path, margin: float = 1.1) -> Path:
    """A scale table of ``checkpoint`` at ``output``: the largest input of every linear in a few requests, and some."""
    from cosmos_export.calibration.table import ScaleTable, write_scale_table
    from cosmos_export.capture.sources import weight_sources
    from cosmos_export.checkpoint import checkpoint_identity, open_checkpoint
    from cosmos_export.evaluation.cases import CASES
    from cosmos_export.evaluation.gates import observe_inputs
    from cosmos_export.ir.interpreter import read_weights
    from cosmos_export.passes.pipeline import default_passes, run_passes
    from cosmos_export.targets.onnx.weights import read_source

    def make() -> None:
        found = open_checkpoint(checkpoint)
        config = found.geometry.config
        modalities = tuple(m for m, has in (("vision", True), ("sound", found.geometry.sound_gen),
                                            ("action", found.geometry.action_gen)) if has)  # fmt: skip
        program = remembered_capture(config, weight_sources(found.tensors), modalities=modalities)
        run_passes(program, default_passes())
        amax: dict[str, float] = {}
        for case in (CASES[1], CASES[4]):
            seen = observe_inputs(program, case.inputs(config, modalities), read_weights(read_source))
            amax = {key: max(margin * value, amax.get(key, 0.0)) for key, value in seen.items()}
        linears = {name.removesuffix(".weight") for name, t in found.expected.items() if t.linear}
        kept = {key: value for key, value in amax.items() if key.removesuffix(".input_amax") in linears}
        write_scale_table(ScaleTable(kept, {}, checkpoint_identity(found), {"data": "test requests"}), output)

    return once(output, make)


def with_attention(scales: Path, output: Path, amax: float = 8.0) -> Path:
    """The table ``scales`` with ranges of the generator's attention in every layer, at ``output``."""
    from cosmos_export.calibration.table import ScaleTable, read_scale_table, write_scale_table

    def make() -> None:
        table = read_scale_table(scales)
        ranges = {f"layers.{n}.attention.generator.{o}_amax": amax for n in range(3) for o in "qkv"}
        write_scale_table(ScaleTable({**table.amax, **ranges}, {}, table.checkpoint, {}), output)

    return once(output, make)
