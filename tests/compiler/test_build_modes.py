"""Gates of a quantized build measure in the mode that is built: a policy's on actions, a clip's on frames and sound."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import build_harness as harness
import pytest
import torch

import cosmos_export.compiler.built_case as built_case_module
import cosmos_export.compiler.stages as stages
import cosmos_export.evaluation.ends as ends
from cosmos_export.compiler.built_case import action_axes, built_case
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.evidence import BuildResult
from cosmos_export.compiler.losses import Losses, loss_verdicts, measure_losses
from cosmos_export.compiler.options import resolve
from cosmos_export.diagnostics import FindingError
from cosmos_export.evaluation.ends import Axis, EndLoss, end_losses
from cosmos_export.evaluation.gates import StepLoss
from cosmos_export.ir.ops import aten
from cosmos_export.passes.insert_quantization import InsertQuantization
from cosmos_export.precision.schemes import SCHEMES

LIMITS = SCHEMES["int4"].steps
assert LIMITS is not None
LITTLE: dict[str, Any] = {
    "recipe": "bf16",
    "overrides": ("gen.mlp.down[0:1]=fp8-w8a16",),
    "parity": "never",
    "steps": 2,
}
"""A build that loses next to nothing."""


@pytest.mark.usefixtures("captured_once")
def test_a_wrong_scale_of_the_action_head_fails_a_policy_and_no_clip(
    tmp_path: Path, omni: Path, droid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = InsertQuantization.run

    def wrong(self: InsertQuantization, program: Any) -> Any:
        result = run(self, program)
        graph = program.graphs[program.loop.body]
        scaled = graph.call(aten.mul.Tensor, graph.outputs["action_velocity"], 1.5)
        graph.set_outputs({**graph.outputs, "action_velocity": scaled})
        return result

    def sampled(*arguments: Any, **_: Any) -> Losses:
        return measure_losses(*arguments)

    monkeypatch.setattr(InsertQuantization, "run", wrong)
    clip = build(harness.transformer_only(omni, tmp_path / "clip", mode="t2v", **LITTLE))
    assert clip.losses is not None and not clip.losses.step_problems
    assert {loss.modality for loss in clip.losses.modalities} == {"vision", "sound"}
    assert "text-to-video" in clip.losses.note
    found: list[BuildResult] = []
    monkeypatch.setattr(stages, "measure_losses", sampled)  # also where nothing is compared with diffusers'
    policy = harness.transformer_only(droid, tmp_path / "policy", mode="policy", profiles=("policy-droid",), **LITTLE)
    with pytest.raises(FindingError) as caught:
        build(policy, found=lambda result, _: found.append(result))
    assert caught.value.code == "CX362" and "the median step (action) is" in caught.value.message
    assert "(vision)" not in caught.value.message
    losses = found[0].losses
    assert losses is not None and {loss.modality for loss in losses.modalities} == {"vision", "action"}
    actions = [loss.relative for loss in losses.modalities if loss.modality == "action"]
    assert actions == pytest.approx([0.5] * len(actions), rel=0.05)
    assert losses.note.endswith("rollout, policy")
    # A whole request: eight frames beside the one that is given, and each column over the 32 actions.
    ended = {end.modality: end for end in losses.ends}
    assert len(ended["vision"].frames) == 8 and not ended["vision"].problems
    assert [(one.name, one.unit) for one in ended["action"].columns[6:]] == [
        ("joint_position[6]", "rad"), ("gripper_position", "1 is closed"),
    ]  # fmt: skip
    assert all(one.rms > 3 * one.floor > 0 for one in ended["action"].columns)
    assert ended["action"].problems and "of the actions is" in caught.value.message


@pytest.fixture
def droid(tmp_path: Path, omni: Path) -> Path:
    path = harness.copy_checkpoint(omni, tmp_path / "droid")
    stated = {"policy": {"domain_name": "droid_lerobot", "raw_action_dim": 8, "use_state": True}}
    (path / "checkpoint.json").write_text(json.dumps(stated), encoding="utf-8")
    return path


def test_a_policy_is_measured_on_its_own_chunk_and_columns(tmp_path: Path, droid: Path, omni: Path) -> None:
    job = resolve(harness.transformer_only(droid, tmp_path / "x", mode="policy", profiles=("policy-droid",), **LITTLE))
    case = built_case(job)
    assert (case.name, case.frames, case.actions, case.domain, case.columns, case.fps) == ("policy", 9, 33, 8, 8, 15.0)
    inputs = case.inputs(job.checkpoint.geometry.config, job.modalities)
    assert inputs["action_mask"].tolist() == [0.0] + [1.0] * 32 and int(inputs["action_domain"]) == 8
    assert inputs["action_positions"][0] == 0  # the state is at the first frame
    assert bool(inputs["action_latent"][:, :8].all()) and not inputs["action_latent"][:, 8:].any()
    axes = action_axes(job)
    assert [axis.name for axis in axes] == [*(f"joint_position[{i}]" for i in range(7)), "gripper_position"]
    assert {axis.unit for axis in axes[:7]} == {"rad"} and all(axis.scale == 1 for axis in axes)
    other = resolve(harness.transformer_only(omni, tmp_path / "x", mode="i2v", **LITTLE))
    assert built_case(other).name == "image-to-video"


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ([{"statistics": {"scale": [0.5, 2]}}], [0.5, 2.0]),
        ([{"kind": "media"}, {"statistics": {"scale": [1, 2, 3]}}, {"statistics": {"scale": [3, 4]}}], [3.0, 4.0]),
        ([{"statistics": {"scale": [1, 2, 3]}}], None),
        ("none", None),
    ],
)
def test_units_are_those_of_the_data_that_the_table_was_made_on(sources: Any, found: list[float] | None) -> None:
    job: Any = SimpleNamespace(scales=SimpleNamespace(lineage={"sources": sources}))
    assert built_case_module._statistics(job, 2) == found


def test_each_column_of_actions_has_its_error_in_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    vision, action = torch.randn(1, 4, 3, 2, 2, generator=generator), torch.randn(5, 6, generator=generator)
    inputs = {
        "vision_latent": vision, "vision_mask": torch.tensor([0.0, 1.0, 1.0]), "action_latent": action,
        "action_mask": torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]), "action_columns": torch.tensor([1.0, 1, 0, 0, 0, 0]),
    }  # fmt: skip
    moved = action.clone()
    moved[:, 1] += torch.tensor([100.0, 0.1, -0.1, 0.1, -0.3])  # the first row is given
    moved[:, 2:] += 100  # padding
    lossy = {"vision": vision * torch.tensor([9.0, 1.1, 1.2]).view(1, 1, 3, 1, 1), "action": moved}
    results = iter((lossy, {"vision": vision, "action": action + 0.01}))
    monkeypatch.setattr(ends, "roll_out", lambda *_: next(results))
    plain: Any = SimpleNamespace(graphs={})
    nothing: Any = None
    axes = (Axis("joint", "rad", 2.0), Axis("gripper", "", 0.5))
    frames, actions = end_losses(
        plain,
        lambda _: plain,
        {"vision": vision, "action": action},
        inputs,
        torch.empty(0),
        nothing,
        nothing,
        axes,
    )
    assert frames.frames == pytest.approx((0.1, 0.2)) and 0.1 < frames.relative < 0.2 and frames.floor == 0
    assert not frames.problems
    joint, gripper = actions.columns
    rms = (action[1:, :2].double().square().mean() ** 0.5).item()
    assert joint.rms == joint.largest == 0 and joint.floor == pytest.approx(0.02, rel=1e-3)
    assert gripper.rms == pytest.approx(0.5 * 0.03**0.5, rel=1e-4) and gripper.largest == pytest.approx(0.15, rel=1e-4)
    assert gripper.share == pytest.approx(0.03**0.5 / rms, rel=1e-4)
    assert actions.relative == pytest.approx((4 * 0.03) ** 0.5 / (8**0.5 * rms), rel=1e-4)
    assert bool(actions.problems) == (gripper.share > 0.2)


def test_the_end_of_a_request_is_a_verdict() -> None:
    column = ends.ColumnLoss("gripper", "of the model's units", 0.3, 0.5, 0.01, 0.35)
    found = (EndLoss("vision", 0.01, 0.002), EndLoss("action", 0.1, 0.01, columns=(column,)))
    losses = Losses((), (StepLoss(0, 0.01, 0.9999),), LIMITS, "the note", ends=found)
    assert losses.end_problems == [
        "gripper of the actions is 0.3 of the model's units off, 35.0% of an action, allowed 20%"
    ]
    verdicts = {verdict.subject: verdict for verdict in loss_verdicts(losses) if verdict.stage == "G3"}
    assert (verdicts["vision"].verdict, verdicts["action"].verdict) == ("pass", "fail")
    assert "0.01 in its own precision" in verdicts["action"].note
    (missing,) = (v for v in loss_verdicts(Losses((), (), LIMITS, "nothing was sampled")) if v.stage == "G3")
    assert (missing.verdict, missing.note) == ("not-measured", "nothing was sampled")


def test_a_modality_is_held_to_the_limits_by_itself() -> None:
    steps = (StepLoss(0, 0.01, 0.9999),)
    apart = (StepLoss(0, 0.005, 0.9999, modality="vision"), StepLoss(0, 0.3, 0.97, modality="action"))
    problems = Losses((), steps, LIMITS, "", modalities=apart).step_problems
    assert problems and all("(action)" in problem for problem in problems)
