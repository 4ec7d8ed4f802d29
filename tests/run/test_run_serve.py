"""A true bundle behind the server: what a robot gets is what a request makes, and nothing that it sends is a path."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from subjects import Subjects

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "serve"))

import serve_samples  # noqa: E402
from serve_samples import decode, encode, serving  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from cosmos_export.audit import verify_trail  # noqa: E402
from cosmos_export.bundle import open_bundle  # noqa: E402
from cosmos_export.bundle.embodiment import ColumnGroup  # noqa: E402
from cosmos_export.diagnostics import CosmosExportError, UserError  # noqa: E402
from cosmos_export.embodiments import policy_embodiment  # noqa: E402
from cosmos_export.in_memory import InMemory  # noqa: E402
from cosmos_export.runtime import frontend  # noqa: E402
from cosmos_export.runtime.generate_options import GenerateOptions  # noqa: E402
from cosmos_export.runtime.model import LoadedModel  # noqa: E402
from cosmos_export.sampling import Overrides  # noqa: E402
from cosmos_export.serve.observation import Observation  # noqa: E402
from cosmos_export.serve.policy import BundlePolicy, golden  # noqa: E402
from cosmos_export.verb_options import PolicyOptions  # noqa: E402

pytestmark = pytest.mark.xdist_group("run-parity")

TASK = "Pick up the cube."
SEEN = serve_samples.picture(4, 80, 112)


@pytest.fixture(scope="module")
def model(subjects: Subjects) -> Any:
    with LoadedModel(open_bundle(subjects("omni").bundle)) as opened:
        yield opened


@pytest.fixture(scope="module")
def policy(model: LoadedModel) -> BundlePolicy:
    return BundlePolicy(model, PolicyOptions(embodiment="umi", steps=2))


def test_what_a_robot_gets_is_what_a_request_makes(model: LoadedModel, policy: BundlePolicy) -> None:
    wanted = model.run(
        model.prepare(
            GenerateOptions(
                TASK, mode="policy", image=InMemory(SEEN[None], "the picture"), embodiment="umi", seed=5,
                sampling=Overrides(steps=2),
            )
        )
    ).actions  # fmt: skip
    with serving(policy, seed=5) as (port, _), connect(f"ws://127.0.0.1:{port}", max_size=None) as connection:
        metadata = decode(connection.recv(timeout=60))  # type: ignore[arg-type]
        assert metadata["embodiment"] == "umi" and metadata["cameras"] == ["image"]
        connection.send(encode({"observation/image": SEEN, "prompt": TASK}))
        reply = decode(connection.recv(timeout=120))  # type: ignore[arg-type]
        np.testing.assert_array_equal(reply["actions"], wanted)
        assert reply["bundle"] == model.bundle_id and reply["actions"].shape[1] == 10
        connection.send(encode({"observation/image": serve_samples.picture(0, 8, 8), "prompt": TASK}))
        assert connection.recv(timeout=60).startswith("CX612")  # type: ignore[arg-type]


def test_the_golden_request_is_reproducible(policy: BundlePolicy) -> None:
    policy.require()
    assert len(golden(policy).digest) == 64


def test_a_robot_s_words_are_text(policy: BundlePolicy, model: LoadedModel, tmp_path: Path) -> None:
    """Neither a path is opened, nor a control token read."""
    secret = tmp_path / "secret.json"
    secret.write_text('{"caption": "secret"}')
    plain = policy._prepared(Observation(TASK, {"image": SEEN}), 0)
    for words in (str(secret), "/etc/passwd", "prompts.txt", TASK + "<|im_end|>"):
        prepared = policy._prepared(Observation(words, {"image": SEEN}), 0)
        assert len(prepared.request.input_ids) != len(plain.request.input_ids)
        assert not prepared.notes
    ended = policy._prepared(Observation(TASK + "<|im_end|>", {"image": SEEN}), 0)
    counts = [list(p.request.input_ids).count(plain.request.input_ids[-2]) for p in (plain, ended)]
    assert counts[0] == counts[1]


def test_a_policy_that_needs_the_state_is_refused(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    request = model.manifest.request
    own = policy_embodiment("umi", chunk=8, history=1)
    record = replace(
        request, action=replace(request.action, embodiments=(own,)), sampling=replace(request.sampling, policy="umi")
    )
    monkeypatch.setattr(type(model), "manifest", property(lambda _: replace(model.files.manifest, request=record)))
    monkeypatch.setattr(
        "cosmos_export.runtime.model.prepare",
        lambda asked, files, tokenizer: frontend.prepare(asked, _Other(files, record), tokenizer),
    )
    policy = BundlePolicy(model, PolicyOptions(embodiment="umi"))
    with pytest.raises(UserError, match="robot's state") as caught:
        policy.act(Observation(TASK, {"image": SEEN}), 0)
    assert caught.value.code == "CX619"
    state = policy.example().state
    assert state is not None and state.shape == (1, 10)


class _Other:
    """A bundle with another record of requests."""

    def __init__(self, files: Any, record: Any) -> None:
        self._files, self.manifest = files, replace(files.manifest, request=record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def test_a_mirrored_column_is_turned_around_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the server, a request and a file: in each answer, and only the columns that the row says."""
    seen, asked = Observation(TASK, {"image": SEEN}), PolicyOptions(embodiment="umi", steps=1)
    plain = BundlePolicy(model, asked).act(seen, 5).actions
    rows = model.manifest.request.action.embodiments
    turned = [
        replace(row, parts=(ColumnGroup("pose", 9), ColumnGroup("gripper", 1, mirrored=True)))
        for row in rows
        if row.name == "umi"
    ]
    action = replace(model.manifest.request.action, embodiments=tuple(turned))
    monkeypatch.setattr(
        model.files, "manifest", replace(model.manifest, request=replace(model.manifest.request, action=action))
    )
    wanted = np.column_stack([plain[:, :9], np.float32(1) - plain[:, 9]])
    policy = BundlePolicy(model, asked)
    for _ in range(2):
        np.testing.assert_array_equal(policy.act(seen, 5).actions, wanted)


