"""The schedule a checkpoint is sampled with, and the table of time embeddings at its timesteps.

What a checkpoint is asked for is checked with the first before torch is imported for the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from cosmos_export.bundle import BundleWriter
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.plan.subject import sampling_of
from cosmos_export.runtime.schedule_table import SCHEDULE_TABLE
from cosmos_export.sampling import DEFAULT_MODE, Overrides, Schedule, coefficient_table, resolve_schedule

if TYPE_CHECKING:
    import torch

    from cosmos_export.ir.interpreter import Weights
    from cosmos_export.ir.program import Program


def checkpoint_schedule(
    checkpoint: Checkpoint, mode: str = DEFAULT_MODE, overrides: Overrides | None = None
) -> Schedule:
    """The schedule of a request of ``mode``; UserError CX46x for what the checkpoint cannot be sampled with."""
    return resolve_schedule(sampling_of(checkpoint), mode, overrides)


def timesteps(schedule: Schedule) -> torch.Tensor:
    """float32 [steps] timesteps in the order of sampling, as the time embedder takes them."""
    import torch

    return torch.tensor(schedule.timesteps, dtype=torch.float32)


def schedule_table(
    program: Program, steps: torch.Tensor, weights: Weights, *, compute: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The schedule graph's results at every timestep, stacked: ``time_embedding`` [steps, hidden].

    In the model's type; ``compute`` replaces bfloat16, for a model that computes in fp32.
    """
    import torch

    from cosmos_export.ir.interpreter import run_graph
    from cosmos_export.passes.fold_schedule import SCHEDULE

    graph = program.graphs[SCHEDULE]
    (name,) = graph.inputs
    with _one_thread():
        rows = [run_graph(graph, {name: step.reshape(1)}, weights, compute=compute) for step in steps]
    return {output: torch.cat([row[output] for row in rows]) for output in graph.outputs}


def write_schedule_table(program: Program, schedule: Schedule, weights: Weights, writer: BundleWriter) -> None:
    """The bundle's table of ``schedule``: timesteps, the sampler's coefficients and time embeddings, [steps, …]."""
    import torch
    from safetensors.torch import save

    steps = timesteps(schedule)
    coefficients = torch.from_numpy(coefficient_table(schedule).astype(np.float32))
    table = {"timesteps": steps, "coefficients": coefficients, **schedule_table(program, steps, weights)}
    writer.path(SCHEDULE_TABLE, "table").write_bytes(save(table))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The table is part of the bundle, and the order of sums may follow the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
