"""Both samplers as tables and linear combinations, against diffusers' schedulers over whole trajectories."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3DistilledVisionLoopSchedulerStep
from diffusers.utils.torch_utils import randn_tensor
from published_schedules import FOUR_STEP, GRID_CASES, NANO, STEPS, published, schedule

from cosmos_export.sampling import (
    COLUMNS,
    CheckpointSampling,
    Schedule,
    SolverState,
    coefficient_table,
    distilled_step,
    distilled_table,
    guide,
    resolve_schedule,
    unipc_step,
    unipc_table,
)
from cosmos_export.sampling.solvers import Array

SHAPE = (1, 4, 3, 5)


def velocity(sample: Array, timestep: float) -> Array:
    """A model in place of the model: smooth, bounded, of the size of real velocities, different at each timestep."""
    mixing = np.random.default_rng(1).standard_normal((SHAPE[-1], SHAPE[-1]))
    return np.asarray(np.tanh(sample @ mixing + timestep / 500 - 1) * 2)


def ours(schedule: Schedule, noise: Array) -> Array:
    state = SolverState.start(noise)
    for row, timestep in zip(unipc_table(schedule), schedule.timesteps, strict=True):
        state = unipc_step(row, state, velocity(state.sample, timestep))
    return state.sample


def theirs(checkpoint: CheckpointSampling, steps: int, noise: Array, *, scalars: torch.dtype) -> Array:
    scheduler = published(checkpoint, steps)
    scheduler.sigmas = scheduler.sigmas.to(scalars)
    sample = torch.from_numpy(noise)
    for timestep in scheduler.timesteps:
        predicted = torch.from_numpy(velocity(sample.numpy(), float(timestep)))
        sample = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
    return np.asarray(sample.numpy())


def apart(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# ---------------------------------------------------------------------------------------------------------------------
# UniPC


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", GRID_CASES)
def test_unipc_is_the_published_solver(case: str, steps: int) -> None:
    """In float64 throughout: measured 2e-15. The published scheduler keeps its sigmas, and with them all its scalars,
    in float32 whatever the type of the sample; given the same sigmas in float64 nothing is left between the two."""
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    mine = ours(schedule(GRID_CASES[case], steps), noise)
    assert apart(mine, theirs(GRID_CASES[case], steps, noise, scalars=torch.float64)) < 1e-13


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", GRID_CASES)
def test_unipc_differs_from_the_scheduler_as_it_is_by_its_float32_scalars_only(case: str, steps: int) -> None:
    """Measured 1.5e-7: a unit in the last place of float32, from logarithms that nearly cancel."""
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    mine = ours(schedule(GRID_CASES[case], steps), noise)
    assert apart(mine, theirs(GRID_CASES[case], steps, noise, scalars=torch.float32)) < 5e-7


@pytest.mark.parametrize("case", GRID_CASES)
def test_unipc_in_float32(case: str) -> None:
    """The type engines run in: measured 7e-7 from the published scheduler in float32."""
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    plan = schedule(GRID_CASES[case], 35)
    state, scheduler = SolverState.start(noise), published(GRID_CASES[case], 35)
    sample = torch.from_numpy(noise)
    random = np.random.default_rng(3)
    for row, timestep in zip(unipc_table(plan), scheduler.timesteps, strict=True):
        predicted = random.standard_normal(SHAPE).astype(np.float32)
        state = unipc_step(row, state, predicted)
        sample = scheduler.step(torch.from_numpy(predicted), timestep, sample, return_dict=False)[0]
    assert state.sample.dtype == np.float32
    assert apart(state.sample, sample.numpy()) < 2e-6


@pytest.mark.parametrize("case", GRID_CASES)
def test_coefficients_are_moderate_and_keep_a_constant(case: str) -> None:
    """No row loses digits to cancellation, and a sample of zero velocity stays: the weights on x0 and x add up."""
    for steps in STEPS:
        table = unipc_table(schedule(GRID_CASES[case], steps))
        columns = dict(zip(COLUMNS["unipc"], table.T, strict=True))
        assert np.isfinite(table).all() and np.abs(table[:, 1:]).max() < 3
        kept = sum(columns[name] for name in ("c_sample", "c_last", "c_m0", "c_m1", "c_d"))
        np.testing.assert_allclose(kept, 1, atol=1e-12)
        np.testing.assert_allclose(columns["p_sample"] + columns["p_d"] + columns["p_m0"], 1, atol=1e-12)


def test_the_last_step_returns_the_view_of_the_clean_sample() -> None:
    row = unipc_table(schedule(NANO, 20))[-1]
    assert dict(zip(COLUMNS["unipc"], row, strict=True)).items() >= {"p_sample": 0.0, "p_d": 1.0, "p_m0": 0.0}.items()


def test_clean_rows_stay_bit_for_bit() -> None:
    """The published pipeline zeroes their velocity, which keeps them up to rounding."""
    noisy = np.asarray([0.0, 1, 1]).reshape(3, 1)
    start = np.random.default_rng(0).standard_normal(SHAPE)
    state, plain = SolverState.start(start), SolverState.start(start)
    plan = schedule(NANO, 20)
    for row, timestep in zip(unipc_table(plan), plan.timesteps, strict=True):
        predicted = velocity(state.sample, timestep)
        state = unipc_step(row, state, predicted, noisy)
        plain = unipc_step(row, plain, predicted * noisy)
    np.testing.assert_array_equal(state.sample[:, :, 0], start[:, :, 0])
    assert apart(plain.sample, state.sample) < 1e-13


# ---------------------------------------------------------------------------------------------------------------------
# Distilled


@pytest.mark.parametrize("clean", [(), (0,), (0, 1)])
def test_the_distilled_step_is_the_published_block(clean: tuple[int, ...]) -> None:
    """diffusers' block with its scheduler and generator, which computes in float32 and nothing else: bit for bit."""
    plan, scheduler = resolve_schedule(FOUR_STEP, "i2v"), published(FOUR_STEP, 4)
    block = Cosmos3DistilledVisionLoopSchedulerStep()
    random = torch.Generator().manual_seed(0)
    mask = torch.zeros(3, 1, 1)
    mask[list(clean)] = 1
    noisy = 1 - mask.numpy()
    reference = torch.randn(1, 4, 3, 5, 5, generator=random)
    start = mask * reference + (1 - mask) * torch.randn(reference.shape, generator=random)
    draws = torch.Generator().manual_seed(7)
    state = SimpleNamespace(
        latents=start,
        generator=torch.Generator().manual_seed(7),
        vision_condition_mask=mask,
        vision_conditioning_latents=reference,
        vision_condition_indexes_for_pack=list(clean),
    )
    sample = start.numpy()
    for i, (row, timestep) in enumerate(zip(distilled_table(plan), scheduler.timesteps, strict=True)):
        predicted = velocity(sample, float(timestep)).astype(np.float32) * noisy
        state.velocity_vision = torch.from_numpy(predicted)
        block(SimpleNamespace(scheduler=scheduler), state, i, timestep)
        noise = randn_tensor((1, *start.shape), generator=draws, dtype=torch.float32)[0].numpy()
        sample = distilled_step(row, sample, predicted, noise, noisy)
        np.testing.assert_array_equal(sample, state.latents.numpy())
    np.testing.assert_array_equal(sample[:, :, list(clean)], reference.numpy()[:, :, list(clean)])


