"""Predictions beside every published time: the roofline is right on the whole, and nothing in it knows a cell."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cosmos_export.plan.latency import Habits
from cosmos_export.targets import load_target

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import published  # noqa: E402

# The table that predictions are held to; others are shown beside them.
GPUS = ("h100", "h200", "b200", "rtx-pro-6000")
MODELS = ("nano", "super")


def errors(**only: tuple[str, ...]) -> list[float]:
    return [
        abs(published.error(cell, found))
        for cell, found in published.compare()
        if found is not None and all(getattr(cell, name) in allowed for name, allowed in only.items())
    ]


def test_the_median_error_is_within_15_percent() -> None:
    own = errors(gpu=GPUS, model=MODELS)
    assert len(own) >= 120
    assert statistics.median(own) <= 0.15


@pytest.mark.parametrize("engine", ["vllm-omni", "nim", "pytorch", "diffusers"])
def test_so_it_is_for_each_engine(engine: str) -> None:
    assert statistics.median(errors(engine=(engine,))) <= 0.15


@pytest.mark.parametrize("step_cache", ["none", "inferred"])
def test_with_and_without_step_caching(step_cache: str) -> None:
    assert statistics.median(errors(step_cache=(step_cache,))) <= 0.15


def test_every_cell_has_a_prediction_where_the_gpu_has_a_rate() -> None:
    missing = {cell.gpu for cell, found in published.compare() if found is None}
    assert missing == {"dgx-spark"}
    assert "bf16" not in load_target("dgx-spark").peak_flops


def test_nothing_is_fitted_to_a_cell() -> None:
    """What may differ between cells is said of engines, of step caching and of workloads, by name."""
    data = json.loads((BENCHMARKS.parent / "cosmos_export/bench/published.json").read_text())
    assert set(data["rows"][0]) == {"model", "recipe", "engine", "step_cache", "workloads", "seconds"}
    assert all(set(row) == set(data["rows"][0]) for row in data["rows"])
    known = {field.name for field in fields(Habits)}
    assert all(set(engine["habits"]) <= known for engine in data["engines"].values())
    assert all(set(entry["overrides"]) <= {"steps", "guidance", "grid", "shift", "guidance_interval"}
               for entry in data["workloads"].values())  # fmt: skip


@pytest.mark.parametrize("gpu", ["h100", "rtx-pro-6000"])
def test_the_targets_have_the_efficiencies_that_the_fit_gives(gpu: str) -> None:
    efficiency = load_target(gpu).efficiency
    assert efficiency is not None
    assert published.fit(gpu) == (efficiency.linear, efficiency.attention)
    assert efficiency.codec == published.CODEC
