"""Samples along the model's own trajectories: the whole loop, with the whole model in memory. For small models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cosmos_export.bundle import RequestRecord
from cosmos_export.calibration.noised_inputs import Latents, step_inputs
from cosmos_export.capture.adapter import JointStep
from cosmos_export.runtime.request import Request
from cosmos_export.runtime.step_inputs import Noise, initial_latents, noisy, request_inputs, sizes
from cosmos_export.sampling import SolverState, coefficient_table, distilled_step, guide, unipc_step

Velocity = dict[str, NDArray[np.float32]]


class Rollout:
    """The stock transformer in ``folder``, in ``dtype``, and its sampler in numpy."""

    def __init__(self, folder: Path, dtype: torch.dtype, record: RequestRecord) -> None:
        from diffusers import Cosmos3OmniTransformer
        from diffusers.utils import logging

        logging.set_verbosity_error()
        model = Cosmos3OmniTransformer.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, disable_mmap=True
        ).eval()
        self._step, self._dtype, self._record = JointStep(model), dtype, record

    def __call__(self, request: Request, steps: Collection[int]) -> dict[int, Latents]:
        """The samples, float32 by modality, that enter each of ``steps``."""
        shapes = sizes(request, self._record)
        inputs = request_inputs(request, self._record, shapes)
        noise = Noise(request, shapes)
        samples = initial_latents(request, noise, inputs, None)
        rows = {name for name, value in samples.items() if value.size}
        states = {name: SolverState.start(value) for name, value in samples.items() if name in rows}
        stochastic = request.schedule.sampler == "distilled-sde"
        fresh = noise.steps(request.schedule.steps) if stochastic else {}
        found: dict[int, Latents] = {}
        for step, row in enumerate(coefficient_table(request.schedule)):
            current = {name: state.sample for name, state in states.items()}
            if step in steps:
                found[step] = current
            if len(found) == len(steps):
                break
            velocity = self._velocity(request, current, step)
            for name, state in states.items():
                mask = noisy(name, inputs)
                if stochastic:
                    sample = distilled_step(row, state.sample, velocity[name], fresh[name][step], mask)
                    states[name] = SolverState.start(sample)
                else:
                    states[name] = unipc_step(row, state, velocity[name], mask)
        return found

    def _velocity(self, request: Request, samples: Latents, step: int) -> Velocity:
        cond = self._run(request, samples, step, uncond=False)
        if not request.schedule.guided[step]:
            return cond
        uncond = self._run(request, samples, step, uncond=True)
        return {name: guide(cond[name], uncond[name], request.schedule.guidance) for name in cond}

    def _run(self, request: Request, samples: Latents, step: int, *, uncond: bool) -> Velocity:
        inputs = step_inputs(request, self._record, samples, step, uncond=uncond, dtype=self._dtype)
        with torch.no_grad():
            out: Mapping[str, torch.Tensor] = self._step(**inputs)
        return {name.removesuffix("_velocity"): value.float().numpy() for name, value in out.items()}
