"""Shared fixtures: each tiny model is captured and compiled once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from captured import captured
from tiny_cosmos import BACKBONES, Compiled, random_model, sources_of_model, tiny_config, weights_of_model

from cosmos_export.ir.program import Program
from cosmos_export.passes.pipeline import Report, default_passes, run_passes

torch.set_num_threads(1)


def _compile(config: dict[str, Any]) -> Compiled:
    model = random_model(config)
    program = captured(config, sources_of_model(model))
    stages, reports = {"capture": program.copy()}, {}

    def keep(after: Program, report: Report) -> None:
        stages[report.name], reports[report.name] = after.copy(), report

    run_passes(program, default_passes(), after_each=keep)
    return Compiled(config, model, weights_of_model(model), stages, reports)


@cache
def _compile_once(key: tuple[str, tuple[tuple[str, Any], ...]]) -> Compiled:
    backbone, changes = key
    return _compile(tiny_config(backbone, **dict(changes)))


@pytest.fixture(scope="session")
def compile_tiny() -> Callable[..., Compiled]:
    """``compile_tiny(backbone, **changes)``: compiled once a session for each configuration."""
    standard = {"layers": 2}
    return lambda backbone, **changes: _compile_once(
        (backbone, tuple(sorted(item for item in changes.items() if item not in standard.items())))
    )


@pytest.fixture(scope="session", params=BACKBONES)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """Both backbones, two layers, every modality the backbone has."""
    return _compile_once((request.param, ()))


@pytest.fixture(scope="session")
def omni() -> Compiled:
    return _compile_once(("omni", ()))


@pytest.fixture(scope="session")
def edge() -> Compiled:
    return _compile_once(("edge", ()))