def test_the_last_distilled_step_adds_no_noise() -> None:
    row = distilled_table(resolve_schedule(FOUR_STEP, "t2i"))[-1]
    assert dict(zip(COLUMNS["distilled-sde"], row, strict=True)).items() >= {"signal": 1.0, "noise": 0.0}.items()


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


def test_guidance_in_the_published_order_of_operations() -> None:
    random = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(1000, generator=random).bfloat16().float() for _ in range(2))
    expected = uncond + 6.1 * (cond - uncond)
    np.testing.assert_array_equal(guide(cond.numpy(), uncond.numpy(), 6.1), expected.numpy())
    np.testing.assert_array_equal(guide(cond.numpy(), None, 6.1), cond.numpy())


def test_the_table_holds_the_guidance_of_each_step() -> None:
    plan = resolve_schedule(NANO, "t2i")
    assert [g != 1 for g in coefficient_table(plan)[:, 0]] == list(plan.guided)
    assert set(coefficient_table(plan)[:, 0]) == {1.0, 7.0}


def test_a_table_is_made_for_its_sampler_only() -> None:
    with pytest.raises(ValueError, match="for unipc"):
        distilled_table(resolve_schedule(NANO, "t2i"))
    with pytest.raises(ValueError, match="for distilled-sde"):
        unipc_table(resolve_schedule(FOUR_STEP, "t2i"))
