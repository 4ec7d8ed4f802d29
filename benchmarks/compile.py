"""Capture and all passes for the published sizes, without weights: seconds, peak memory, nodes; and full builds.

    python benchmarks/compile.py [--sizes nano,super,edge] [-o benchmarks/results/compile.json]
    python benchmarks/compile.py --builds edge,nano:12 [--work DIR] [-o benchmarks/results/builds.json]

Each size runs in a process of its own, so that its peak memory is its own. For capture only shapes are needed.

A build is the whole command on a sparse checkpoint of true size, ``SIZE`` or ``SIZE:LAYERS``, with every component.
Holes of the checkpoint stay holes in the weight files, so those cost less to write than real ones would; engines are
written in full. "copy" is what writing and flushing the bytes of all engines takes on the same disk, from one engine's
copy. On a machine that does other work at the same time seconds say little; the load beside them tells.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

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


def build(size: str, layers: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One full build in a temporary directory: what it cost, and what it made."""
    workload = arguments.workload + ("+sound" if size != "edge" else "")
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        few = ["--layers", layers] if layers else []
        _command("demo-checkpoint", "--like", size, *few, "--sparse", "-o", str(checkpoint))
        start = time.perf_counter()
        made = _command(
            "build", str(checkpoint), "-o", str(bundle), "--target", arguments.target, "--profile",
            workload.partition("-")[2], "--parity", "never", "--no-cache",
        )  # fmt: skip
        seconds = time.perf_counter() - start
        engines = sorted((bundle / "engines").iterdir(), key=lambda path: path.stat().st_size)
        copied = _copy_seconds(engines[-1], Path(folder) / "copy")
        ratio = sum(path.stat().st_size for path in engines) / engines[-1].stat().st_size
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        return {
            "model": size,
            "layers": manifest["model"]["geometry"]["num_hidden_layers"],
            "recipe": manifest["recipe"],
            "target": arguments.target,
            "workload": workload,
            "seconds": round(seconds, 1),
            "load_average": os.getloadavg()[0],
            "copy_seconds": round(copied * ratio, 1),
            "peak_resident_bytes": made["peak_memory_bytes"],
            "peak_anonymous_bytes": made["peak_anonymous_bytes"],
            "bundle_bytes": sum(file["size_bytes"] for file in manifest["files"]),
            "stages": made["stages"],
            "engines": made["engines"],
        }


def _command(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "cosmos_export", *arguments, "--json", "--quiet"]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if finished.returncode:
        sys.exit(f"{' '.join(arguments)} failed: {finished.stderr}")
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def _copy_seconds(source: Path, target: Path) -> float:
    start = time.perf_counter()
    with source.open("rb") as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, 16 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def builds(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of full builds."""
    print("| model | layers | recipe | seconds | copy | ratio | load | peak resident | peak anonymous | read | written "
          "| bundle |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in arguments.builds.split(","):
        size, _, layers = name.partition(":")
        row = build(size, layers, arguments)
        rows.append(row)
        read, written = (sum(s[f"{which}_bytes"] for s in row["stages"].values()) for which in ("read", "written"))
        gigabytes = [f"{row[f'peak_{k}_bytes'] / 1e9:.2f} GB" for k in ("resident", "anonymous")]
        gigabytes += [f"{count / 1e9:.1f} GB" for count in (read, written, row["bundle_bytes"])]
        print(f"| {size} | {row['layers']} | {row['recipe']} | {row['seconds']:.0f} | {row['copy_seconds']:.0f} "
              f"| {row['seconds'] / row['copy_seconds']:.1f} | {row['load_average']:.1f} | {' | '.join(gigabytes)} |",
              flush=True)  # fmt: skip
    return rows


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
    parser.add_argument("--builds", help="full builds instead: SIZE or SIZE:LAYERS, comma separated")
    parser.add_argument("--target", default="rtx-pro-6000")
    parser.add_argument("--workload", default="t2v-480p-121f")
    parser.add_argument("--work", type=Path, help="directory for checkpoints and bundles (default: temporary)")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return 0
    if arguments.builds:
        _write(arguments, "builds", f"python benchmarks/compile.py --builds {arguments.builds}", builds(arguments))
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
