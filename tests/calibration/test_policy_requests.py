"""A policy checkpoint on a robot's data: its own profile, the one picture of its cameras, and the state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_samples
import numpy as np
import pyarrow.parquet as pq
import pytest

from cosmos_export.calibration.calibrate import CalibrationJob, lineage, pixels
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler.calibrate_checkpoint import resolve_calibration
from cosmos_export.options import CalibrateOptions
from cosmos_export.runtime import canvas, read_media
from cosmos_export.runtime.step_inputs import request_inputs, sizes
from cosmos_export.runtime.views import bilinear

CAMERAS = ("wrist_image_left", "exterior_image_1_left", "exterior_image_2_left")
JOINTS, GRIPPER = data_samples.actions(40, 7, seed=3), np.tile([[0.0], [0.25]], (20, 1)).astype(np.float32)
STATE = JOINTS + 1


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An episode of 40 rows with three cameras of 64 × 36, joints, the gripper and the state, by DROID's names."""
    root = data_samples.write_lerobot(tmp_path_factory.mktemp("data") / "robot", episodes=1, length=40, width=8)
    (table,) = (root / "data").rglob("*.parquet")
    columns = pq.read_table(table).to_pydict()
    del columns["action"]
    columns |= {
        "action.gripper_position": GRIPPER[:, 0].tolist(), "action.joint_position": JOINTS.tolist(),
        "observation.state.joint_positions": STATE.tolist(),
        "observation.state.gripper_position": GRIPPER[:, 0].tolist(),
    }  # fmt: skip
    data_samples._table(table, columns)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] = {f"observation.image.{name}": {"dtype": "video", "shape": [36, 64, 3]} for name in CAMERAS}
    (root / "meta/info.json").write_text(json.dumps(info | {"robot_type": "panda"}))
    for number, name in enumerate(CAMERAS):
        clip = root / f"videos/observation.image.{name}/chunk-000/file-000.mp4"
        data_samples.write_clip(clip, 40, 15, height=36, seed=number)
    return root


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, robot: Path) -> CalibrationJob:
    root = tmp_path_factory.mktemp("checkpoint")
    path = write_demo_checkpoint(root / "tiny", layers=1)
    stated = {"policy": {"domain_name": "droid_lerobot", "raw_action_dim": 8, "use_state": True}}
    (path / "checkpoint.json").write_text(json.dumps(stated))
    asked: dict[str, Any] = {"modalities": ("vision", "action"), "samples": 24}
    return resolve_calibration(CalibrateOptions(path, root / "scales", (str(robot),), **asked))


def test_a_policy_is_shown_its_own_profile(job: CalibrationJob) -> None:
    by_mode = {work.request.mode: work for work in job.works}
    assert set(by_mode) == {"policy", "forward-dynamics", "inverse-dynamics"}
    for work in by_mode.values():
        request = work.request
        assert (request.frames, request.height, request.width, request.fps) == (33, 33, 40, 15.0)
        assert request.action is not None and (request.action.domain, request.action.raw_dim) == (8, 8)
    policy = by_mode["policy"].request.action
    assert policy is not None and (policy.rows, policy.first_position, policy.given_rows) == (33, 0, 1)
    assert all(work.request.action.rows == 32 for mode, work in by_mode.items() if mode != "policy")  # type: ignore[union-attr]


def test_the_state_is_the_first_row_and_the_gripper_is_turned_around(job: CalibrationJob) -> None:
    (work,) = (work for work in job.works if work.request.mode == "policy")
    expected = np.concatenate(
        [np.concatenate([STATE[:1], JOINTS[:32]]), 1 - np.concatenate([GRIPPER[:1], GRIPPER[:32]])], 1
    )
    assert work.given is not None and work.request.action is not None and work.request.action.given is not None
    np.testing.assert_array_equal(work.given, expected.astype(np.float32))
    np.testing.assert_array_equal(work.request.action.given, expected[:1].astype(np.float32))
    inputs = request_inputs(work.request, job.record, sizes(work.request, job.record))
    np.testing.assert_array_equal(inputs["action_mask"], [0.0] + [1.0] * 32)


def test_the_picture_is_that_of_the_published_server(job: CalibrationJob, robot: Path) -> None:
    """The wrist over two views at half its size, brought to 640 × 540, on the canvas that `run` has for it."""
    work = job.works[0]
    assert work.canvas is not None and work.canvas.whole and work.canvas.rounded == (540, 640)
    found = pixels(work, job.record)
    clips = [
        np.asarray(read_media.read_clip(robot / f"videos/observation.image.{name}/chunk-000/file-000.mp4", 33).frames)
        for name in CAMERAS
    ]
    for index in (0, 32):
        wrist, left, right = (clip[index] for clip in clips)
        below = np.concatenate([bilinear(left, 18, 32), bilinear(right, 18, 32)], axis=1)
        picture = bilinear(np.concatenate([wrist, below]), 540, 640)
        np.testing.assert_array_equal(found[:, index], canvas.action_canvas(picture[None], work.canvas)[:, 0])


def test_the_caption_speaks_of_the_cameras(job: CalibrationJob) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.checkpoint.root / "text_tokenizer/tokenizer.json"))
    text = tokenizer.decode(job.works[0].request.input_ids.tolist())
    assert "wrist-mounted camera" in text and "from opposite sides" in text


def test_lineage_has_no_statistics_where_none_are_used(job: CalibrationJob) -> None:
    (source,) = lineage(job)["sources"]
    assert "statistics" not in source and source["modes"]["policy"] == 1
