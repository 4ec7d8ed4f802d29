"""The loop closed for a schedule: guidance and sampler in the generator's graph, and the tables that drive it."""

from __future__ import annotations

import numpy as np
import torch

from cosmos_export.build.schedule import schedule_table
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.ir.interpreter import Weights
from cosmos_export.ir.program import Program
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.batch_guidance import BatchGuidance
from cosmos_export.passes.fuse_denoise_loop import FuseDenoiseLoop
from cosmos_export.passes.sampler import COEFFICIENTS
from cosmos_export.sampling import Schedule, coefficient_table


def require_one_body(schedule: Schedule) -> None:
    """Raise UnsupportedError (CX223) for a schedule whose loop needs more than one body."""
    if len(set(schedule.guided)) > 1:
        raise UnsupportedError(
            "CX223",
            f"{sum(schedule.guided)} of {schedule.steps} steps are guided (guidance interval "
            f"{schedule.guidance_interval}); a loop in one graph has one body",
            "pass `--guidance-interval 0:1000` to guide every step, or `--loop host`",
        )


def close_loop(program: Program, schedule: Schedule) -> Program:
    """A copy of ``program`` whose loop runs by itself, verified."""
    closed = program.copy()
    for step in ([BatchGuidance()] if schedule.guided[0] else []) + [FuseDenoiseLoop(schedule)]:
        step.run(closed)
        closed.history.append(step.name)
        verify(closed, stage=step.name)
    return closed


def loop_tables(closed: Program, schedule: Schedule, weights: Weights) -> dict[str, np.ndarray]:
    """The closed loop's step inputs at every step, [steps, …], in float32: time embeddings and coefficients."""
    steps = torch.tensor(schedule.timesteps, dtype=torch.float32)
    rows = {name: row.float().numpy()[:, None, :] for name, row in schedule_table(closed, steps, weights).items()}
    return {**rows, COEFFICIENTS: coefficient_table(schedule).astype(np.float32)}
