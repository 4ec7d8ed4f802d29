"""Capture and all passes for the published sizes, without weights: seconds, peak memory, nodes; and full builds.

    python benchmarks/compile.py [--sizes nano,super,edge] [-o benchmarks/results/compile.json]
    python benchmarks/compile.py --builds edge,nano:fp8,nano:12:int4 [--work DIR] [-o benchmarks/results/builds.json]

Each size runs in a process of its own, so that its peak memory is its own. For capture only shapes are needed.

A build is the whole command on a sparse checkpoint of true size, ``SIZE[:LAYERS][:RECIPE]``, with every component, and
a scale table where the recipe needs one. Holes of the checkpoint stay holes in weight files and engines, so that those
cost less to write than real ones would; everything is computed and hashed in full. "copy" is what writing and flushing
the bundle's bytes takes on the same disk, none of them zero. On a machine that does other work at the same time seconds
say little; the load before and after and the CPU time of all processes tell. Each row is kept as soon as there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cosmos_export.calibration.table import ScaleTable, write_scale_table
from cosmos_export.checkpoint import checkpoint_identity, open_checkpoint

LIMITS = {"nano": (60.0, 3.0), "super": (120.0, 3.0), "edge": (60.0, 3.0)}
"""(seconds, GiB) that the project holds itself to."""


def measure(size: str) -> dict[str, object]:
    """Compile one size in this process."""
    start = time.perf_counter()
    import torch

    from cosmos_export.capture.model import capture
    from cosmos_export.checkpoint import expected_tensors
    from cosmos_export.checkpoint.published import EDGE, NANO, SUPER
    from cosmos_export.ir.spec import WeightSource
    from cosmos_export.passes.pipeline import default_passes, run_passes
    from cosmos_export.passes.split_towers import REASONER, memory_bytes_per_token

    geometry = {"nano": NANO, "super": SUPER, "edge": EDGE}[size]
    sources = {
        name: WeightSource(name, Path("absent.safetensors"), 0, torch.bfloat16, tuple(tensor.shape))
        for name, tensor in expected_tensors(geometry).items()
    }
    imported = time.perf_counter()
    program = capture(geometry.config, sources)
    captured = time.perf_counter()
    nodes = sum(len(list(g.nodes)) for g in program.graphs.values())
    reports = run_passes(program, default_passes())
    done = time.perf_counter()
    return {
        "size": size,
        "layers": geometry.num_hidden_layers,
        "import_s": round(imported - start, 2),
        "capture_s": round(captured - imported, 2),
        "passes_s": {r.name: round(r.seconds, 2) for r in reports},
        "capture_and_passes_s": round(done - imported, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "nodes_captured": nodes,
        "nodes": {name: len(list(g.nodes)) for name, g in program.graphs.items()},
        "key_value_pairs": len(program.graphs[REASONER].outputs) // 2,
        "key_value_bytes_per_token": memory_bytes_per_token(program),
        "weights_nothing_reads": len(program.unused_keys),
    }


@dataclass(frozen=True)
class Subject:
    """One full build: ``SIZE[:LAYERS][:RECIPE]``."""

    size: str
    layers: str
    recipe: str

    @staticmethod
    def parse(text: str) -> Subject:
        size, *rest = text.split(":")
        layers = "".join(part for part in rest if part.isdecimal())
        return Subject(size, layers, "".join(part for part in rest if not part.isdecimal()) or "bf16")


def build(subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """One full build in a temporary directory: what it cost, and what it made."""
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        checkpoint, bundle, scales = (Path(folder) / name for name in ("checkpoint", "bundle", "scales"))
        few = ["--layers", subject.layers] if subject.layers else []
        _command("demo-checkpoint", "--like", subject.size, *few, "--sparse", "-o", str(checkpoint))
        workload = arguments.workload + ("+sound" if open_checkpoint(checkpoint).geometry.sound_gen else "")
        options = ["--recipe", subject.recipe]
        if subject.recipe in CALIBRATED:
            write_scales(checkpoint, scales)
            options += ["--calibration", str(scales)]
        if subject.recipe != "bf16":
            options += ["--quality", "report"]
        if arguments.memory_budget:
            options += ["--memory-budget", arguments.memory_budget]
        if arguments.components:
            options += ["--components", arguments.components]
        before, start, load = _cpu_seconds(), time.perf_counter(), os.getloadavg()[0]
        made = _command(
            "build", str(checkpoint), "-o", str(bundle), "--target", arguments.target, "--profile",
            workload.partition("-")[2], "--parity", "never", "--no-cache", *options,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - start, _cpu_seconds() - before
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        size = sum(file["size_bytes"] for file in manifest["files"])
        return {
            "model": subject.size,
            "layers": manifest["model"]["geometry"]["num_hidden_layers"],
            "recipe": manifest["recipe"],
            "components": manifest["options"]["components"],
            "target": arguments.target,
            "workload": workload,
            "memory_budget": arguments.memory_budget,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
            "copy_seconds": round(_copy_seconds(Path(folder) / "copy", size), 1),
            "peak_resident_bytes": made["peak_memory_bytes"],
            "peak_anonymous_bytes": made["peak_anonymous_bytes"],
            "bundle_bytes": size,
            "chains": manifest["chains"],
            "stages": made["stages"],
            "engines": made["engines"],
            "planned": manifest["volatile"]["planned"],
            "gates": made["gates"],
        }


CALIBRATED = ("fp8", "fp4", "fp8-attention")
"""Recipes that quantize activations."""


def write_scales(checkpoint: Path, output: Path) -> None:
    """A scale table of ``checkpoint`` that nobody calibrated: every range is what a norm can return at most."""
    found = open_checkpoint(checkpoint)
    linears = [name.removesuffix(".weight") for name, tensor in found.expected.items() if tensor.linear]
    ranges = {f"{name}.input_amax": found.geometry.hidden_size**0.5 for name in linears}
    table = ScaleTable(ranges, {}, checkpoint_identity(found), {"data": "none: for measuring builds"})
    write_scale_table(table, output)


def _cpu_seconds() -> float:
    """Processor seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _command(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "cosmos_export", *arguments, "--json", "--quiet"]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if finished.returncode:
        sys.exit(f"{' '.join(arguments)} failed: {finished.stderr}")
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def _copy_seconds(path: Path, size_bytes: int) -> float:
    """Writing and flushing so many bytes, from how long 2 GiB take; none of them zero."""
    block, count = os.urandom(16 << 20), 128
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds * size_bytes / (count * len(block))


