"""Sampling as data and arithmetic: schedules, coefficient tables and the steps they drive. Needs numpy only."""

from cosmos_export.sampling.modes import DEFAULT_MODE, MODES, Mode
from cosmos_export.sampling.schedule import (
    GRIDS,
    CheckpointSampling,
    Grid,
    Overrides,
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
