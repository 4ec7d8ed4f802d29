"""The published times that a measurement stands beside, from ``published.json``. None was reproduced here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class PublishedCell:
    """One published number, of the same model and workload as a measurement."""

    engine: str
    recipe: str
    gpu: str
    seconds: float
    measures: str
    """The parts of a request that the number covers."""
    step_cache: str
    """``none``, or how steps were left out."""


@cache
def document() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((files("cosmos_export.bench") / "published.json").read_text(encoding="utf-8"))
    return data


def published_cells(model: str, workload: str, gpu: str | None = None) -> Iterator[PublishedCell]:
    """Cells of ``model`` and ``workload`` (``t2v-480p-189f``), of one GPU (a target's name) where it is given."""
    data = document()
    names = {name for name, entry in data["workloads"].items() if entry["workload"] == workload}
    for row in data["rows"]:
        if row["model"] != model:
            continue
        for where, values in row["seconds"].items():
            for name, value in zip(row["workloads"], values, strict=True):
                if name in names and value is not None and gpu in (None, where):
                    engine = data["engines"][row["engine"]]
                    yield PublishedCell(
                        row["engine"], row["recipe"], where, float(value), engine["measures"], row["step_cache"]
                    )


def target_of(card: str) -> str | None:
    """The target that a card of this name is: ``NVIDIA H100 80GB HBM3`` → ``h100``."""
    words = card.lower().replace("-", " ").split()
    known = {"h100": "h100", "h200": "h200", "b200": "b200", "b300": "b300", "thor": "jetson-thor", "gb10": "dgx-spark"}
    if {"rtx", "pro", "6000"} <= set(words):
        return "rtx-pro-6000"
    return next((target for word, target in known.items() if word in words), None)
