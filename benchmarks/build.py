"""Whole builds of a few layers of a published width, with random weights: time, memory, sizes, fused attention, and
whether two builds give the same bytes.

    python benchmarks/build.py [--size nano] [--layers 2] [--targets rtx-pro-6000,l40s,dgx-spark] [-o FILE.json]

Needs about five times the weights on disk under --work. Every step is the command a user would type; its peak memory is
the largest resident set of any of its processes, mapped weight files included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def run(*arguments: str) -> tuple[float, float, dict[str, Any]]:
    """(seconds, peak GiB, JSON document) of one cosmos-export command."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cosmos_export", *arguments, "--json", "--quiet"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed: {text}")
    document = json.loads(text)
    # A builder runs in a process of its own; the command reports the larger of the two.
    peak = max(usage.ru_maxrss * 1024, document.get("peak_memory_bytes", 0))
    return time.perf_counter() - start, peak / 2**30, document


def comparable(bundle: Path) -> dict[str, Any]:
    """The manifest without what may differ; the hashes of all files are in it."""
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["volatile"], manifest["digest"]
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="nano", choices=["nano", "super", "edge"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--targets", default="rtx-pro-6000,l40s,dgx-spark")
    parser.add_argument("--profile", default="480p-121f")
    parser.add_argument("--work", type=Path, help="directory for the checkpoint and the bundles (default: temporary)")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        rows, same = measure(arguments, work)
    finally:
        shutil.rmtree(work)
    if arguments.output:
        document = {
            "benchmark": "build",
            "command": f"python benchmarks/build.py --size {arguments.size} --layers {arguments.layers} "
            f"--targets {arguments.targets} --profile {arguments.profile}",
            "machine": {"cores": os.cpu_count(), "memory_gib": round(_memory() / 2**30, 1)},
            "versions": {n: metadata.version(n) for n in ("cosmos-export", "torch", "diffusers", "tensorrt-rtx-cu13")},
            "weights": "random",
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if same else 1


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(arguments: argparse.Namespace, work: Path) -> tuple[list[dict[str, Any]], bool]:
    checkpoint = work / "checkpoint"
    seconds, peak, _ = run(
        "demo-checkpoint", "--true-width", arguments.size, "--layers", str(arguments.layers), "--dtype", "bfloat16",
        "-o", str(checkpoint),
    )  # fmt: skip
    size = sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file())
    print(f"checkpoint: {arguments.layers} layers of {arguments.size} width, {size / 2**30:.2f} GiB, {seconds:.0f} s, "
          f"peak {peak:.2f} GiB\n")  # fmt: skip
    print("| target | engines | fused attention | build | of it engines | peak memory | two builds |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    same = True
    for target in arguments.targets.split(","):
        bundles = [work / f"{target}-{i}" for i in range(2)]
        for bundle in bundles:
            seconds, peak, document = run(
                "build", str(checkpoint), "-o", str(bundle), "--target", target, "--profile", arguments.profile,
                "--parity", "never",
            )  # fmt: skip
        identical = comparable(bundles[0]) == comparable(bundles[1])
        same &= identical
        engines = document["engines"]
        sizes = ", ".join(f"{e['graph']} {e['size_bytes'] / 2**20:.0f} MiB" for e in engines)
        fused = sum(e["fused_attention"] for e in engines)
        building = sum(e["build_s"] for e in engines)
        print(f"| {target} | {sizes} | {fused} | {seconds:.0f} s | {building:.1f} s | {peak:.2f} GiB "
              f"| {'identical' if identical else 'DIFFER'} |")  # fmt: skip
        rows.append({
            "target": target, "seconds": round(seconds, 1), "peak_gib": round(peak, 2), "identical": identical,
            "engines": engines,
        })  # fmt: skip
        for bundle in bundles:
            shutil.rmtree(bundle)
    return rows, same


if __name__ == "__main__":
    sys.exit(main())
