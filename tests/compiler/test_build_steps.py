"""Gate G2 for FP8: what whole steps lose, in shares of what independent rounding of the same values loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
import torch

from cosmos_export.compiler.driver import build
from cosmos_export.compiler.evidence import BuildResult
from cosmos_export.compiler.losses import Losses
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.evaluation.gates import StepLoss, rounded_at_random
from cosmos_export.precision.schemes import SCHEMES

FP8_STEPS, FOUR_BIT_STEPS = (SCHEMES[name].steps for name in ("fp8", "int4"))
assert FP8_STEPS is not None and FOUR_BIT_STEPS is not None
GOOD = StepLoss(0, 0.03, 0.9995, rounding=0.03)


def measured(checkpoint: Path, output: Path, scales: Path) -> Losses:
    """G2 of a build, whatever becomes of it."""
    results: list[BuildResult] = []
    options: dict[str, Any] = {"target": "cpu", "recipe": "fp8", "calibration": scales, "steps": 8, "parity": "never"}
    try:
        results.append(build(harness.transformer_only(checkpoint, output, **options)))
    except CosmosExportError:
        build_failed = lambda result, _: results.append(result)  # noqa: E731
        with pytest.raises(CosmosExportError, match="lose more than"):
            build(harness.transformer_only(checkpoint, output, **options), found=build_failed)
    assert results[0].losses is not None
    return results[0].losses


def test_an_error_is_as_large_as_that_of_rounding() -> None:
    values = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))
    found = rounded_at_random(values, torch.Generator().manual_seed(2)) - values
    rounded = values.to(torch.float8_e4m3fn).float() - values
    assert float(found.norm()) == pytest.approx(float(rounded.norm()), rel=0.03)
    assert abs(float((found * values).sum() / values.square().sum())) < 1e-3  # in no direction
    _, exponent = torch.frexp(values)
    assert bool((found.abs() <= torch.exp2(exponent - 5.0) * 1.0001).all())  # half of the distance of two codes
    at_scale = rounded_at_random(values * 2.0**-40, torch.Generator().manual_seed(2)) * 2.0**40 - values
    assert torch.equal(at_scale, found)  # whatever the range is
    assert not rounded_at_random(torch.zeros(7), torch.Generator()).any()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((GOOD,), None),
        # More in a network that loses much is no fault, up to what is allowed of any scheme.
        ((StepLoss(0, 0.055, 0.9985, rounding=0.05),), None),
        ((StepLoss(0, 0.09, 0.9962, rounding=0.09),), "is 9.00% off, allowed 8%"),
        # Little in a network that loses less is one.
        ((StepLoss(0, 0.014, 0.9999, rounding=0.01),), "the median step loses 1.40 times"),
        ((GOOD, GOOD, StepLoss(2, 0.02, 0.9998, rounding=0.0125)), "step 3 loses 1.60 times"),
        ((StepLoss(0, 0.0, 1.0, rounding=0.0),), None),
        ((StepLoss(0, 1e-3, 1.0, rounding=0.0),), "loses inf times"),
        ((StepLoss(0, float("inf"), -1.0, rounding=0.03),), "inf"),
    ],
)
def test_what_is_refused(steps: tuple[StepLoss, ...], said: str | None) -> None:
    problems = Losses((), steps, FP8_STEPS, "").step_problems
    assert not problems if said is None else any(said in problem for problem in problems), problems


def test_four_bit_steps_have_no_such_limit() -> None:
    assert not Losses((), (StepLoss(0, 0.05, 0.999),), FOUR_BIT_STEPS, "").step_problems


@pytest.mark.usefixtures("captured_once")
def test_a_table_and_one_that_clips(tmp_path: Path, shared: Path, edge: Path) -> None:
    good = measured(edge, tmp_path / "good", harness.scale_table(edge, shared / "edge-scales"))
    assert len(good.shares) == len(good.steps) == 2
    assert all(0.8 < share < 1.25 for share in good.shares) and not good.step_problems
    clipped = measured(edge, tmp_path / "clipped", harness.scale_table(edge, tmp_path / "clipping", margin=0.5))
    assert max(clipped.shares) > 2
    assert any("times what rounding to FP8 alone does" in problem for problem in clipped.step_problems)
    # It is the same network: what rounding loses does not depend on the table.
    assert [step.rounding for step in clipped.steps] == [step.rounding for step in good.steps]
