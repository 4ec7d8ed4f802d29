"""The published schedulers, and this project's schedules for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from cosmos_export.family import Family
from cosmos_export.sampling import CheckpointSampling, Overrides, Schedule, resolve_schedule

STEPS = (1, 2, 4, 20, 35, 50)
SIGMAS = (1.0, 0.9375, 0.8333333333333334, 0.625)
KARRAS = {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "use_karras_sigmas": True,
    "sigma_max": 200.0,
    "sigma_min": 0.147,
}
DISTILLED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "stochastic_sampling": True,
    "shift": 1.0,
    "num_train_timesteps": 1000,
    "use_karras_sigmas": False,
    "use_dynamic_shifting": False,
}


def flow(shift: float) -> dict[str, Any]:
    plain = {key: value for key, value in KARRAS.items() if key not in ("use_karras_sigmas", "sigma_max", "sigma_min")}
    return plain | {"flow_shift": shift}


def checkpoint(config: dict[str, Any], *, native: bool = False, **facts: Any) -> CheckpointSampling:
    return CheckpointSampling(scheduler=config, native=native, **facts)


NANO = checkpoint(KARRAS)
EDGE = checkpoint(flow(3.0), native=True, family=Family.EDGE)
FOUR_STEP = checkpoint(DISTILLED, distilled_sigmas=SIGMAS)

GRID_CASES = {
    "karras": NANO,
    "flow-3": checkpoint(flow(3.0)),
    "flow-10": checkpoint(flow(10.0)),
    "native-3": EDGE,
    "native-5": checkpoint(flow(5.0), native=True),
    "native-10": checkpoint(flow(10.0), native=True),
}
"""Every grid, at the shifts that engines use, as a checkpoint's own."""


def schedule(checkpoint: CheckpointSampling, steps: int, mode: str = "t2v", **overrides: Any) -> Schedule:
    return resolve_schedule(checkpoint, mode, Overrides(steps=steps, **overrides))


def published(checkpoint: CheckpointSampling, steps: int) -> Any:
    """diffusers' scheduler, its timesteps set as its pipeline does."""
    config = dict(checkpoint.scheduler)
    if checkpoint.distilled_sigmas is not None:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(sigmas=list(checkpoint.distilled_sigmas))
        return scheduler
    scheduler = UniPCMultistepScheduler.from_config(config)
    sigmas = np.linspace(1.0 - 1.0 / scheduler.config.num_train_timesteps, 0.0, steps + 1)[:-1]
    scheduler.set_timesteps(steps, **({"sigmas": sigmas} if checkpoint.native else {}))
    return scheduler
