"""The state of a policy through the published pipeline: the same packing, the same results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import build_harness as harness
import numpy as np
import pytest
import run_samples
import torch
from subjects import Subjects
from test_run_parity import LIMIT, PROMPT

import cosmos_export as cx
from cosmos_export.audit import verify_trail
from cosmos_export.bundle import BundleFiles
from cosmos_export.compiler.golden import golden_record
from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.embodiments import EMBODIMENTS
from cosmos_export.evaluation.pipeline import PublishedAction, PublishedRequest, distances, run_published
from cosmos_export.in_memory import InMemory
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime import media
from cosmos_export.runtime.frontend import prepare
from cosmos_export.runtime.limits import ColumnLimits, Limits
from cosmos_export.runtime.model import LoadedModel
from cosmos_export.runtime.step_inputs import Noise, sizes
from cosmos_export.sampling import Overrides
from cosmos_export.serve.policy import BundlePolicy, golden
from cosmos_export.verb_options import PolicyOptions

pytestmark = pytest.mark.xdist_group("run-parity")

STATE = np.linspace(-0.8, 0.7, 10, dtype=np.float32)


def with_state_row(state: Any) -> Any:
    """diffusers' pipeline, packed as the published server packs: the state is row 0 of the actions, clean, at frame 0.

    Everything else is the pipeline's own: its transformer, prompt, media, scheduler and loop.
    """
    from diffusers import Cosmos3OmniPipeline
    from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as module

    positions = module.get_3d_mrope_ids_vae_tokens

    class WithState(Cosmos3OmniPipeline):
        def prepare_latents(self, *arguments: Any, **keywords: Any) -> Any:
            found = list(super().prepare_latents(*arguments, **keywords))
            row = torch.zeros(1, found[2].shape[1])
            row[0, : len(state)] = torch.from_numpy(state)
            found[2] = torch.cat([row, found[2]])
            found[7] = torch.cat([torch.ones(1, 1), found[7]])
            found[11] = [0]
            return tuple(found)

        def _prepare_action_segment(self, *arguments: Any, **keywords: Any) -> Any:
            module.get_3d_mrope_ids_vae_tokens = lambda **given: positions(**{**given, "start_frame_offset": 0})
            try:
                return super()._prepare_action_segment(*arguments, **keywords)
            finally:
                module.get_3d_mrope_ids_vae_tokens = positions

    return WithState


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_state_is_what_the_published_packing_makes_of_it(
    subjects: Subjects, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    subject, seen = subjects("omni"), run_samples.picture(150, 330, seed=1)
    record = subject.manifest.request
    policy = replace(EMBODIMENTS["umi"], chunk=8, tier=256, history=1)
    record = replace(
        record, action=replace(record.action, embodiments=(policy,)), sampling=replace(record.sampling, policy="umi")
    )
    bundle = BundleFiles(subject.bundle, replace(subject.manifest, request=record))
    asked = GenerateOptions(
        PROMPT, "blurry" if guidance > 1 else None, mode="policy", image=InMemory(seen, "it"), seed=11,
        state=InMemory(STATE, "the state"), sampling=Overrides(steps=5, guidance=guidance),
    )  # fmt: skip
    prepared = prepare(asked, bundle)
    request = prepared.request
    assert request.action is not None and request.action.rows == 9
    found = subject.generator.generate(request)

    noise = Noise(request, sizes(request, record)).initial
    monkeypatch.setattr("diffusers.Cosmos3OmniPipeline", with_state_row(STATE))
    expected = run_published(
        subject.checkpoint,
        PublishedRequest(
            "policy", PROMPT, "blurry" if guidance > 1 else None, request.schedule,
            [noise["vision"], noise["action"][1:]], fps=10.0, image=seen[0], action=PublishedAction("umi", 8, 256),
        ),
    )  # fmt: skip
    assert expected.actions is not None and len(expected.actions) == 9
    np.testing.assert_array_equal(found.latents["action"][0, :10], STATE)
    np.testing.assert_allclose(expected.actions[0, :10], STATE, rtol=0, atol=1e-6)  # diffusers' sampler rounds it
    assert found.actions().shape == (8, 10)
    errors = distances(
        {"vision": found.latents["vision"], "actions": found.actions()},
        {"vision": expected.latents["vision"], "actions": expected.actions[1:, :10]},
    )
    assert max(errors.values()) <= LIMIT, errors
    other = subject.generator.generate(prepare(replace(asked, state=InMemory(-STATE, "it")), bundle).request)
    moved = distances({"actions": other.actions()}, {"actions": found.actions()})["actions"]
    assert moved > 10 * LIMIT, "another state gives other actions, beyond what the comparison allows"


# -- a bundle of such a policy ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(subjects: Subjects) -> Path:
    options = {"mode": "policy", "components": ("vae-encoder", "tokenizer")}
    return subjects("omni-policy", **options).bundle


def test_act_with_arrays(policy: Path) -> None:
    """The state goes in as the robot has it, and a result is one chunk without it."""
    seen = run_samples.picture(80, 112)[0]
    with cx.open(policy) as model:
        with pytest.raises(UserError) as caught:
            model.act(seen, task=PROMPT)
        assert caught.value.code == "CX619"
        made = model.act({"image": seen}, STATE, PROMPT, seed=3, num_inference_steps=2)
        assert made.actions is not None and made.actions.shape == (8, 10)
        same = model.act(seen, STATE.tolist(), PROMPT, seed=3, num_inference_steps=2)
        np.testing.assert_array_equal(made.actions, same.actions)
        other = model.act(seen, -STATE, PROMPT, seed=3, num_inference_steps=2)
        assert not np.array_equal(made.actions, other.actions)
        columns = tuple(ColumnLimits(str(i), -1e3, 1e3, jump=1e-6) for i in range(10))
        review = made.review(Limits("model", columns))
        assert review.verdict == "reject" and review.breaches[0].rule == "jump"


def test_run_writes_a_trail(policy: Path, tmp_path: Path) -> None:
    media.write_png(tmp_path / "view.png", run_samples.picture(80, 112)[0], run_samples.MARK)
    (tmp_path / "state.json").write_text(json.dumps(STATE.tolist()))
    run = ["run", policy, "-p", PROMPT, "--image", "view.png", "--steps", "1", "--audit", "trail.jsonl"]
    found = harness.cosmos_export(*run, "--state", "state.json", "-o", "a.json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "8 actions of umi after 1 of its state" in found.stderr
    assert len(json.loads((tmp_path / "a.json").read_text())["actions"]) == 8
    found = harness.cosmos_export(*run, "-o", "b.json", cwd=tmp_path)
    assert found.returncode == 2 and "CX619" in found.stderr
    assert list(verify_trail(tmp_path / "trail.jsonl").events) == ["built", "verified", "loaded", "request"]
    last = json.loads((tmp_path / "trail.jsonl").read_text().splitlines()[-1])
    assert last["outcome"] == "pass" and last["review"]["limits"] is None
    assert set(last["inputs"]) >= {"prompt", "pictures", "actions"} and set(last["result"]) == {"action", "vision"}


def test_the_golden_request_of_a_build(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded by the build, compared by the server; a backend that computes something else keeps the port closed."""
    job: Any = SimpleNamespace(mode="policy")
    record = golden_record(job, policy)
    assert record is not None and (record.embodiment, len(record.actions)) == ("umi", 8)
    other: Any = SimpleNamespace(mode="t2v")
    assert golden_record(other, policy) is None
    files = BundleFiles(policy)
    files.manifest = replace(files.manifest, volatile=replace(files.manifest.volatile, golden=record))
    with LoadedModel(files) as model:
        served = BundlePolicy(model, PolicyOptions())
        distance = golden(served).distance
        assert distance is not None and distance <= 1e-6
        assert BundlePolicy(model, PolicyOptions(steps=1)).expected() is None
        plain = served.act

        def wrong(seen: Any, seed: int) -> Any:
            made = plain(seen, seed)
            return replace(made, actions=made.actions * np.float32(1.01))

        monkeypatch.setattr(served, "act", wrong)
        with pytest.raises(FindingError, match="from those of the build"):
            golden(served)
