"""The timesteps a checkpoint's own sampler visits, and the table of time embeddings at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.diagnostics import UserError
from cosmos_export.ir.interpreter import Weights, run_graph
from cosmos_export.ir.program import Program
from cosmos_export.passes.fold_schedule import SCHEDULE

TRAINING_STEPS = 1000
DEFAULT_STEPS = 35


def timesteps(checkpoint: Checkpoint, steps: int | None) -> torch.Tensor:
    """float32 [steps] timesteps in the order of sampling.

    A distilled checkpoint has its own fixed steps (its sigmas × 1000). Otherwise diffusers' scheduler, configured by the
    checkpoint, decides; ``use_native_flow_schedule`` selects the uniform grid that its pipeline passes in.
    Raises UserError (CX411) for a step count the checkpoint does not sample with.
    """
    if checkpoint.distilled_sigmas is not None:
        fixed = torch.tensor(checkpoint.distilled_sigmas, dtype=torch.float64) * TRAINING_STEPS
        if steps not in (None, len(fixed)):
            raise UserError(
                "CX411",
                f"{steps} steps asked for; this distilled checkpoint samples with {len(fixed)}",
                f"leave --steps out or pass --steps {len(fixed)}",
            )
        return fixed.to(torch.float32)
    count = DEFAULT_STEPS if steps is None else steps
    if not 1 <= count <= TRAINING_STEPS:
        raise UserError("CX411", f"{count} steps asked for; allowed are 1 to {TRAINING_STEPS}", "35 is the published default")
    scheduler = _scheduler(checkpoint.scheduler)
    if checkpoint.model_index.get("use_native_flow_schedule"):
        sigmas = np.linspace(1.0 - 1.0 / scheduler.config.num_train_timesteps, 0.0, count + 1)[:-1]
        scheduler.set_timesteps(count, sigmas=sigmas)
    else:
        scheduler.set_timesteps(count)
    return scheduler.timesteps.to(torch.float32)


def _scheduler(config: Mapping[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def schedule_table(program: Program, steps: torch.Tensor, weights: Weights) -> dict[str, torch.Tensor]:
    """The schedule graph's results at every timestep, stacked: ``time_embedding`` [steps, hidden]."""
    graph = program.graphs[SCHEDULE]
    (name,) = graph.inputs
    rows = [run_graph(graph, {name: step.reshape(1)}, weights) for step in steps]
    return {output: torch.cat([row[output] for row in rows]) for output in graph.outputs}
