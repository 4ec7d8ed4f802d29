"""The build's timesteps are the ones diffusers' scheduler gives for the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from published_schedules import DISTILLED, EDGE, FOUR_STEP, KARRAS, NANO, SIGMAS, STEPS, flow, published

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.published import EDGE as EDGE_GEOMETRY
from cosmos_export.checkpoint.published import NANO as NANO_GEOMETRY
from cosmos_export.checkpoint.published import Geometry
from cosmos_export.compiler.time_table import checkpoint_schedule, timesteps
from cosmos_export.diagnostics import UserError
from cosmos_export.family import Family
from cosmos_export.plan.subject import sampling_of
from cosmos_export.sampling import CheckpointSampling, Overrides


@dataclass(frozen=True)
class Facts:
    """The part of a checkpoint that sampling looks at."""

    scheduler: Mapping[str, Any]
    geometry: Geometry = NANO_GEOMETRY
    model_index: Mapping[str, Any] = field(default_factory=dict)
    distilled_sigmas: tuple[float, ...] | None = None
    policy: Mapping[str, Any] | None = None

    def checkpoint(self) -> Checkpoint:
        return cast(Checkpoint, self)


OF_NANO = Facts(KARRAS)
OF_EDGE = Facts(flow(3.0), EDGE_GEOMETRY, {"use_native_flow_schedule": True})
OF_FOUR_STEP = Facts(DISTILLED, distilled_sigmas=SIGMAS)


def timesteps_of(facts: Facts, steps: int | None) -> torch.Tensor:
    return timesteps(checkpoint_schedule(facts.checkpoint(), overrides=Overrides(steps=steps)))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("facts", "expected"), [(OF_NANO, NANO), (OF_EDGE, EDGE)], ids=["nano", "edge"])
def test_timesteps(facts: Facts, expected: CheckpointSampling, steps: int) -> None:
    found = timesteps_of(facts, steps)
    assert found.dtype == torch.float32
    assert torch.equal(found, published(expected, steps).timesteps.to(torch.float32))


@pytest.mark.parametrize("facts", [OF_NANO, OF_EDGE], ids=["nano", "edge"])
def test_35_steps_are_the_default(facts: Facts) -> None:
    assert torch.equal(timesteps_of(facts, None), timesteps_of(facts, 35))


@pytest.mark.parametrize("steps", [None, 4])
def test_distilled_timesteps(steps: int | None) -> None:
    found = timesteps_of(OF_FOUR_STEP, steps)
    assert torch.equal(found, published(FOUR_STEP, 4).timesteps)


@pytest.mark.parametrize(("facts", "steps"), [(OF_NANO, 0), (OF_EDGE, 1001), (OF_FOUR_STEP, 35)])
def test_a_step_count_that_is_not_sampled_is_refused(facts: Facts, steps: int) -> None:
    with pytest.raises(UserError) as caught:
        timesteps_of(facts, steps)
    assert caught.value.code == "CX460" and f"steps = {steps}" in caught.value.message


def test_the_facts_are_the_checkpoint_s() -> None:
    droid = Facts(flow(5.0), EDGE_GEOMETRY, {"use_native_flow_schedule": True}, policy={"domain_name": "droid_lerobot"})
    assert sampling_of(droid.checkpoint()) == CheckpointSampling(
        flow(5.0), native=True, family=Family.EDGE, policy="droid_lerobot"
    )
    assert checkpoint_schedule(droid.checkpoint(), "policy").timesteps == (999.0, 937.0, 833.0, 624.0)
    assert checkpoint_schedule(droid.checkpoint(), "policy").guided == (True, False, False, False)
    assert not any(checkpoint_schedule(droid.checkpoint(), "policy", Overrides(guidance=1.0)).guided)