def builds(arguments: argparse.Namespace) -> None:
    """The table of full builds; what is known of each is written as soon as it is."""
    print("| model | layers | recipe | seconds | CPU | copy | ratio | load | peak resident | peak anonymous | planned "
          "| read | written | bundle |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.builds.split(","):
        row = build(Subject.parse(name), arguments)
        read, written = (sum(s[f"{which}_bytes"] for s in row["stages"].values()) for which in ("read", "written"))
        planned = row["planned"]["peak anonymous memory"]["planned"]
        sizes = (row["peak_resident_bytes"], row["peak_anonymous_bytes"], planned, read, written, row["bundle_bytes"])
        load = "–".join(f"{one:.1f}" for one in row["load_average"])
        print(f"| {row['model']} | {row['layers']} | {row['recipe']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} "
              f"| {row['copy_seconds']:.0f} | {row['seconds'] / row['copy_seconds']:.1f} | {load} | "
              + " | ".join(f"{size / 1e9:.2f} GB" for size in sizes) + " |", flush=True)  # fmt: skip
        if arguments.output is not None:
            _keep(row, arguments)


def _keep(row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """``row`` among those of the output, in the place of an older one of the same build."""
    kept = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"] if arguments.output.exists() else []

    def what(one: dict[str, Any]) -> list[Any]:
        return [one.get(key) for key in ("model", "layers", "recipe", "components", "target", "workload")]

    rows = [one for one in kept if what(one) != what(row)] + [row]
    _write(arguments, "builds", "python benchmarks/compile.py --builds …", rows)


def _write(arguments: argparse.Namespace, name: str, command: str, rows: list[dict[str, Any]]) -> None:
    if arguments.output is None:
        return
    document = {
        "benchmark": name,
        "command": command,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": 1},
        "versions": {n: metadata.version(n) for n in ("cosmos-export", "torch", "diffusers")},
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="edge,nano,super")
    parser.add_argument("--builds", help="full builds instead: SIZE[:LAYERS][:RECIPE], comma separated")
    parser.add_argument("--target", default="rtx-pro-6000")
    parser.add_argument("--workload", default="t2v-480p-121f")
    parser.add_argument("--work", type=Path, help="directory for checkpoints and bundles (default: temporary)")
    parser.add_argument("--memory-budget", help="of each full build")
    parser.add_argument("--components", help="of each full build; default: all")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return 0
    if arguments.builds:
        builds(arguments)
        return 0
    rows = []
    for size in arguments.sizes.split(","):
        command = [sys.executable, __file__, "--one", size]
        finished = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        rows.append(json.loads(finished.stdout.splitlines()[-1]))
    print("| size | layers | capture | passes | together | limit | peak memory | limit | nodes before → after |")
    print("|---|---|---|---|---|---|---|---|---|")
    within = True
    for row in rows:
        seconds, gib = LIMITS[row["size"]]
        within &= row["capture_and_passes_s"] <= seconds and row["peak_gib"] <= gib
        print(
            f"| {row['size']} | {row['layers']} | {row['capture_s']:.1f} s | {sum(row['passes_s'].values()):.1f} s "
            f"| {row['capture_and_passes_s']:.1f} s | {seconds:.0f} s | {row['peak_gib']:.2f} GiB | {gib:.0f} GiB "
            f"| {row['nodes_captured']} → {sum(row['nodes'].values())} |"
        )
    _write(arguments, "compile", "python benchmarks/compile.py", rows)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
