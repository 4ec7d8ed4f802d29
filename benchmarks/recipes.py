"""Contents of the engines of every recipe, at true width: types of the products, narrow weights, fused attention.

    python benchmarks/recipes.py [--sizes edge,nano] [--layers 2] [--targets rtx-pro-6000,l40s,dgx-spark]
                                 [--recipes fp8,…] [--work DIR] [-o benchmarks/results/recipes.json]

Two layers, because of the reasoner's last one only keys and values are computed; random weights, a small vocabulary.
Each size is calibrated once, on recorded latents. Each build is held to `WANTED` and to what `problems` says; with a
miss the script exits with 1. A recipe that a target does not run must be refused with the reason. Into a file that is
there a run writes its own rows, beside those of others.
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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import cosmos_export.compiler.stages as stages
from cosmos_export.compiler.artifacts import Engine
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.losses import Losses
from cosmos_export.diagnostics import CosmosExportError, UnsupportedError
from cosmos_export.ir.program import Program
from cosmos_export.options import BuildOptions
from cosmos_export.precision.recipe import load_recipe, recipe_names, refusal
from cosmos_export.targets import load_target

PROFILE = "480p-121f,sound_len=0,action_len=0"
FIXED = "480p-121f,und_len=512,frames=31,height=30,width=52,sound_len=0,action_len=0"
"""FP8 attention fuses only over a number of keys that is known."""
NARROW = 0.99
"""Share of the layers' weights in a quantized tower that is to be multiplied in 8 or 4 bit."""


@dataclass(frozen=True)
class Wanted:
    """Required contents of the plans of a recipe's engines: the types of the products in layers, and of attention."""

    reasoner: frozenset[str]
    generator: frozenset[str]
    """Schemes of the body that most steps use."""
    attention: str = "bf16"


WANTED = {
    "bf16": Wanted(frozenset(), frozenset()),
    "fp8": Wanted(frozenset({"fp8-weight"}), frozenset({"fp8"})),
    "fp8-attention": Wanted(frozenset({"fp8-weight"}), frozenset({"fp8"}), "fp8"),
    "memory": Wanted(frozenset({"int4-weight"}), frozenset({"fp8"})),
    "fp4": Wanted(frozenset({"fp8-weight"}), frozenset({"fp8", "nvfp4"})),
    "int4": Wanted(frozenset({"int4-weight"}), frozenset({"int4-weight"})),
}
"""Beside bf16, in which heads are multiplied in every engine."""


def problems(recipe: str, engines: list[dict[str, Any]]) -> Iterator[str]:
    """Differences of the ``engines`` of a build, as `described`, from what is wanted."""
    wanted = WANTED[recipe]
    for engine in (engine for engine in engines if engine["attention"]):
        name, kinds = engine["graph"], frozenset(engine["gemms"]) - {"bf16"}
        mixed = name not in ("reasoner", "generator")  # a body for the first and the last steps
        types = wanted.reasoner if name == "reasoner" else frozenset({"fp8-weight"}) if mixed else wanted.generator
        attends = "bf16" if mixed or name == "reasoner" else wanted.attention
        if kinds != types:
            yield f"{name}: products in {', '.join(kinds) or 'bf16'}, not {', '.join(types) or 'bf16'}"
        if types and engine["narrow_share"] < NARROW:
            yield f"{name}: {engine['narrow_share']:.1%} of the layers' weights in 8 or 4 bit"
        if engine["dequantize_kernels"]:
            yield f"{name}: whole weights are widened by {', '.join(engine['dequantize_kernels'])}"
        if engine["fused_attention"] != engine["attention"]:
            yield f"{name}: {engine['fused_attention']} of {engine['attention']} attentions fused"
        if engine["attention_types"] != [attends]:
            yield f"{name}: attention in {', '.join(engine['attention_types'])}, not {attends}"
        if not engine["check"]["passed"]:
            yield f"{name}: {engine['check']['found']}"


def prepare(size: str, layers: int, work: Path) -> tuple[Path, Path]:
    """A checkpoint of ``layers`` layers of a published width, and its scale table."""
    from safetensors.numpy import save_file

    checkpoint, scales, latents = work / size, work / f"{size}-scales", work / f"{size}.safetensors"
    command(
        "demo-checkpoint", "--true-width", size, "--layers",
        str(layers), "--vocab", "1024", "--dtype", "bfloat16", "-o", str(checkpoint),
    )  # fmt: skip
    random = np.random.default_rng(0)
    save_file({"vision": random.standard_normal((1, 48, 3, 12, 20), np.float32)}, latents)
    command(
        "calibrate", str(checkpoint), "--data", f"{latents},prompt=A robot folds a towel.", "-o", str(scales),
        "--modalities", "vision", "--samples", "8", "--steps", "8",
    )  # fmt: skip
    return checkpoint, scales


def row(size: str, checkpoint: Path, scales: Path, target: str, recipe: str, work: Path) -> dict[str, Any]:
    """One build, and what is wrong with it."""
    schemes = load_recipe(recipe).schemes
    reasons = [reason for scheme in schemes if (reason := refusal(scheme, load_target(target)))]
    found: dict[str, Any] = {"size": size, "target": target, "recipe": recipe}
    options = BuildOptions(
        checkpoint,
        work / "bundle",
        target=target,
        profiles=(FIXED if "fp8-attention" in schemes else PROFILE,),
        modalities=("vision",),
        components=("none",),
        recipe=recipe,
        calibration=scales if set(schemes) - {"int4"} else None,
        quality="report",
        parity="never",
    )
    start = time.perf_counter()
    try:
        result = build(options)
    except CosmosExportError as error:
        right = isinstance(error, UnsupportedError) and any(reason in error.message for reason in reasons)
        if right:
            return found | {"refused": reasons[0], "problems": []}
        return found | {"problems": [f"{error.code}: {error.message}"]}
    finally:
        shutil.rmtree(work / "bundle", ignore_errors=True)
    found["seconds"] = round(time.perf_counter() - start, 1)
    if reasons:
        return found | {"problems": [f"built, and was to be refused: {reasons[0]}"]}
    engines = [described(engine) for engine in result.engines]
    peak = round(result.costs.peak_resident_bytes / 1e9, 2)
    return found | {"engines": engines, "peak_gb": peak, "problems": list(problems(recipe, engines))}


