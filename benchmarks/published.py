"""Predicted beside published: seconds of one request on one GPU, for every cell of `published.json`.

    python benchmarks/published.py            # the comparison, as a table
    python benchmarks/published.py --fit      # the efficiencies that the targets should have
    python benchmarks/published.py -o benchmarks/results/published.json

A prediction is `plan`'s own, with the habits of the engine that the cell is of. There are two fitted numbers for each
GPU, the efficiencies of linears and of attention; nothing depends on a cell.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cosmos_export.bench.published as published_cells
from cosmos_export.plan import Subject, Workload, parse_workload, precision, published_subject
from cosmos_export.plan.latency import Habits, Latency, latency
from cosmos_export.precision.recipe import load_recipe
from cosmos_export.sampling import Overrides, Schedule, resolve_schedule
from cosmos_export.targets import Target, load_target
from cosmos_export.targets.description import Efficiency

PUBLISHED = Path(published_cells.__file__).with_name("published.json")
CODEC = 0.38
"""Not fitted: decoding 189 frames at 720p took 8.45 s on an H200 (tenstorrent/tt-metal issue 50458), 380 TFLOP/s."""
_GRID = 100


@dataclass(frozen=True)
class Cell:
    """One published number."""

    model: str
    recipe: str
    engine: str
    workload: str
    gpu: str
    step_cache: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.model} {self.recipe} {self.engine} {self.workload} {self.gpu}"


@cache
def document() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return data


def cells() -> Iterator[Cell]:
    """Every cell, in the order of the file."""
    for row in document()["rows"]:
        for gpu, seconds in row["seconds"].items():
            for workload, value in zip(row["workloads"], seconds, strict=True):
                if value is not None:
                    yield Cell(
                        row["model"], row["recipe"], row["engine"], workload, gpu, row["step_cache"], float(value)
                    )


def habits(cell: Cell) -> Habits:
    """Work that the engine of ``cell`` does besides a prediction's, and work that it leaves out."""
    data = document()
    share = data["step_cache"][cell.step_cache]["computed_steps"]
    return Habits(**data["engines"][cell.engine]["habits"], computed_steps=share)


@cache
def _case(model: str, workload: str) -> tuple[Subject, Workload, Schedule]:
    entry = document()["workloads"][workload]
    subject, parsed = published_subject(model), parse_workload(entry["workload"])
    asked: Mapping[str, Any] = entry["overrides"]
    if "guidance_interval" in asked:
        asked = {**asked, "guidance_interval": tuple(asked["guidance_interval"])}
    return subject, parsed, resolve_schedule(subject.sampling, parsed.mode, Overrides(**asked))


def predict(cell: Cell, target: Target | None = None) -> Latency | None:
    """The prediction for ``cell``; None where the target has no rate or no efficiency."""
    subject, workload, schedule = _case(cell.model, cell.workload)
    on = target or load_target(cell.gpu)
    chosen = precision(load_recipe(cell.recipe), (), on, subject.geometry, schedule.steps)
    return latency(subject, workload, schedule, chosen, on, habits(cell))


def fit(gpu: str) -> tuple[float, float]:
    """Efficiencies of linears and attention: least mean |log(predicted / published)| over the cells of ``gpu``."""
    target, own = load_target(gpu), [cell for cell in cells() if cell.gpu == gpu]

    def loss(linear: float, attention: float) -> float:
        tried = replace(target, efficiency=Efficiency(linear, attention, CODEC, "tried"))
        found = [predict(cell, tried) for cell in own]
        return statistics.fmean(
            abs(math.log(p.total_s / cell.seconds)) for cell, p in zip(own, found, strict=True) if p is not None
        )

    best, step = (0.6, 0.6), 16
    while step:
        tries = [(best[0] + i * step / _GRID, best[1] + j * step / _GRID) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        nearest = min((t for t in tries if min(t) >= 0.05 and max(t) <= 1), key=lambda t: loss(*t))
        step = step if nearest != best and loss(*nearest) < loss(*best) else step // 2
        best = nearest
    return round(best[0], 2), round(best[1], 2)


def compare() -> list[tuple[Cell, Latency | None]]:
    return [(cell, predict(cell)) for cell in cells()]


def error(cell: Cell, predicted: Latency) -> float:
    """Relative error of the prediction."""
    return predicted.total_s / cell.seconds - 1


def median_error(rows: list[tuple[Cell, Latency | None]]) -> float:
    return statistics.median(abs(error(cell, found)) for cell, found in rows if found is not None)


def _print(rows: list[tuple[Cell, Latency | None]]) -> None:
    print("| model | recipe | engine | workload | GPU | step cache | published | predicted | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cell, found in rows:
        told = f"{found.total_s:.2f} s | {error(cell, found):+.0%}" if found else "– | –"
        print(f"| {cell.model} | {cell.recipe} | {cell.engine} | {cell.workload} | {cell.gpu} | {cell.step_cache} "
              f"| {cell.seconds:.2f} s | {told} |")  # fmt: skip
    print("\n| of | cells | median error |")
    print("|---|---|---|")
    groups: dict[str, list[tuple[Cell, Latency | None]]] = defaultdict(list)
    for cell, found in rows:
        if found is not None:
            for name in (cell.engine, cell.gpu, cell.model, cell.recipe, f"step cache {cell.step_cache}", "all"):
                groups[name].append((cell, found))
    for name, group in groups.items():
        print(f"| {name} | {len(group)} | {median_error(group):.1%} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="print the efficiencies the targets should have")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = compare()
    if arguments.fit:
        for gpu in dict.fromkeys(cell.gpu for cell in cells()):
            if "bf16" in load_target(gpu).peak_flops:
                linear, attention = fit(gpu)
                print(f"{gpu}: linear = {linear:.2f}, attention = {attention:.2f}, codec = {CODEC}")
        return 0
    _print(rows)
    if arguments.output:
        result = {
            "benchmark": "published",
            "command": "python benchmarks/published.py",
            "median_error": round(median_error(rows), 4),
            "rows": [
                {
                    "cell": str(cell),
                    "step_cache": cell.step_cache,
                    "published_s": cell.seconds,
                    "predicted_s": None if found is None else round(found.total_s, 3),
                    "error": None if found is None else round(error(cell, found), 4),
                }
                for cell, found in rows
            ],
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if median_error(rows) <= 0.15 else 1


if __name__ == "__main__":
    sys.exit(main())
