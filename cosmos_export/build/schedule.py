"""The schedule a checkpoint is sampled with, and the table of time embeddings at its timesteps."""

from __future__ import annotations

import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.ir.interpreter import Weights, run_graph
from cosmos_export.ir.program import Program
from cosmos_export.passes.fold_schedule import SCHEDULE
from cosmos_export.sampling import CheckpointSampling, Overrides, Schedule, resolve_schedule

DEFAULT_MODE = "t2v"


def sampling(checkpoint: Checkpoint) -> CheckpointSampling:
    """What ``checkpoint`` says of its sampling."""
    policy = (checkpoint.policy or {}).get("domain_name")
    return CheckpointSampling(
        scheduler=checkpoint.scheduler,
        native=bool(checkpoint.model_index.get("use_native_flow_schedule")),
        distilled_sigmas=checkpoint.distilled_sigmas,
        edge=not checkpoint.geometry.gated,
        policy=None if policy is None else str(policy),
    )


def schedule(checkpoint: Checkpoint, mode: str = DEFAULT_MODE, overrides: Overrides | None = None) -> Schedule:
    """The schedule of a request of ``mode``; UserError CX46x for what the checkpoint cannot be sampled with."""
    return resolve_schedule(sampling(checkpoint), mode, overrides)


def timesteps(checkpoint: Checkpoint, steps: int | None) -> torch.Tensor:
    """float32 [steps] timesteps in the order of sampling, as the checkpoint's own grid has them.

    Raises UserError (CX460) for a step count the checkpoint does not sample with.
    """
    resolved = schedule(checkpoint, overrides=Overrides(steps=steps))
    return torch.tensor(resolved.timesteps, dtype=torch.float32)


def schedule_table(program: Program, steps: torch.Tensor, weights: Weights) -> dict[str, torch.Tensor]:
    """The schedule graph's results at every timestep, stacked: ``time_embedding`` [steps, hidden]."""
    graph = program.graphs[SCHEDULE]
    (name,) = graph.inputs
    rows = [run_graph(graph, {name: step.reshape(1)}, weights) for step in steps]
    return {output: torch.cat([row[output] for row in rows]) for output in graph.outputs}
