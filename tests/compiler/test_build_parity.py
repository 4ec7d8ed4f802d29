"""The measure itself: the reference is the published model called by hand, and nothing wrong measures as small."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.checkpoint import Checkpoint, open_checkpoint
from cosmos_export.evaluation.cases import CASES, Case
from cosmos_export.evaluation.parity import Measured, Parity
from cosmos_export.evaluation.reference import Reference, relative_error

ALL = ("vision", "sound", "action")

# ---------------------------------------------------------------------------------------------------------------------
# Relative error


def error(found: Sequence[float], expected: Sequence[float]) -> float:
    return relative_error({"x": torch.tensor(found)}, {"x": torch.tensor(expected)})


def test_it_is_the_relative_l2_norm() -> None:
    assert error([3.0, 4.0], [3.0, 4.0]) == 0.0
    assert error([3.0, 5.0], [3.0, 4.0]) == pytest.approx(0.2)
    assert error([30.0, 50.0], [30.0, 40.0]) == pytest.approx(0.2)


def test_the_worst_output_counts() -> None:
    expected = {"a": torch.ones(4), "b": torch.full((4,), 1e-3)}
    assert relative_error({"a": torch.ones(4), "b": torch.full((4,), 2e-3)}, expected) == pytest.approx(1.0)
    assert relative_error({**expected, "more": torch.ones(1)}, expected) == 0.0


def test_zero_must_be_found_zero() -> None:
    assert error([0.0, 0.0], [0.0, 0.0]) == 0.0
    assert error([0.0, 1e-30], [0.0, 0.0]) == inf


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_what_is_not_finite_is_infinitely_wrong(bad: float, others: float) -> None:
    """`max(0.0, nan)` is 0.0: a comparison that forgets this passes a model that computes NaN."""
    assert error([bad, 1.0], [1.0, 1.0]) == inf
    assert error([others, 1.0], [bad, 1.0]) == inf
    fine = {"a": torch.ones(2), "b": torch.tensor([bad, 1.0]), "c": torch.ones(2)}
    assert relative_error(fine, dict.fromkeys("abc", torch.ones(2))) == inf


def test_what_is_missing_or_of_another_shape_is_infinitely_wrong() -> None:
    assert relative_error({}, {"x": torch.ones(2)}) == inf
    assert relative_error({"x": torch.ones(2, 1)}, {"x": torch.ones(2)}) == inf
    assert relative_error({"x": torch.ones(2)}, {}) == inf  # nothing compared is nothing shown


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(-0.5, 0.5))
def test_a_scaled_result_is_off_by_the_scale(values: list[float], change: float) -> None:
    expected = torch.tensor(values, dtype=torch.float64)
    if expected.norm() > 1e-6:
        found = relative_error({"x": expected * (1 + change)}, {"x": expected})
        assert found == pytest.approx(abs(change), abs=1e-12)


def test_a_measurement_that_is_not_a_number_does_not_pass() -> None:
    values = {0.5: True, 1.0: True, 1.1: False, inf: False, nan: False}
    assert {v: Measured("stage", "metric", v, 1.0, "", "").passed for v in values} == values


# ---------------------------------------------------------------------------------------------------------------------
# Cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inputs_of_a_case(case: Case, omni: Path) -> None:
    config = open_checkpoint(omni).geometry.config
    inputs = case.inputs(config, ALL)
    assert inputs["vision_latent"].shape == (1, 4, case.frames, case.height, case.width)
    assert inputs["sound_latent"].shape == (8, case.sound)
    assert inputs["action_latent"].shape == (case.actions, 64)
    assert inputs["row_positions"].shape == ((case.height + 1) // 2,)
    assert inputs["column_positions"].shape == ((case.width + 1) // 2,)
    assert set(inputs["vision_mask"].tolist()) <= {0.0, 1.0}
    kinds = {name: value.dtype for name, value in inputs.items()}
    assert {name for name, kind in kinds.items() if kind == torch.int64} == {"input_ids", "action_domain"}
    assert set(kinds.values()) == {torch.int64, torch.float32}
    again = case.inputs(config, ALL)
    assert all(torch.equal(value, again[name]) for name, value in inputs.items())
    other = case.inputs(config, ALL, seed=1)
    assert not torch.equal(other["vision_latent"], inputs["vision_latent"])
    assert set(case.inputs(config, ("vision",))) == {n for n in inputs if not n.startswith(("sound_", "action_"))}


def test_the_cases_cover_every_mode_between_them() -> None:
    assert {(c.height % 2, c.width % 2) for c in CASES} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert (
        {c.frames == 1 for c in CASES}
        == {c.sound > 0 for c in CASES}
        == {c.actions > 0 for c in CASES}
        == {True, False}
    )
    assert any(c.prompt == 1 for c in CASES)
    assert any(c.clean_frames == "all" for c in CASES)
    assert any(c.clean_actions == "all" for c in CASES)
    assert len({c.fps for c in CASES}) > 4


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def test_the_reference_is_the_published_forward_called_by_hand(omni: Path) -> None:
    """Image to video with sound and actions: 3 frames, the first clean, one of four actions given, at 15 fps."""
    from diffusers import Cosmos3OmniTransformer

    case = Case("by hand", 7, 3, 5, 6, clean_frames=(0,), sound=2, actions=4, clean_actions=(0,), fps=15.0)
    inputs = case.inputs(open_checkpoint(omni).geometry.config, ALL)
    found = Reference(omni / "transformer", torch.float32).step(inputs, 15.0)

    model = Cosmos3OmniTransformer.from_pretrained(omni / "transformer", torch_dtype=torch.float32).eval()
    start, patches = 7 + 15_000, 3 * 3 * 3
    rows = 7 + patches + 2 + 4
    position = torch.zeros(3, rows)
    position[:, :7] = torch.arange(7.0)
    frame, row, column = (i.flatten() for i in torch.meshgrid(*[torch.arange(3.0)] * 3, indexing="ij"))
    position[0, 7:34], position[1, 7:34], position[2, 7:34] = frame / (15 / 4) * (24 / 4) + start, row, column
    position[0, 34:36] = torch.arange(2.0) / 25 * 24 + start
    position[0, 36:40] = torch.arange(1.0, 5.0) / 15 * 6 + start
    time = inputs["timestep"]
    with torch.no_grad():
        vision, sound, action = model(
            input_ids=inputs["input_ids"], text_indexes=torch.arange(7), position_ids=position, und_len=7,
            sequence_length=rows, return_dict=False,
            vision_tokens=[inputs["vision_latent"]], vision_token_shapes=[(3, 3, 3)],
            vision_sequence_indexes=torch.arange(7, 34), vision_mse_loss_indexes=torch.arange(16, 34),
            vision_timesteps=time.expand(18), vision_noisy_frame_indexes=[torch.tensor([1, 2])],
            sound_tokens=[inputs["sound_latent"]], sound_token_shapes=[(2, 1, 1)],
            sound_sequence_indexes=torch.arange(34, 36), sound_mse_loss_indexes=torch.arange(34, 36),
            sound_timesteps=time.expand(2), sound_noisy_frame_indexes=[torch.arange(2)],
            action_tokens=[inputs["action_latent"]], action_token_shapes=[(4, 1, 1)],
            action_sequence_indexes=torch.arange(36, 40), action_mse_loss_indexes=torch.arange(37, 40),
            action_timesteps=time.expand(3), action_noisy_frame_indexes=[torch.arange(1, 4)],
            action_domain_ids=[inputs["action_domain"]],
        )  # fmt: skip
    expected = {"vision_velocity": vision[0], "sound_velocity": sound[0], "action_velocity": action[0]}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # What is clean has no velocity, everything else has.
    assert not found["vision_velocity"][:, :, 0].any()
    assert found["vision_velocity"][:, :, 1:].all()
    assert not found["action_velocity"][0].any()
    assert found["action_velocity"][1:].all()


# ---------------------------------------------------------------------------------------------------------------------
# Parity


class Spoiled(Parity):
    """`_compare` of a real `Parity` without a model: what is expected is given."""

    def __init__(self, expected: dict[str, dict[str, torch.Tensor]]) -> None:
        self._expected = expected


def test_an_output_that_a_pass_lost_is_not_passed_over() -> None:
    both = {"vision_velocity": torch.ones(2), "action_velocity": torch.ones(2)}
    spoiled = Spoiled({CASES[0].name: both})
    assert spoiled._compare(CASES[0], both) == 0.0
    assert spoiled._compare(CASES[0], {"vision_velocity": torch.ones(2)}) == inf


@pytest.fixture(scope="module")
def opened(omni: Path) -> Checkpoint:
    return open_checkpoint(omni)


@pytest.mark.parametrize(
    ("modalities", "outputs", "count"),
    [
        (ALL, ("vision_velocity", "sound_velocity", "action_velocity"), 7),
        (("vision",), ("vision_velocity",), 4),
        (ALL, ("sound_velocity",), 2),
        (ALL, ("action_velocity",), 3),
    ],
)
def test_only_cases_that_say_something_are_measured(
    opened: Checkpoint, modalities: tuple[str, ...], outputs: tuple[str, ...], count: int
) -> None:
    parity = Parity(opened, modalities, outputs, weights=lambda binding: pytest.fail("nothing is read yet"))
    assert len(parity._cases) == count
    assert {name for expected in parity._expected.values() for name in expected} == set(outputs)
    assert all(parity._expected[case.name] for case in parity._cases)
    assert np.isfinite([float(v.norm()) for e in parity._expected.values() for v in e.values()]).all()
