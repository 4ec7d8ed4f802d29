"""The tables that drive a closed loop, and the inputs and outputs of its model.

Steps with and without the unconditional branch have different bodies. A schedule that has both is a chain of loops, one
a segment, that hand the sampler's state on.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from cosmos_export.compiler.time_table import schedule_table, timesteps
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import Weights
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.passes.fold_schedule import TIME_EMBEDDING
from cosmos_export.passes.sampler import COEFFICIENTS
from cosmos_export.sampling import Schedule, coefficient_table

LOOP_TABLES = (TIME_EMBEDDING, COEFFICIENTS)


def loop_tables(closed: Program, schedule: Schedule, weights: Weights) -> dict[str, np.ndarray]:
    """The closed loop's time embeddings and coefficients at its own steps of the schedule, [steps, …], in float32.

    A model that computes in a narrower type rounds them once, as the stock model rounds its time embedding.
    """
    span = closed.loop.span
    table = schedule_table(closed, timesteps(schedule)[span], weights, compute=torch.float32)
    rows = {name: row.numpy()[:, None, :] for name, row in table.items()}
    return {**rows, COEFFICIENTS: coefficient_table(schedule)[span].astype(np.float32)}


def loop_inputs(closed: Program, tables: Collection[str]) -> dict[str, TensorSpec]:
    """Inputs of the model of a closed loop with ``tables`` inside, by name.

    Of the carried state what the loop takes; a step input that is in no table (noise) for all its steps, [steps, …].
    """
    body, loop = closed.graphs[closed.loop.body], closed.loop
    found = {}
    for name, node in body.inputs.items():
        spec = spec_of(node)
        if name in tables or (name in loop.carried and name not in loop.taken):
            continue
        found[name] = TensorSpec(spec.dtype, (loop.steps or 0, *spec.shape)) if name in loop.rows else spec
    return found


def loop_outputs(closed: Program) -> dict[str, TensorSpec]:
    """Outputs of that model, by name."""
    body = closed.graphs[closed.loop.body]
    return {f"{name}_final": spec_of(body.inputs[name]) for name in closed.loop.returned}
