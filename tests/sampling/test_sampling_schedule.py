"""Schedules: the grids are the published ones, defaults have a source, and what cannot be sampled is refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from published_schedules import (
    DISTILLED,
    EDGE,
    FOUR_STEP,
    GRID_CASES,
    KARRAS,
    NANO,
    SIGMAS,
    STEPS,
    flow,
    published,
    schedule,
)
from published_schedules import checkpoint as sampled_by

from cosmos_export.diagnostics import UserError
from cosmos_export.sampling import MODES, CheckpointSampling, Overrides, Schedule, Segment, resolve_schedule

# ---------------------------------------------------------------------------------------------------------------------
# Grids


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", GRID_CASES)
def test_the_grid_is_the_published_one(case: str, steps: int) -> None:
    """Bit for bit: sigmas after the scheduler's rounding to float32, timesteps before it."""
    ours, theirs = schedule(GRID_CASES[case], steps), published(GRID_CASES[case], steps)
    assert ours.grid == case.partition("-")[0]
    np.testing.assert_array_equal(np.asarray(ours.sigmas), theirs.sigmas.double().numpy())
    assert list(ours.timesteps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("case", GRID_CASES)
def test_timesteps_are_truncated_alike_for_every_number_of_steps(case: str) -> None:
    for steps in range(1, 1001, 7):
        theirs = published(GRID_CASES[case], steps)
        assert list(schedule(GRID_CASES[case], steps).timesteps) == theirs.timesteps.tolist(), steps


def test_the_distilled_schedule_is_the_published_one() -> None:
    ours, theirs = resolve_schedule(FOUR_STEP, "t2i"), published(FOUR_STEP, 4)
    np.testing.assert_array_equal(np.asarray(ours.sigmas, dtype=np.float32), theirs.sigmas.numpy())
    np.testing.assert_array_equal(np.asarray(ours.timesteps, dtype=np.float32), theirs.timesteps.numpy())
    assert ours.timesteps == (1000.0, 937.5, float(np.float32(833.3333)), 625.0)


@pytest.mark.parametrize(
    ("grid", "shift", "steps", "timesteps"),
    [
        ("native", 5.0, 4, "999 937 833 624"),
        ("native", 3.0, 20, "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"),
        (
            "native",
            10.0,
            30,
            "999 996 992 988 984 980 975 970 964 958 952 945 937 928 919 908 897 884 869 852 833 810 784 752 714 666 "
            "605 526 416 256",
        ),
        (
            "karras",
            None,
            35,
            "995 994 993 992 991 990 988 986 984 981 978 975 970 965 958 950 941 929 915 898 877 852 822 785 742 693 "
            "636 572 504 432 361 292 229 174 128",
        ),
    ],
)
def test_timesteps_that_engines_print(grid: str, shift: float | None, steps: int, timesteps: str) -> None:
    """From other engines' logs; asked for on a checkpoint whatever its own grid."""
    for checkpoint in (NANO, EDGE):
        found = schedule(checkpoint, steps, grid=grid, shift=shift).timesteps
        assert " ".join(f"{t:.0f}" for t in found) == timesteps


def test_a_karras_scheduler_stays_on_karras_where_the_pipeline_passes_it_the_native_grid() -> None:
    both = sampled_by(KARRAS, native=True)
    theirs = published(both, 20)
    ours = schedule(both, 20)
    assert ours.grid == "karras" and list(ours.timesteps) == theirs.timesteps.tolist()


def test_more_steps_than_the_published_scheduler_can_start() -> None:
    """Two first timesteps of 999: diffusers looks its first index up by timestep and skips one. The table does not."""
    theirs = published(GRID_CASES["flow-10"], 101)
    assert theirs.timesteps[0] == theirs.timesteps[1] and theirs.index_for_timestep(theirs.timesteps[0]) == 1
    assert schedule(GRID_CASES["flow-10"], 101).steps == 101


# ---------------------------------------------------------------------------------------------------------------------
# Defaults


@pytest.mark.parametrize(
    ("checkpoint", "mode", "grid", "steps", "shift", "guidance", "interval"),
    [
        (NANO, "t2i", "karras", 50, None, 7.0, (400.0, 1000.0)),
        (NANO, "t2v", "karras", 35, None, 6.0, None),
        (NANO, "v2v", "karras", 35, None, 6.0, None),
        (NANO, "forward-dynamics", "karras", 30, None, 1.0, None),
        (replace(NANO, policy="droid_lerobot"), "policy", "karras", 4, None, 3.0, None),
        (replace(NANO, policy="droid_lerobot"), "i2v", "karras", 35, None, 6.0, None),
        (EDGE, "t2i", "native", 50, 3.0, 4.0, None),
        (EDGE, "i2v", "native", 35, 3.0, 5.0, None),
        (EDGE, "policy", "native", 30, 3.0, 1.0, None),
        (replace(EDGE, policy="droid_lerobot"), "policy", "native", 4, 3.0, 3.0, (960.0, 1001.0)),
        (FOUR_STEP, "t2i", "distilled", 4, None, 1.0, None),
    ],
)
def test_defaults(
    checkpoint: CheckpointSampling,
    mode: str,
    grid: str,
    steps: int,
    shift: float | None,
    guidance: float,
    interval: tuple[float, float] | None,
) -> None:
    found = resolve_schedule(checkpoint, mode)
    assert (found.grid, found.steps, found.shift) == (grid, steps, shift)
    assert (found.guidance, found.guidance_interval) == (guidance, interval)


def test_every_default_names_its_source_and_resolves() -> None:
    for checkpoint in (NANO, EDGE, replace(NANO, policy="droid_lerobot"), replace(EDGE, policy="droid_lerobot")):
        for mode in MODES.values():
            assert mode.default(checkpoint.family, checkpoint.policy).source
            assert len(resolve_schedule(checkpoint, mode.name).sigmas) > 1


def test_another_grid_takes_the_shift_of_the_mode() -> None:
    assert resolve_schedule(NANO, "t2v", Overrides(grid="native")).shift == 10.0
    assert resolve_schedule(NANO, "t2i", Overrides(grid="flow")).shift == 3.0
    assert resolve_schedule(EDGE, "t2v", Overrides(grid="karras")).sigmas == resolve_schedule(NANO, "t2v").sigmas


def test_a_schedule_is_plain_data() -> None:
    made = resolve_schedule(NANO, "t2i")
    assert Schedule(**asdict(made)) == made


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


def test_the_interval_is_inclusive_and_decides_each_step() -> None:
    """The DROID setting of Edge: 5 passes instead of 8."""
    asked = Overrides(grid="native", steps=4, shift=5.0, guidance=3.0, guidance_interval=(960, 1001))
    assert resolve_schedule(EDGE, "policy", asked).guided == (True, False, False, False)
    at_bounds = replace(asked, guidance_interval=(833, 937))
    assert resolve_schedule(EDGE, "policy", at_bounds).guided == (False, True, True, False)


def test_segments_are_the_longest_runs_of_equal_steps() -> None:
    def segments(low: float, high: float) -> list[tuple[int, int, bool]]:
        asked = Overrides(grid="native", steps=4, shift=5.0, guidance=3.0, guidance_interval=(low, high))
        return [(s.start, s.steps, s.guided) for s in resolve_schedule(EDGE, "policy", asked).segments]

    assert segments(960, 1001) == [(0, 1, True), (1, 3, False)]
    assert segments(833, 937) == [(0, 1, False), (1, 2, True), (3, 1, False)]
    assert segments(0, 700) == [(0, 3, False), (3, 1, True)]
    assert resolve_schedule(NANO, "t2v").segments == (Segment(0, 35, guided=True),)
    assert resolve_schedule(FOUR_STEP, "t2i").segments == (Segment(0, 4, guided=False),)
    assert [s.guided for s in resolve_schedule(NANO, "t2i").segments] == [True, False]


def test_guidance_of_one_guides_no_step() -> None:
    found = resolve_schedule(NANO, "t2i", Overrides(guidance=1))
    assert found.guidance_interval is None and not any(found.guided)
    assert all(resolve_schedule(NANO, "t2v").guided)


def test_a_default_interval_can_be_opened() -> None:
    assert all(resolve_schedule(NANO, "t2i", Overrides(guidance_interval=(0, 1000))).guided)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("checkpoint", "mode", "overrides", "code", "message"),
    [
        (NANO, "t2a", {}, "CX464", "mode = t2a; allowed: t2i, t2v"),
        (NANO, "t2v", {"steps": 0}, "CX460", "steps = 0; allowed: whole numbers from 1 to 1000"),
        (NANO, "t2v", {"steps": 1001}, "CX460", "steps = 1001"),
        (NANO, "t2v", {"steps": 2.5}, "CX460", "steps = 2.5"),
        (NANO, "t2v", {"steps": True}, "CX460", "steps = True"),
        (NANO, "t2v", {"grid": "uniform"}, "CX462", "grid = uniform; allowed: karras, flow, native"),
        (NANO, "t2v", {"grid": "distilled"}, "CX462", "grid = distilled; allowed: karras, flow, native"),
        (NANO, "t2v", {"shift": 5.0}, "CX462", "shift = 5.0; allowed: none: the Karras grid has no shift"),
        (EDGE, "t2v", {"shift": 0.0}, "CX462", "shift = 0.0; allowed: finite numbers above 0"),
        (EDGE, "t2v", {"shift": float("nan")}, "CX462", "shift = nan"),
        (EDGE, "t2v", {"shift": 1e9}, "CX462", "35 sigmas are below 1 and distinct in float32"),
        (NANO, "t2v", {"guidance": float("inf")}, "CX463", "guidance = inf; allowed: numbers from 0 to 100"),
        (NANO, "t2v", {"guidance": -1.0}, "CX463", "guidance = -1.0"),
        (NANO, "t2v", {"guidance": 1e38}, "CX463", "guidance = 1e+38"),
        (NANO, "t2v", {"guidance": 100.1}, "CX463", "guidance = 100.1"),
        (NANO, "t2v", {"guidance_interval": (900, 400)}, "CX463", "guidance_interval = (900, 400)"),
        (NANO, "t2v", {"guidance_interval": (0, 1002)}, "CX463", "two timesteps, low to high, from 0 to 1001"),
        (NANO, "t2v", {"guidance_interval": (0,)}, "CX463", "guidance_interval = (0,)"),
        (NANO, "t2v", {"guidance_interval": (0, 100)}, "CX463", "timesteps fall from 995 to 128"),
        (NANO, "policy", {"guidance_interval": (0, 1000)}, "CX463", "none with guidance 1"),
        (FOUR_STEP, "policy", {}, "CX464", "mode = policy; allowed: t2i, t2v, i2v, v2v for a distilled checkpoint"),
        (FOUR_STEP, "t2i", {"steps": 8}, "CX460", "steps = 8; allowed: 4"),
        (FOUR_STEP, "t2i", {"guidance": 4.0}, "CX463", "guidance = 4.0; allowed: 1"),
        (FOUR_STEP, "t2i", {"guidance_interval": (0, 1000)}, "CX463", "guidance_interval = (0, 1000)"),
        (FOUR_STEP, "t2i", {"grid": "karras"}, "CX462", "grid = karras; allowed: distilled"),
        (FOUR_STEP, "t2i", {"shift": 5.0}, "CX462", "shift = 5.0; allowed: none"),
    ],
)
def test_refused(checkpoint: CheckpointSampling, mode: str, overrides: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_schedule(checkpoint, mode, Overrides(**overrides))
    assert caught.value.code == code and message in caught.value.message


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (sampled_by(KARRAS | {"solver_order": 3}), "scheduler solver_order = 3; allowed: 2"),
        (sampled_by(KARRAS | {"prediction_type": "epsilon"}), "scheduler prediction_type = epsilon"),
        (sampled_by({"_class_name": "UniPCMultistepScheduler"}), "scheduler use_flow_sigmas = False; allowed: True"),
        (sampled_by(KARRAS | {"disable_corrector": [0]}), "scheduler disable_corrector = [0]; allowed: []"),
        (sampled_by(KARRAS | {"sigma_max": None}), "scheduler sigma_max = None; allowed: numbers above 0"),
        (sampled_by(KARRAS | {"sigma_max": 0.1}), "scheduler sigma_min = 0.147; allowed: values below sigma_max = 0.1"),
        (sampled_by(DISTILLED), "UniPCMultistepScheduler for a checkpoint without fixed sigmas"),
        (sampled_by(flow(3.0), distilled_sigmas=SIGMAS), "FlowMatchEulerDiscreteScheduler for a distilled checkpoint"),
        (sampled_by(DISTILLED | {"shift": 5.0}, distilled_sigmas=SIGMAS), "scheduler shift = 5.0; allowed: 1.0"),
        (
            sampled_by(DISTILLED | {"stochastic_sampling": False}, distilled_sigmas=SIGMAS),
            "scheduler stochastic_sampling = False; allowed: True",
        ),
    ],
)
def test_a_scheduler_that_is_not_compiled_is_refused(checkpoint: CheckpointSampling, message: str) -> None:
    """Sampling it as if it were the published one would make every output wrong, with no error."""
    with pytest.raises(UserError) as caught:
        resolve_schedule(checkpoint, "t2v")
    assert caught.value.code == "CX461" and message in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 34},
        {"sigmas": (1.0,) + (0.5,) * 34 + (0.0,)},
        {"sampler": "distilled-sde"},
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="contradicts itself") as caught:
        replace(resolve_schedule(NANO, "t2v"), **change)
    assert caught.value.code == "CX465"
