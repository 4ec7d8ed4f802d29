"""The model's inputs at one step: clean latents noised to the step's σ, and everything that goes with them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from cosmos_export.bundle import RequestRecord
from cosmos_export.capture.model import input_dtype
from cosmos_export.runtime.request import Request
from cosmos_export.runtime.step_inputs import noisy, request_inputs, sizes

Latents = Mapping[str, NDArray[np.float32]]
"""float32 by modality: ``vision`` [1, C, T, h, w], ``sound`` [C, T_s], ``action`` [T_a, D]."""


def noised(request: Request, record: RequestRecord, clean: Latents, step: int, seed: int) -> Latents:
    """x = (1 − σ)·x0 + σ·ε with the σ of ``step``, where a modality is generated; given rows stay as they are.

    ε is standard normal noise of ``seed``. Without ``vision`` in ``clean`` the whole of x is noise, at every step.
    """
    sigma = np.float32(request.schedule.sigmas[step])
    random = np.random.Generator(np.random.Philox(seed))
    shapes = sizes(request, record)
    inputs = request_inputs(request, record, shapes)
    found: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        noise = random.standard_normal(shape, np.float32)
        x0 = clean.get(name)
        if x0 is None:
            x = noise
        else:
            mask = noisy(name, inputs)
            x = np.asarray((1 - sigma) * x0 + sigma * noise, dtype=np.float32)
            if mask is not None:
                x = np.where(mask > 0, x, x0)
        columns = inputs["action_columns"] if name == "action" else np.float32(1)
        found[name] = np.asarray(x * columns, dtype=np.float32)
    return found


def step_inputs(
    request: Request, record: RequestRecord, samples: Latents, step: int, *, uncond: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Arguments of `cosmos_export.capture.adapter.JointStep`. A modality without rows is left out."""
    shapes = sizes(request, record)
    ids = request.negative_ids if uncond else request.input_ids
    assert ids is not None
    values: dict[str, NDArray[np.generic]] = {
        **request_inputs(request, record, shapes),
        "input_ids": ids,
        "timestep": np.asarray([request.schedule.timesteps[step]], np.float32),
        **{f"{name}_latent": samples[name] for name, _ in shapes.items() if name in samples},
    }
    del_columns = {"action_columns"}
    empty = {name for name, shape in shapes.items() if 0 in shape}
    return {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(input_dtype(name, dtype))
        for name, value in values.items()
        if name not in del_columns and name.split("_")[0] not in empty
    }
