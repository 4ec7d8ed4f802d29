"""Calibration and quantization of a few layers of a published width, with random weights: memory and time per layer.

    python benchmarks/quantize.py [--size nano] [--layers 4,8] [--passes 8] [--formats fp8,int4] [-o FILE.json]

Peak memory must not follow the number of layers, and a further layer may take 1.3 times the baseline: with a miss the
script exits with 1. The baseline is what cannot be saved: the samples once through a layer
without anything watching, and the bytes of a quantized layer written to disk. Needs 10 GB under --work for nano. Every
step is the command a user would type.
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
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from build import run

LIMIT_GB = 5.0
TIME_LIMIT, GROWTH_LIMIT = 1.3, 1.2
"""Largest ratios: a layer's time to the baseline, and the peak with the most layers to that with the fewest."""
BASELINE = """
import json, os, sys, time
from pathlib import Path
import torch
from cosmos_export.calibration.layers import LayerSource
from cosmos_export.checkpoint import open_checkpoint
source = LayerSource(open_checkpoint(Path(sys.argv[1])))
geometry = source.geometry
passes, und, gen = map(int, sys.argv[2:5])
layer = source.load(0)
states = [(torch.randn(und, geometry.hidden_size).bfloat16(), torch.randn(gen, geometry.hidden_size).bfloat16(),
           tuple(torch.rand(n, geometry.head_dim).bfloat16() for n in (und, und, gen, gen))) for _ in range(passes)]
with torch.no_grad():
    layer(*states[0])
    start = time.perf_counter()
    for state in states:
        layer(*state)
    forward = time.perf_counter() - start
data = os.urandom(source.size_bytes(0) // 2)
start = time.perf_counter()
with open(sys.argv[5], "wb") as file:
    file.write(data)
    os.fsync(file.fileno())
print(json.dumps({"forward": forward, "write": time.perf_counter() - start}))
"""


def latents(path: Path, channels: int, frames: int) -> None:
    """A file of latents as ``run --save-latents`` writes it."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    save_file({"vision": random.standard_normal((1, channels, frames, 12, 20), np.float32)}, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="nano", choices=["nano", "super", "edge"])
    parser.add_argument("--layers", default="4,8")
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--formats", default="fp8,int4")
    parser.add_argument("--work", type=Path, help="directory for the checkpoints (default: temporary)")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        document = measure(arguments, work)
    finally:
        shutil.rmtree(work)
    print(json.dumps(document, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    missed = list(misses(document))
    for miss in missed:
        print(miss, file=sys.stderr)
    return 1 if missed else 0


def misses(document: dict[str, Any]) -> Iterator[str]:
    """Limits that are not kept."""
    peaks: dict[str, list[float]] = {}
    for row in document["rows"]:
        peaks.setdefault(row["step"], []).append(row["peak_gb"])
        if row["peak_gb"] > LIMIT_GB:
            yield f"{row['step']} of {row['layers']} layers takes {row['peak_gb']} GB, allowed {LIMIT_GB}"
    for step, found in peaks.items():
        if max(found) > GROWTH_LIMIT * min(found):
            yield f"the peak of {step} follows the number of layers: {found} GB"
    spent, baseline = document["seconds_a_layer"], sum(document["baseline_seconds_a_layer"].values())
    for step in spent.keys() - {"calibrate"}:
        both = spent["calibrate"] + spent[step]
        if both > TIME_LIMIT * baseline:
            yield f"calibrate and {step}: {both:.1f} s a layer, allowed {TIME_LIMIT} x {baseline:.1f} s"


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    file = work / "latents.safetensors"
    latents(file, 48, 9)
    baseline: dict[str, float] = {}
    counts = [int(text) for text in arguments.layers.split(",")]
    for layers in counts:
        checkpoint, scales = work / "checkpoint", work / "scales"
        run("demo-checkpoint", "--true-width", arguments.size, "--layers", str(layers), "--dtype",
            "bfloat16", "-o", str(checkpoint))  # fmt: skip
        if not baseline:
            sizes = (str(arguments.passes), "256", "540", str(work / "bytes"))
            text = subprocess.run(
                [sys.executable, "-c", BASELINE, str(checkpoint), *sizes], check=True, capture_output=True, text=True
            ).stdout
            baseline = json.loads(text.splitlines()[-1])
        start = time.perf_counter()
        seconds, peak, document = run(
            "calibrate", str(checkpoint), "--data", f"{file},prompt=A robot folds a towel on a table.", "-o",
            str(scales), "--modalities", "vision", "--samples", str(arguments.passes), "--steps", "8",
        )  # fmt: skip
        rows.append(_row("calibrate", layers, seconds, peak, tokens=document["lineage"]["tokens"]))
        for kind in arguments.formats.split(","):
            out = work / kind
            seconds, peak, _ = run(
                "quantize", str(checkpoint), "--calibration", str(scales), "--format", kind, "-o", str(out), "--link"
            )
            rows.append(_row(f"quantize {kind}", layers, seconds, peak))
            shutil.rmtree(out)
        print(f"{layers} layers: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        shutil.rmtree(checkpoint)
        shutil.rmtree(scales)
    return {
        "benchmark": "quantize",
        "command": f"python benchmarks/quantize.py --size {arguments.size} --layers {arguments.layers} "
        f"--passes {arguments.passes} --formats {arguments.formats}",
        "machine": {"cores": os.cpu_count(), "load_before": os.getloadavg()[1]},
        "versions": {name: metadata.version(name) for name in ("cosmos-export", "torch", "diffusers")},
        "weights": "random",
        "limit_gb": LIMIT_GB,
        "baseline_seconds_a_layer": {name: round(value, 2) for name, value in baseline.items()},
        "seconds_a_layer": _slopes(rows, counts),
        "rows": rows,
    }


def _row(step: str, layers: int, seconds: float, peak_gib: float, **more: Any) -> dict[str, Any]:
    peak_gb = round(peak_gib * 2**30 / 1e9, 2)
    return {"step": step, "layers": layers, "seconds": round(seconds, 1), "peak_gb": peak_gb, **more}


def _slopes(rows: list[dict[str, Any]], counts: list[int]) -> dict[str, float]:
    """Seconds that each further layer takes, from the smallest and the largest number of them."""
    low, high = min(counts), max(counts)
    if low == high:
        return {}
    found = {(row["step"], row["layers"]): row["seconds"] for row in rows}
    steps = sorted({row["step"] for row in rows})
    return {step: round((found[step, high] - found[step, low]) / (high - low), 2) for step in steps}


if __name__ == "__main__":
    sys.exit(main())
