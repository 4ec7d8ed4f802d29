"""The checkpoint's sampler: the scheduler's class, and the fixed sigmas of a distilled model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cosmos_export.checkpoint.config_fields import (
    Fields,
    Flag,
    Integer,
    Items,
    Kind,
    Nullable,
    Number,
    Only,
    checked,
)
from cosmos_export.checkpoint.strict_json import optional_object, read_object
from cosmos_export.diagnostics import UserError, shown

_positive = Number(1.0, 1e-9, 1e9)
_share = Number(0.0, 0, 1)


def _one_of(default: str, *others: str) -> Kind:
    return Only(default, (default, *others))


SCHEDULERS: Mapping[str, Fields] = MappingProxyType(
    {
        "UniPCMultistepScheduler": {
            "num_train_timesteps": Integer(1000, 1, 100_000),
            "beta_start": Number(0.0001, 0, 1),
            "beta_end": Number(0.02, 0, 1),
            "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
            "trained_betas": Nullable(None, Items(None, _share, 1, 100_000)),
            "solver_order": Integer(2, 1, 3),
            "prediction_type": _one_of("epsilon", "sample", "v_prediction", "flow_prediction"),
            "thresholding": Flag(False),
            "dynamic_thresholding_ratio": Number(0.995, 0, 1),
            "sample_max_value": Number(1.0, 0, 1e9),
            "predict_x0": Flag(True),
            "solver_type": _one_of("bh2", "bh1"),
            "lower_order_final": Flag(True),
            "disable_corrector": Items([], Integer(0, 0, 100_000), 0, 100_000),
            "solver_p": Only(None, (None,)),
            "use_karras_sigmas": Flag(False),
            "use_exponential_sigmas": Flag(False),
            "use_beta_sigmas": Flag(False),
            "use_flow_sigmas": Flag(False),
            "flow_shift": _positive,
            "timestep_spacing": _one_of("linspace", "leading", "trailing"),
            "steps_offset": Integer(0, 0, 100_000),
            "final_sigmas_type": _one_of("zero", "sigma_min"),
            "rescale_betas_zero_snr": Flag(False),
            "use_dynamic_shifting": Flag(False),
            "time_shift_type": _one_of("exponential", "linear"),
            "sigma_min": Nullable(None, _positive),
            "sigma_max": Nullable(None, _positive),
            "shift_terminal": Nullable(None, _share),
        },
        "FlowMatchEulerDiscreteScheduler": {
            "num_train_timesteps": Integer(1000, 1, 100_000),
            "shift": _positive,
            "use_dynamic_shifting": Flag(False),
            "base_shift": Nullable(0.5, Number(0.5, -1e3, 1e3)),
            "max_shift": Nullable(1.15, Number(1.15, -1e3, 1e3)),
            "base_image_seq_len": Integer(256, 1, 10_000_000),
            "max_image_seq_len": Integer(4096, 1, 10_000_000),
            "invert_sigmas": Flag(False),
            "shift_terminal": Nullable(None, _share),
            "use_karras_sigmas": Flag(False),
            "use_exponential_sigmas": Flag(False),
            "use_beta_sigmas": Flag(False),
            "time_shift_type": _one_of("exponential", "linear"),
            "stochastic_sampling": Flag(False),
        },
    }
)
"""Fields of the schedulers that a backend samples with, as their classes have them. Which of the values are compiled is
decided where a schedule is resolved."""
_MODULAR: Fields = {"is_distilled": Nullable(None, Flag(False))}


def read_scheduler(folder: Path) -> dict[str, Any]:
    """``scheduler_config.json``; CX104 for a class that no backend samples with."""
    path = folder / "scheduler_config.json"
    scheduler = read_object(path)
    name = scheduler.get("_class_name")
    fields = SCHEDULERS.get(name) if isinstance(name, str) else None
    if fields is None:
        raise UserError(
            "CX104",
            f"{path}: scheduler {shown(name)} is not supported; known: {', '.join(SCHEDULERS)}",
            "restore the scheduler of the published repository",
        )
    checked(scheduler, {**fields, "_use_default_values": Only([], ([],))}, path)
    return scheduler


def distilled_sigmas(root: Path, scheduler: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The fixed schedule, which two files state; they must agree."""
    file = root / "modular_model_index.json"
    modular = optional_object(file) or {}
    checked(modular, _MODULAR, file)
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
