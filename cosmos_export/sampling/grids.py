"""The sigma grids that engines sample Cosmos 3 on: noise levels σ of ``x = (1 − σ)·x0 + σ·ε``, falling.

Each is computed in float64 with the operations of the published scheduler in their order, so that timesteps, which are
truncated, agree for every number of steps. The final 0 is not part of a grid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TRAINING_STEPS = 1000
PUBLISHED_SIGMA_MAX = 200.0
PUBLISHED_SIGMA_MIN = 0.147
_RHO = 7.0
_MARGIN = 1e-6
"""Kept between the first σ and 1, where log(1 − σ) ends."""

Sigmas = NDArray[np.float64]


def karras(steps: int, sigma_min: float = PUBLISHED_SIGMA_MIN, sigma_max: float = PUBLISHED_SIGMA_MAX) -> Sigmas:
    """ρ = 7 between two noise levels of the variance-exploding form, then σ / (1 + σ). Knows no shift."""
    ramp = np.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / _RHO), sigma_max ** (1 / _RHO)
    exploding = (high + ramp * (low - high)) ** _RHO
    return np.asarray(exploding / (exploding + 1), dtype=np.float64)


def flow(steps: int, shift: float) -> Sigmas:
    """Uniform from 1 to 1/1000, shifted: what the published scheduler makes when it is given no sigmas."""
    return _shifted(np.linspace(1, 1 / TRAINING_STEPS, steps + 1)[:-1], shift)


def native(steps: int, shift: float) -> Sigmas:
    """Uniform from 1 − 1/1000 to 0, shifted: what the model was trained to be sampled on (``FlowUniPC``)."""
    return _shifted(np.linspace(1.0 - 1.0 / TRAINING_STEPS, 0.0, steps + 1)[:-1], shift)


def _shifted(uniform: Sigmas, shift: float) -> Sigmas:
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    if abs(sigmas[0] - 1) < _MARGIN:
        sigmas[0] -= _MARGIN
    return sigmas
