"""Both samplers as linear combinations of tensors with a row of coefficients per step.

The coefficients follow from the sigmas alone, so a schedule becomes a table, and a step has no branch, no logarithm and
no step counter: the same arithmetic runs in numpy here, in a graph (`passes.sampler`), and in an engine's loop.

UniPC of order 2 (``bh2``, predicts x0, corrects, lower order at both ends, final σ = 0). In the order of a step, with
the velocity v of the current sample x:

    d                =  x − σ·v                                                   the model's view of the clean sample
    x'               =  c_sample·x + c_last·last + c_m0·m0 + c_m1·m1 + c_d·d      corrector; step 0: x' = x
    x                ←  p_sample·x' + p_d·d + p_m0·m0                             predictor to the next σ
    last, m0, m1     ←  x', d, m0

Distilled, stochastic Euler with fresh noise ε:

    d  =  x − σ·v ;   x  ←  signal·d + noise·ε          signal = 1 − σ' and noise = σ' for the next σ'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.sampling.schedule import Sampler, Schedule

Array = NDArray[np.floating[Any]]
Table = NDArray[np.float64]

UNIPC_COLUMNS = (
    "guidance", "sigma", "c_sample", "c_last", "c_m0", "c_m1", "c_d", "p_sample", "p_d", "p_m0",
)  # fmt: skip
DISTILLED_COLUMNS = ("guidance", "sigma", "signal", "noise")
COLUMNS: Mapping[Sampler, tuple[str, ...]] = {"unipc": UNIPC_COLUMNS, "distilled-sde": DISTILLED_COLUMNS}
"""Contents of each column of a sampler's table."""


def coefficient_table(schedule: Schedule) -> Table:
    """float64 [steps, columns] of the schedule's sampler; engines take it in float32."""
    return unipc_table(schedule) if schedule.sampler == "unipc" else distilled_table(schedule)


def unipc_table(schedule: Schedule) -> Table:
    """``UNIPC_COLUMNS`` of each step."""
    _require(schedule, "unipc")
    sigmas, steps = schedule.sigmas, schedule.steps
    orders = [min(2, steps - i, i + 1) for i in range(steps)]
    table = np.zeros((steps, len(UNIPC_COLUMNS)))
    for i, row in enumerate(table):
        correct = (1.0, 0.0, 0.0, 0.0, 0.0) if i == 0 else _corrector(sigmas, i, orders[i - 1])
        row[:] = (_guidance(schedule, i), sigmas[i], *correct, *_predictor(sigmas, i, orders[i]))
    return table


def distilled_table(schedule: Schedule) -> Table:
    """``DISTILLED_COLUMNS`` of each step."""
    _require(schedule, "distilled-sde")
    now, after = np.asarray(schedule.sigmas[:-1]), np.asarray(schedule.sigmas[1:])
    return np.stack([np.ones_like(now), now, 1 - after, after], axis=1)


def _require(schedule: Schedule, sampler: Sampler) -> None:
    if schedule.sampler != sampler:
        raise ValueError(f"the schedule is for {schedule.sampler}, not {sampler}")


def _guidance(schedule: Schedule, step: int) -> float:
    return schedule.guidance if schedule.guided[step] else 1.0


def _log_ratio(sigma: float) -> float:
    """λ = log((1 − σ) / σ), the axis on which the solver's polynomials live."""
    return float(np.log(1 - sigma) - np.log(sigma))


def _corrector(sigmas: tuple[float, ...], i: int, order: int) -> tuple[float, float, float, float, float]:
    """(x, last, m0, m1, d) → the sample at σ_i, arrived at from σ_{i−1} and corrected by the velocity found there."""
    start, end = sigmas[i - 1], sigmas[i]
    h = _log_ratio(end) - _log_ratio(start)
    e = float(np.expm1(-h))
    gain = (1 - end) * e
    if order == 1:
        return (0.0, end / start, -gain / 2, 0.0, -gain / 2)
    ratio = (_log_ratio(sigmas[i - 2]) - _log_ratio(start)) / h
    phi = e / -h - 1
    first = phi / e
    second = 2 * (phi / -h - 0.5) / e
    # [[1, 1], [ratio, 1]] · (old, new) = (first, second)
    old = (first - second) / (1 - ratio)
    new = first - old
    return (0.0, end / start, -gain + gain * (old / ratio + new), -gain * old / ratio, -gain * new)


def _predictor(sigmas: tuple[float, ...], i: int, order: int) -> tuple[float, float, float]:
    """(x', d, m0) → the sample at σ_{i+1}."""
    start, end = sigmas[i], sigmas[i + 1]
    if end == 0:
        return (0.0, 1.0, 0.0)
    h = _log_ratio(end) - _log_ratio(start)
    gain = (1 - end) * float(np.expm1(-h))
    if order == 1:
        return (end / start, -gain, 0.0)
    ratio = (_log_ratio(sigmas[i - 1]) - _log_ratio(start)) / h
    return (end / start, -gain + gain / (2 * ratio), -gain / (2 * ratio))


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SolverState:
    """The state of UniPC: the sample, the one before the last prediction, and the last two views of x0."""

    sample: Array
    last: Array
    m0: Array
    m1: Array

    @classmethod
    def start(cls, sample: Array) -> SolverState:
        """State before the first step: only its sample is read."""
        zero = np.zeros_like(sample)
        return cls(sample, zero, zero, zero)


def guide(cond: Array, uncond: Array | None, guidance: float) -> Array:
    """``u + g·(c − u)``, in this order of operations; ``c`` where there is no unconditional velocity."""
    return cond if uncond is None else uncond + cond.dtype.type(guidance) * (cond - uncond)


def unipc_step(row: Table, state: SolverState, velocity: Array, noisy: Array | None = None) -> SolverState:
    """The next state, in the sample's type. Where ``noisy`` (0/1, broadcast) is 0 the sample stays as it is."""
    x = state.sample
    _, sigma, c_sample, c_last, c_m0, c_m1, c_d, p_sample, p_d, p_m0 = row.astype(x.dtype)
    d = x - sigma * velocity
    corrected = c_sample * x + c_last * state.last + c_m0 * state.m0 + c_m1 * state.m1 + c_d * d
    sample = p_sample * corrected + p_d * d + p_m0 * state.m0
    return SolverState(_hold(sample, x, noisy), corrected, d, state.m0)


def distilled_step(row: Table, sample: Array, velocity: Array, noise: Array, noisy: Array | None = None) -> Array:
    """The next sample, in the sample's type. Where ``noisy`` (0/1, broadcast) is 0 it stays as it is."""
    _, sigma, signal, level = row.astype(sample.dtype)
    return _hold(signal * (sample - sigma * velocity) + level * noise, sample, noisy)


def _hold(new: Array, old: Array, noisy: Array | None) -> Array:
    return new if noisy is None else noisy * new + (1 - noisy) * old
