"""Builds that are killed at random moments and resumed: does every bundle end as the one of an uninterrupted build?

    python benchmarks/kills.py [--kills 100] [--seed 0] [-o benchmarks/results/kills.json]

A tiny checkpoint, built for sm_120 through the whole command in processes of their own. Each bundle is built with
`--resume` by commands that get SIGKILL after a random time, until one of them ends; there are as many bundles as it
takes for all kills. Bundles are compared by their manifests (all digests are in them) but for `volatile`, and
verified. "kept" is how many finished files a killed build left behind; how that is distributed says where kills fell.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

SHARE = 0.9
"""Of an uninterrupted build's time, within which a kill comes."""


def command(checkpoint: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "cosmos_export", "build", str(checkpoint), "-o", str(output), "--resume", "--target",
        "rtx-pro-6000", "--components", "none", "--modalities", "vision", "--parity", "never", "--no-cache", "--quiet",
    ]  # fmt: skip


def run(arguments: list[str], kill_after: float | None) -> int:
    """The command's exit status; −9 where it was killed."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        _, err = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"a build ended with {process.returncode}: {err.decode()}")
    return process.returncode


def contents(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    del manifest["volatile"]
    return manifest


def kept(output: Path) -> int:
    return len(list(output.parent.glob(f".{output.name}.partial-*/.state/*.json")))


def measure(kills: int, seed: int) -> dict[str, Any]:
    from cosmos_export.bundle import verify_bundle
    from cosmos_export.checkpoint.demo import write_demo_checkpoint

    moments, left, bundles, killed = random.Random(seed), Counter[int](), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoint = write_demo_checkpoint(root / "checkpoint", layers=1, dtype="bfloat16")
        start = time.perf_counter()
        run(command(checkpoint, root / "whole"), None)
        seconds = time.perf_counter() - start
        whole = contents(root / "whole")
        while killed < kills:
            output = root / f"bundle-{bundles}"
            while not output.exists():
                after = None if killed == kills else moments.uniform(0, SHARE * seconds)
                if run(command(checkpoint, output), after) != 0:
                    killed += 1
                    left[kept(output)] += 1
                    print(f"{killed} kills, {bundles} bundles", file=sys.stderr, flush=True)
            if not verify_bundle(output).ok or contents(output) != whole:
                sys.exit(f"bundle {bundles}, after {killed} kills, is not that of an uninterrupted build")
            bundles += 1
    return {
        "kills": killed, "bundles": bundles, "identical": bundles, "seconds_uninterrupted": round(seconds, 1),
        "kept_when_killed": {str(count): times for count, times in sorted(left.items())}, "seed": seed,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    versions = {n: metadata.version(n) for n in ("cosmos-export", "torch", "tensorrt-rtx-cu13")}
    row = measure(arguments.kills, arguments.seed)
    print("| kills | bundles | identical | finished files when killed: times |")
    print("|---|---|---|---|")
    found = ", ".join(f"{count}: {times}" for count, times in row["kept_when_killed"].items())
    print(f"| {row['kills']} | {row['bundles']} | {row['identical']} | {found} |")
    if arguments.output is not None:
        document = {
            "benchmark": "kills",
            "command": f"python benchmarks/kills.py --kills {arguments.kills}",
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": 1},
            "versions": versions,
            "rows": [row],
        }
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
