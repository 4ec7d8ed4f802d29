"""What checkpoint.json says of a policy is taken, said, or refused: no field of it is dropped without a word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoint import TINY, write_checkpoint, write_json
from typer.testing import CliRunner

from cosmos_export.bundle import PolicyRecord
from cosmos_export.checkpoint import Checkpoint, open_checkpoint
from cosmos_export.checkpoint.policy import Policy, read_policy
from cosmos_export.cli import app
from cosmos_export.compiler.request_record import policy_notes, request_record
from cosmos_export.diagnostics import UserError
from cosmos_export.runtime.embodiments import policy_of

ALL = ("vision", "action")


def checkpoint(root: Path, **policy: Any) -> Checkpoint:
    write_checkpoint(root, replace(TINY, num_embodiment_domains=9))
    write_json(root / "checkpoint.json", {"policy": policy})
    return open_checkpoint(root)


def test_fields_are_read_under_their_names() -> None:
    assert read_policy(None) is None and read_policy({}) == Policy()
    served = {
        "domain_name": "droid_lerobot", "action_dim": 8, "action_chunk_size": 32, "conditioning_fps": 15,
        "use_state": True, "history_length": 1, "action_space": "joint_pos", "norm_stats": {"q01": []},
    }  # fmt: skip
    expected = Policy("droid_lerobot", 8, 32, 15.0, True, 1, ("action_space", "norm_stats"))
    assert read_policy(served) == expected
    said = {"domain_name": "umi", "raw_action_dim": 7, "history_length": 1}
    assert read_policy(said) == Policy("umi", 7, state=True, history=1)
    assert read_policy({"domain_name": "umi", "use_state": False, "chunk": None}) == Policy(
        "umi", state=False, history=0
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"domain_name": 8}, "domain_name = 8 is no str"),
        ({"raw_action_dim": "8"}, "raw_action_dim = '8' is no int"),
        ({"raw_action_dim": True}, "is no int"),
        ({"action_dim": 0}, "action_dim = 0 is not within"),
        ({"raw_action_dim": 8, "action_dim": 10}, "raw_action_dim is 8 and action_dim is 10"),
        ({"chunk": 16, "action_chunk_size": 32}, "action_chunk_size is 32 and chunk is 16"),
        ({"fps": -1}, "fps = -1 is not a rate"),
        ({"use_state": "true"}, "use_state = 'true' is no bool"),
        ({"use_state": False, "history_length": 1}, "use_state is false and history_length is 1"),
    ],
)
def test_fields_that_cannot_be_are_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint(tmp_path, **fields)
    assert caught.value.code == "CX103" and words in caught.value.message


def test_a_bundle_knows_its_policy(tmp_path: Path) -> None:
    """The tiny model has 8 columns: what checkpoint.json says comes before what is usual."""
    found = checkpoint(tmp_path / "a", domain_name="droid_lerobot", raw_action_dim=7, use_state=True, fps=10, chunk=16)
    record = request_record(found, ALL, None)
    assert record.policy == PolicyRecord("droid_lerobot", 7, 16, 10.0, True)
    robot = policy_of(record)
    assert robot is not None and (robot.name, robot.width, robot.chunk, robot.fps) == ("droid_lerobot", 7, 16, 10.0)
    notes = " ".join(policy_notes(found))
    assert robot.history == 1 and "7 columns; policies for droid_lerobot usually have 8" in notes
    plain = checkpoint(tmp_path / "b", domain_name="droid_lerobot")
    robot = policy_of(request_record(plain, ALL, None))
    assert robot is not None and (robot.width, robot.chunk, robot.fps, robot.history) == (8, 32, 15.0, 1)
    assert "does not say whether" in " ".join(policy_notes(plain)) and "wants it" in " ".join(policy_notes(plain))
    assert policy_of(
        request_record(checkpoint(tmp_path / "f", domain_name="droid_lerobot", history_length=3), ALL, None)
    ) == replace(robot, history=3)
    (unread,) = policy_notes(checkpoint(tmp_path / "c", domain_name="droid_lerobot", use_state=False, norm_stats={}))
    assert unread == "fields of the policy in checkpoint.json that are not read: 'norm_stats'"
    assert request_record(open_checkpoint(write_checkpoint(tmp_path / "d")), ALL, None).policy is None
    for fields, words in (({"raw_action_dim": 9}, "the model has 8"), ({"chunk": 30}, "not a multiple of 4")):
        wrong = checkpoint(tmp_path / f"e{len(fields)}{words[-1]}", domain_name="droid_lerobot", **fields)
        with pytest.raises(UserError, match=words) as caught:
            request_record(wrong, ALL, None)
        assert caught.value.code == "CX103"


def test_inspect_says_that_the_state_is_wanted(tmp_path: Path) -> None:
    checkpoint(tmp_path, domain_name="droid_lerobot", use_state=True, norm_stats={"q01": []})
    text = " ".join(CliRunner().invoke(app, ["inspect", str(tmp_path)]).output.split())
    assert "given the robot's state as its first action row" in text
    assert "policy in checkpoint.json that are not read: norm_stats" in text
