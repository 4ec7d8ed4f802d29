"""Capture and all passes for the published sizes, without weights: seconds, peak memory, nodes.

    python benchmarks/compile.py [--sizes nano,super,edge] [-o benchmarks/results/compile.json]

Each size runs in a process of its own, so that its peak memory is its own. Only shapes are needed: no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="edge,nano,super")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
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
    if arguments.output:
        document = {
            "benchmark": "compile",
            "command": "python benchmarks/compile.py",
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": 1},
            "versions": {n: metadata.version(n) for n in ("cosmos-export", "torch", "diffusers")},
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
