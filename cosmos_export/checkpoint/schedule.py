"""What the checkpoint says about its sampler: the scheduler's class, and the fixed sigmas of a distilled model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_export.checkpoint.strict_json import optional_object, read_object, shown
from cosmos_export.diagnostics import UserError

SCHEDULERS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


def read_scheduler(folder: Path) -> dict[str, Any]:
    """``scheduler_config.json``; CX104 for a class that no backend samples with."""
    path = folder / "scheduler_config.json"
    scheduler = read_object(path)
    if scheduler.get("_class_name") not in SCHEDULERS:
        raise UserError(
            "CX104",
            f"{path}: scheduler {shown(scheduler.get('_class_name'))} is not supported; known: {', '.join(SCHEDULERS)}",
            "restore the scheduler of the published repository",
        )
    return scheduler


def distilled_sigmas(root: Path, scheduler: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The fixed schedule, which two files state; they must agree."""
    modular = optional_object(root / "modular_model_index.json") or {}
    sampler = scheduler.get("fixed_step_sampler_config")
    stated: dict[str, tuple[float, ...]] = {}
    if modular.get("distilled_sigmas") is not None:
        stated["modular_model_index.json distilled_sigmas"] = _sigmas(modular["distilled_sigmas"])
    if sampler is not None:
        t_list = sampler.get("t_list") if isinstance(sampler, dict) else sampler
        stated["scheduler_config.json t_list"] = _sigmas(t_list)
    if len(set(stated.values())) > 1:
        both = " but ".join(f"{where} is {list(value)}" for where, value in stated.items())
        raise UserError("CX103", f"two schedules for one distilled model: {both}", "download both files again")
    if modular.get("is_distilled") and not stated:
        raise UserError(
            "CX103",
            "modular_model_index.json says is_distilled, but no file gives the distilled sigmas",
            "restore distilled_sigmas from the published repository",
        )
    return next(iter(stated.values()), None)


def _sigmas(value: Any) -> tuple[float, ...]:
    numbers = isinstance(value, list) and all(type(item) in (int, float) for item in value)
    if not numbers or not value or not all(a > b for a, b in zip([1.0 + 1e-9, *value], [*value, 0], strict=True)):
        raise UserError(
            "CX103",
            f"the distilled sigmas {shown(value)} are not numbers falling from at most 1 to above 0",
            "restore the schedule of the published repository",
        )
    return tuple(float(item) for item in value)
