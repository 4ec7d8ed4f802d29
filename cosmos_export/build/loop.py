"""The loop closed for a schedule: guidance and sampler in the generator's graph, and the tables that drive it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from cosmos_export.build.schedule import schedule_table, timesteps
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import Weights
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.base import Pass
from cosmos_export.passes.batch_guidance import BatchGuidance
from cosmos_export.passes.fold_schedule import TIME_EMBEDDING
from cosmos_export.passes.fuse_denoise_loop import LOOP, FuseDenoiseLoop
from cosmos_export.passes.sampler import COEFFICIENTS
from cosmos_export.sampling import Schedule, coefficient_table

__all__ = ["LOOP", "LOOP_TABLES", "close_loop", "loop_inputs", "loop_tables"]

LOOP_TABLES = (TIME_EMBEDDING, COEFFICIENTS)


def close_loop(program: Program, schedule: Schedule) -> Program:
    """A copy of ``program`` whose loop runs by itself, verified."""
    closed = program.copy()
    passes: list[Pass] = [BatchGuidance()] if schedule.guided[0] else []
    for step in [*passes, FuseDenoiseLoop(schedule)]:
        step.run(closed)
        closed.history.append(step.name)
        verify(closed, stage=step.name)
    return closed


def loop_tables(closed: Program, schedule: Schedule, weights: Weights) -> dict[str, np.ndarray]:
    """The closed loop's step inputs at every step, [steps, …], in float32: time embeddings and coefficients.

    A model that computes in a narrower type rounds them once, as the stock model rounds its time embedding.
    """
    table = schedule_table(closed, timesteps(schedule), weights, compute=torch.float32)
    rows = {name: row.numpy()[:, None, :] for name, row in table.items()}
    return {**rows, COEFFICIENTS: coefficient_table(schedule).astype(np.float32)}


def loop_inputs(closed: Program, tables: Collection[str]) -> dict[str, TensorSpec]:
    """What the model of a closed loop with ``tables`` inside takes, by name.

    Of the carried state the samples alone; a step input that is in no table (noise) for every step, [steps, …].
    """
    body, loop = closed.graphs[closed.loop.body], closed.loop
    found = {}
    for name, node in body.inputs.items():
        spec = spec_of(node)
        if name in tables or (name in loop.carried and not name.endswith("_sample")):
            continue
        found[name] = TensorSpec(spec.dtype, (loop.steps or 0, *spec.shape)) if name in loop.rows else spec
    return found