def described(engine: Engine) -> dict[str, Any]:
    """Contents of one engine."""
    graphs = engine.graphs
    return {
        "graph": engine.graph,
        "gemms": dict(graphs[0].gemm_types()) if graphs else {},
        "narrow_share": round(engine.narrow_share, 4),
        "attention": engine.attention,
        "fused_attention": engine.fused_attention,
        "attention_types": sorted({a.type for graph in graphs for a in graph.attention}),
        "dequantize_kernels": sorted({name for graph in graphs for name in graph.dequantize}),
        "size_bytes": engine.report.size_bytes,
        "build_s": round(engine.report.build_s, 2),
        "check": {"expected": engine.check.expected, "found": engine.check.found, "passed": engine.check.passed},
    }


def share_what_targets_share() -> None:
    """Builds of this process share captures, and what a recipe loses: neither depends on the target."""
    captures: dict[str, Program] = {}
    losses: dict[tuple[Any, ...], Losses] = {}
    capture, measure = stages.capture, stages.measure_losses

    def remembered(config: Any, sources: Any, **options: Any) -> Program:
        key = str(next(iter(sources.values())).file)
        if key not in captures:
            captures[key] = capture(config, sources, **options)
        return captures[key].copy()

    def measured(plain: Program, job: Job, *arguments: Any, **options: Any) -> Losses:
        key = (job.checkpoint.root, *job.precision.table().items())
        if key not in losses:
            losses[key] = measure(plain, job, *arguments, **options)
        return losses[key]

    stages.capture, stages.measure_losses = remembered, measured


def command(*arguments: str) -> None:
    """One cosmos-export command, which must succeed."""
    finished = subprocess.run(
        [sys.executable, "-m", "cosmos_export", *arguments, "--quiet"], capture_output=True, text=True
    )
    if finished.returncode:
        sys.exit(f"{' '.join(arguments)} failed: {finished.stderr}")


HEADER = (
    "| size | target | recipe | reasoner | generator | other steps | narrow | fused attention | engines | seconds |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"| {found['size']} | {found['target']} | {found['recipe']} |"
    if found["problems"]:
        return f"{start} {'; '.join(found['problems'])} |"
    if "refused" in found:
        return f"{start} refused: {found['refused']} | | | | | | |"
    engines = {engine["graph"]: engine for engine in found["engines"]}
    cells = [_products(engines.get(name)) for name in ("reasoner", "generator", "generator_2")]
    attending = [engine for engine in engines.values() if engine["attention"]]
    share = min(engine["narrow_share"] for engine in attending if engine["graph"] != "reasoner")
    fused = sum(engine["fused_attention"] for engine in attending)
    kinds = " and ".join(sorted({kind for engine in attending for kind in engine["attention_types"]}))
    size = sum(engine["size_bytes"] for engine in found["engines"]) / 1e6
    return f"{start} {' | '.join(cells)} | {share:.1%} | {fused} ({kinds}) | {size:.0f} MB | {found['seconds']:.0f} |"


def _products(engine: dict[str, Any] | None) -> str:
    if engine is None:
        return "–"
    return ", ".join(f"{count} {kind}" for kind, count in sorted(engine["gemms"].items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="edge,nano")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--targets", default="rtx-pro-6000,l40s,dgx-spark")
    parser.add_argument("--recipes", default=",".join(WANTED))
    parser.add_argument("--work", type=Path, help="directory for checkpoints and bundles (default: temporary)")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    assert set(WANTED) == set(recipe_names())
    share_what_targets_share()
    rows = known_rows(arguments.output)
    print(HEADER)
    for size in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            checkpoint, scales = prepare(size, arguments.layers, Path(folder))
            for target in arguments.targets.split(","):
                for recipe in arguments.recipes.split(","):
                    found = row(size, checkpoint, scales, target, recipe, Path(folder))
                    rows[size, target, recipe] = {"layers": arguments.layers, **found}
                    print(line(found), flush=True)
                    write(arguments.output, rows)
    return 1 if any(one["problems"] for one in rows.values()) else 0


Rows = dict[tuple[str, str, str], dict[str, Any]]


def known_rows(path: Path | None) -> Rows:
    """Rows of an earlier run into the same file; those that are measured again are replaced."""
    if path is None or not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(one["size"], one["target"], one["recipe"]): one for one in rows}


def write(path: Path | None, rows: Rows) -> None:
    if path is None:
        return
    document = {
        "benchmark": "recipes",
        "command": "python benchmarks/recipes.py -o benchmarks/results/recipes.json",
        "machine": {"cores": os.cpu_count()},
        "versions": {n: metadata.version(n) for n in ("cosmos-export", "torch", "diffusers", "tensorrt-rtx-cu13")},
        "weights": "random",
        "profiles": {"fp8-attention": FIXED, "others": PROFILE},
        "rows": list(rows.values()),
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
