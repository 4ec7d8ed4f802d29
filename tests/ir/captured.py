"""Captures for tests that are not about capture: the same graphs for every worker and every run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cosmos_export.capture.model import available_modalities
from cosmos_export.compiler.cache import default_graphs_folder
from cosmos_export.compiler.captures import capture
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightSource


def captured(
    config: Mapping[str, Any], sources: Mapping[str, WeightSource], modalities: Collection[str] | None = None
) -> Program:
    wanted = available_modalities(config) if modalities is None else modalities
    return capture(config, sources, modalities=wanted, graphs=default_graphs_folder())
