"""Sampling as data and arithmetic: schedules, coefficient tables and the steps they drive. Needs numpy only.

The arithmetic is imported when it is first asked for, so that help can list the modes without numpy.
"""

from typing import TYPE_CHECKING, Any

from cosmos_export.sampling.modes import DEFAULT_MODE, MODES, Mode

if TYPE_CHECKING:
    from cosmos_export.options import Overrides
    from cosmos_export.sampling.schedule import (
        GRIDS,
        CheckpointSampling,
        Grid,
        Sampler,
        Schedule,
        Segment,
        resolve_schedule,
    )
    from cosmos_export.sampling.solvers import (
        COLUMNS,
        SolverState,
        coefficient_table,
        distilled_step,
        distilled_table,
        guide,
        unipc_step,
        unipc_table,
    )

__all__ = [
    "COLUMNS",
    "DEFAULT_MODE",
    "GRIDS",
    "MODES",
    "CheckpointSampling",
    "Grid",
    "Mode",
    "Overrides",
    "Sampler",
    "Schedule",
    "Segment",
    "SolverState",
    "coefficient_table",
    "distilled_step",
    "distilled_table",
    "guide",
    "resolve_schedule",
    "unipc_step",
    "unipc_table",
]

_SCHEDULE = ("GRIDS", "CheckpointSampling", "Grid", "Overrides", "Sampler", "Schedule", "Segment", "resolve_schedule")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'schedule' if name in _SCHEDULE else 'solvers'}"), name)