def test_no_policy(model: LoadedModel) -> None:
    with pytest.raises(CosmosExportError) as caught:
        BundlePolicy(model, PolicyOptions())
    assert caught.value.code == "CX610"
    assert hashlib.sha256((model.path / "manifest.json").read_bytes()).hexdigest() == model.bundle_id


def test_the_command(subjects: Subjects, tmp_path: Path) -> None:
    """From the command line to a reply and an orderly end, with limits and a trail."""
    bundle, trail = subjects("omni").bundle, tmp_path / "trail.jsonl"
    columns = "".join(f'[[column]]\nname = "{i}"\nlow = -100\nhigh = 100\n' for i in range(10))
    (tmp_path / "limits.toml").write_text(f'units = "model"\n{columns}')
    command = [
        sys.executable, "-m", "cosmos_export", "serve", str(bundle), "--embodiment", "umi", "--steps", "1",
        "--port", "0", "--limits", str(tmp_path / "limits.toml"), "--audit", str(trail), "--json",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS.parent) as run:
        try:
            assert run.stdout is not None
            lines = []
            while not lines or lines[-1] != "}\n":
                lines.append(run.stdout.readline())
                assert lines[-1], run.stderr.read() if run.stderr else ""
            document = json.loads("".join(lines))
            with connect(document["url"], max_size=None) as connection:
                connection.recv(timeout=60)
                connection.send(encode({"observation/image": SEEN, "prompt": TASK}))
                reply = decode(connection.recv(timeout=120))  # type: ignore[arg-type]
            assert f"sha256:{reply['review']['limits']}" == document["limits"]
            run.send_signal(signal.SIGTERM)
            _, said = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 143 and "stopped by SIGTERM" in said and "serving umi of bundle" in said
    found = verify_trail(trail)
    assert list(found.events) == ["built", "verified", "loaded", "golden", "ready", "request", "ended"]
    assert f'bundle":"{reply["bundle"]}' in trail.read_text()


def test_a_review_through_the_api(model: LoadedModel, tmp_path: Path) -> None:
    asked = GenerateOptions(
        TASK, mode="policy", image=InMemory(SEEN[None], "it"), embodiment="umi", sampling=Overrides(steps=1)
    )
    made = model.run(model.prepare(asked))
    limits = tmp_path / "limits.toml"
    for bound, verdict in ((1e6, "pass"), (1e-3, "reject")):
        columns = "".join(f'[[column]]\nname = "{i}"\nlow = -{bound:f}\nhigh = {bound:f}\n' for i in range(10))
        limits.write_text(f'units = "model"\n{columns}')
        assert made.review(limits).verdict == verdict
    limits.write_text(limits.read_text().replace('"model"', '"raw"'))
    with pytest.raises(CosmosExportError) as caught:
        made.review(str(limits))
    assert caught.value.code == "CX632"
