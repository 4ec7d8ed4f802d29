"""Robot data by names: columns, cameras, instructions and rates are those that the embodiment wants, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import data_samples
import numpy as np
import pyarrow.parquet as pq
import pytest

from cosmos_export.calibration.sources import Source, read_source
from cosmos_export.diagnostics import UserError
from cosmos_export.embodiments import policy_embodiment

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "lerobot_droid"
POLICY = policy_embodiment("droid_lerobot", chunk=16, history=0)
"""Without the state, and of one camera where `camera=` says so."""
JOINTS = data_samples.actions(40, 7, seed=3)
GRIPPER = data_samples.actions(40, 1, seed=4)


def refused(code: str, call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


def data_set(
    root: Path, columns: Mapping[str, Any], *, features: Mapping[str, Any] | None = None, version: str = "v3.0"
) -> Path:
    """Two episodes of 20 rows with ``columns`` in place of `action`; ``features`` go into info.json."""
    data_samples.write_lerobot(root, version)
    for number, path in enumerate(sorted((root / "data").rglob("*.parquet"))):
        table = pq.read_table(path).to_pydict()
        del table["action"]
        rows = len(table["episode_index"])
        mine = slice(number * rows, (number + 1) * rows)
        values = {name: np.asarray(value)[mine].tolist() for name, value in columns.items()}
        path.unlink()
        data_samples._table(path, {**values, **table})
    file = root / "meta" / "info.json"
    document = json.loads(file.read_text())
    del document["features"]["action"]
    document["features"] |= features or {}
    file.write_text(json.dumps(document))
    (root / "meta" / "stats.json").unlink()
    return root


def first(source: Source) -> np.ndarray:
    actions = source.items[0].actions
    assert actions is not None
    return actions


EXPECTED = np.concatenate([JOINTS, GRIPPER], axis=1)[:16]
"""The first window: the robot's own numbers, which are the policy's but for the gripper, turned around later."""
NAMES = ["gripper", *(f"joint_{number}" for number in range(7))]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(
    ("columns", "left_out"),
    [
        ({"action.gripper_position": GRIPPER[:, 0], "action.joint_position": JOINTS}, None),
        ({"action.joint_position": JOINTS, "action.gripper_position": GRIPPER}, None),
        (
            {
                "action.cartesian_position": JOINTS,
                "action.gripper_positions": GRIPPER,
                "action.joint_positions": JOINTS,
            },
            "action.cartesian_position",
        ),
        (
            {"action.joint_velocity": JOINTS + 1, "action.joint_position": JOINTS, "action.gripper_position": GRIPPER},
            "action.joint_velocity",
        ),
    ],
)
def test_a_policy_for_joints_has_the_gripper_last(
    tmp_path: Path, version: str, columns: dict[str, Any], left_out: str | None
) -> None:
    source = read_source(f"{data_set(tmp_path / 'robot', columns, version=version)},camera=front", POLICY)
    assert source.items[0].embodiment == "droid_lerobot"
    np.testing.assert_allclose(first(source), EXPECTED, atol=1e-5)
    notes = [note for note in source.notes if "columns that are not read" in note]
    assert len(notes) == (left_out is not None)
    assert left_out is None or f"not read: {left_out};" in notes[0]


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (range(8), [*NAMES[1:], "gripper"]),
        ([7, 0, 1, 2, 3, 4, 5, 6], NAMES),
        ([7, 6, 5, 4, 3, 2, 1, 0], ["gripper_position", *(f"joint_position.{n}" for n in reversed(range(7)))]),
        (range(8), None),
    ],
)
@pytest.mark.parametrize("key", [None, "motors"])
def test_elements_are_ordered_by_their_names(
    tmp_path: Path, order: Sequence[int], names: list[str] | None, key: str | None
) -> None:
    whole = np.concatenate([JOINTS, GRIPPER], axis=1)[:, list(order)]
    feature = {"dtype": "float32", "shape": [8], "names": {key: names} if key and names else names}
    root = data_set(tmp_path / "robot", {"action": whole}, features={"action": feature})
    source = read_source(f"{root},camera=front", POLICY)
    np.testing.assert_allclose(first(source), EXPECTED, atol=1e-5)


def test_an_element_too_many_is_named(tmp_path: Path) -> None:
    whole = np.concatenate([JOINTS, GRIPPER, GRIPPER], axis=1)
    feature = {"names": [*NAMES[1:], "gripper", "terminate"]}
    root = data_set(tmp_path / "robot", {"action": whole}, features={"action": feature})
    source = read_source(f"{root},camera=front", POLICY)
    np.testing.assert_allclose(first(source), EXPECTED, atol=1e-5)
    assert "elements of action that are not read: terminate" in source.notes


@pytest.mark.parametrize(
    ("columns", "names", "code", "words"),
    [
        ({"action.joint_position": JOINTS}, None, "CX342", "there is no action.gripper_position (1)"),
        ({"action.gripper_position": GRIPPER}, None, "CX342", "there is no action.joint_position (7)"),
        (
            {"action.joint_position": JOINTS[:, 0], "action.gripper_position": GRIPPER}, None, "CX611",
            "action.joint_position has 1 columns; actions of `droid_lerobot` are 7 of joint_position, then 1 of",
        ),
        ({"action": JOINTS}, None, "CX611", "has 7 columns; actions of `droid_lerobot` have 8"),
        ({"action": np.zeros((40, 10))}, None, "CX611", "has 10 columns"),
        ({"action": np.zeros((40, 8))}, ["x", "y", "z", "a", "b", "c", "w", "gripper"], "CX342", "0 elements called"),
        ({"observation.state": JOINTS}, None, "CX342", "no action column"),
    ],
)  # fmt: skip
def test_columns_that_are_missing_or_of_something_else(
    tmp_path: Path, columns: dict[str, Any], names: list[str] | None, code: str, words: str
) -> None:
    root = data_set(tmp_path / "robot", columns, features={"action": {"names": names}} if names else None)
    error = refused(code, lambda: read_source(f"{root},camera=front", POLICY))
    assert words in error.message and error.hint


def test_columns_that_are_named(tmp_path: Path) -> None:
    columns = {"action.a": JOINTS, "action.b": GRIPPER, "action.c": data_samples.actions(40, 2)}
    root = data_set(tmp_path / "robot", columns)
    refused("CX342", lambda: read_source(f"{root},camera=front", POLICY))
    np.testing.assert_allclose(
        first(read_source(f"{root},camera=front,actions=a,action.b,limit=1", POLICY)), EXPECTED, atol=1e-5
    )
    swapped = first(read_source(f"{root},camera=front,actions=b,a,limit=1", POLICY))
    np.testing.assert_allclose(swapped, EXPECTED[:, [7, *range(7)]], atol=1e-5)
    assert "has 9 columns" in refused("CX611", lambda: read_source(f"{root},camera=front,actions=a,c", POLICY)).message
    assert "no such column" in refused("CX342", lambda: read_source(f"{root},camera=front,actions=a,d", POLICY)).message
    for bad in ("actions=a,a", "actions=a,,b", "actions="):
        refused("CX341", lambda bad=bad: read_source(f"{root},camera=front,{bad}", POLICY))  # type: ignore[misc]
    whole = data_set(
        tmp_path / "whole",
        {"action": np.concatenate([GRIPPER, JOINTS], axis=1)},
        features={"action": {"names": list("gabcdefh")}},
    )
    refused("CX342", lambda: read_source(f"{whole},camera=front", POLICY))
    named = first(read_source(f"{whole},camera=front,actions=a,b,c,d,e,f,h,g", POLICY))
    np.testing.assert_allclose(named, EXPECTED, atol=1e-5)


def test_the_base_model_has_changes_of_a_pose(tmp_path: Path) -> None:
    joints = data_set(tmp_path / "joints", {"action.gripper_position": GRIPPER, "action.joint_position": JOINTS})
    error = refused("CX611", lambda: read_source(f"{joints},embodiment=droid_lerobot"))
    assert "positions of joints (action.joint_position)" in error.message and "end effector's pose" in error.message
    several = data_set(tmp_path / "several", {"action.delta": np.zeros((40, 9)), "action.gripper": GRIPPER})
    error = refused("CX342", lambda: read_source(f"{several},embodiment=droid_lerobot"))
    assert "nothing says their order" in error.message and "actions=" in error.hint
    found = read_source(f"{several},actions=delta,gripper,embodiment=droid_lerobot,stats=own")
    assert first(found).shape == (16, 10)
    for width in (2, 7, 9, 14):
        root = data_set(tmp_path / f"w{width}", {"action": data_samples.actions(40, width)})
        message = refused("CX611", lambda root=root: read_source(str(root))).message  # type: ignore[misc]
        assert f"has {width} columns; actions of `umi` have 10" in message


def test_poses_become_their_changes(tmp_path: Path) -> None:
    """The convention of NVIDIA's framework, written down with another library's rotations."""
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    poses = data_samples.actions(40, 6, seed=5).astype(np.float64)
    columns = {
        "action.joint_position": JOINTS, "action.gripper_position": GRIPPER[:, 0],
        "observation.state.cartesian_position": poses,
    }  # fmt: skip
    root = data_set(tmp_path / "robot", columns)
    source = f"{root},embodiment=droid_lerobot"
    error = refused("CX613", lambda: read_source(source))
    assert "no data set" in error.message and "stats=own" in error.hint
    found = read_source(f"{source},stats=none")
    quarter = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    absolute = np.tile(np.eye(4), (17, 1, 1))
    absolute[:, :3, :3] = rotation.from_euler("xyz", poses[:17, 3:]).as_matrix() @ quarter
    absolute[:, :3, 3] = poses[:17, :3]
    change = np.linalg.inv(absolute[:-1]) @ absolute[1:]
    expected = np.concatenate([change[:, :3, 3], change[:, :3, 0], change[:, :3, 1], 1 - GRIPPER[:16]], axis=1)
    np.testing.assert_allclose(first(found), expected, atol=1e-6)
    assert any("changes of observation.state.cartesian_position" in note for note in found.notes)
    # The second episode begins anew: its first change is not from the last pose of the first.
    assert found.items[1].actions is not None
    start = np.linalg.inv(rotation.from_euler("xyz", poses[20, 3:]).as_matrix() @ quarter)
    np.testing.assert_allclose(found.items[1].actions[0, :3], start @ (poses[21, :3] - poses[20, :3]), atol=1e-6)


RAW = np.random.default_rng(1).normal(size=(40, 10)) * np.logspace(-3, 1, 10)
LOW, HIGH = np.quantile(RAW, [0.01, 0.99], axis=0)
MODEL = np.clip((RAW[:16] - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2), -1, 1)


QUANTILES = {"q01": LOW.tolist(), "q99": HIGH.tolist()}
OPENPI = {"q01": [*LOW, 0.0], "q99": [*HIGH, 0.0], "mean": [0.0] * 11, "std": [1.0] * 11}
"""With a number for a column of padding."""


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize(
    ("name", "document", "key"),
    [
        ("meta/stats.json", {"action": data_samples.statistics(RAW), "reward": {"q01": [0], "q99": [1]}}, ""),
        ("stats.json", {"action": data_samples.statistics(RAW)}, "stats"),
        ("published.json", {"global": QUANTILES}, "stats"),
        ("plain.json", QUANTILES, "stats"),
        ("norm_stats.json", {"norm_stats": {"state": {"q01": [0.0]}, "actions": OPENPI}}, "stats"),
        ("", {}, "own"),
    ],
)
def test_statistics_of_each_kind(tmp_path: Path, version: str, name: str, document: Any, key: str) -> None:
    root = data_set(tmp_path / "robot", {"action": RAW}, version=version)
    error = refused("CX613", lambda: read_source(str(root)))
    assert "there is no meta/stats.json" in error.message and "stats=own" in error.hint
    if name:
        (root / name).write_text(json.dumps(document))
    asked = {"": "", "stats": f",stats={root / name}", "own": ",stats=own"}[key]
    source = read_source(f"{root}{asked}")
    np.testing.assert_allclose(first(source), MODEL, atol=1e-5)
    said = "their own 1 % and 99 % quantiles" if key == "own" else f"statistics of {name} (quantile)"
    assert any(said in note for note in source.notes)
    assert source.scale is not None and source.scale.method == "quantile"


def test_other_statistics_and_those_that_do_not_fit(tmp_path: Path) -> None:
    root = data_set(tmp_path / "robot", {"action": RAW})
    old = {key: value for key, value in data_samples.statistics(RAW).items() if not key.startswith("q")}
    (root / "meta/stats.json").write_text(json.dumps({"action": old}))
    error = refused("CX613", lambda: read_source(str(root)))
    assert "statistics for minmax, meanstd, not for `quantile`" in error.message and "minmax" in error.hint
    mean = (RAW[:16] - RAW.mean(0)) / RAW.std(0)
    np.testing.assert_allclose(first(read_source(f"{root},normalization=meanstd")), mean, atol=1e-4)
    (root / "meta/stats.json").write_text(json.dumps({"action": data_samples.statistics(RAW[:, :7])}))
    assert "`q01` is 7 values" in refused("CX613", lambda: read_source(str(root))).message
    (root / "meta/stats.json").write_text(json.dumps({"observation.state": {}, "reward": {}}))
    message = refused("CX613", lambda: read_source(str(root))).message
    assert "observation.state" in message and "reward" in message and "no statistics of actions" in message
    refused("CX341", lambda: read_source(f"{root},normalization=l2"))
    # A column of its own for each part, in the order in which they make an action.
    split = data_set(tmp_path / "split", {"action.b": RAW[:, 9:], "action.a": RAW[:, :9]})
    parts = {f"action.{name}": data_samples.statistics(part) for name, part in (("b", RAW[:, 9:]), ("a", RAW[:, :9]))}
    (split / "meta/stats.json").write_text(json.dumps(parts))
    np.testing.assert_allclose(first(read_source(f"{split},actions=a,b")), MODEL, atol=1e-5)


def test_keys_that_would_not_be_read(tmp_path: Path) -> None:
    root = data_samples.write_lerobot(tmp_path / "robot")
    assert "`umi` is given no state" in refused("CX341", lambda: read_source(f"{root},state=a")).message
    assert "stats=own" in refused("CX341", lambda: read_source(f"{root},stats=own,normalization=minmax")).message
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A robot folds a towel.")
    for key in ("cameras=a,b", "camera=a", "actions=a", "state=a", "stats=own", "normalization=minmax"):
        message = refused("CX341", lambda key=key: read_source(f"{prompts},{key}")).message  # type: ignore[misc]
        assert "is for LeRobot data sets" in message


def test_the_policys_numbers_are_the_robots_own(tmp_path: Path) -> None:
    root = data_set(tmp_path / "robot", {"action.joint_position": JOINTS, "action.gripper_position": GRIPPER})
    error = refused("CX341", lambda: read_source(f"{root},camera=front,stats=own", POLICY))
    assert "trained on the robot's own numbers" in error.message
    assert read_source(f"{root},camera=front", POLICY).scale is None


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        (np.tile([0.0015, -0.0008, 0.001, 1, 0, 0, 0, 1, 0, 1.0], (40, 1)), "about 6.7e+02 times less"),
        (np.full((40, 10), 0.002), "about 5e+02 times less"),
        (RAW, ""),
    ],
)
def test_numbers_that_cannot_be_the_models(tmp_path: Path, actions: np.ndarray, said: str) -> None:
    root = data_set(tmp_path / "robot", {"action": actions})
    notes = [note for note in read_source(f"{root},stats=none").notes if "the model's own numbers" in note]
    assert len(notes) == bool(said) and all(said in note for note in notes)


@pytest.mark.parametrize("kind", ["Franka", "panda", "droid"])
def test_names_of_robots(tmp_path: Path, kind: str) -> None:
    root = data_samples.write_lerobot(tmp_path / "robot")
    info = root / "meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"robot_type": kind}))
    source = read_source(str(root))
    assert source.items[0].embodiment == "droid_lerobot"
    assert any("is taken as embodiment droid_lerobot" in note for note in source.notes)


@pytest.mark.skipif(not SAMPLE.exists(), reason="the data set is not on this machine")
def test_the_published_sample_lacks_joints() -> None:
    message = refused("CX611", lambda: read_source(str(SAMPLE), policy_embodiment("droid_lerobot"))).message
    assert "action.joint_position has 1 columns" in message and "7 of joint_position, then 1 of gripper" in message
    # The base model is shown changes of its poses.
    found = read_source(f"{SAMPLE},stats=own,limit=2")
    assert first(found).shape == (16, 10) and found.items[0].embodiment == "droid_lerobot"


def write_droid(root: Path, cameras: Sequence[str]) -> Path:
    """A data set with a clip of its own for each of ``cameras``, and with joints and the gripper."""
    columns = {
        "observation.state.joint_positions": JOINTS + 1, "observation.state.gripper_position": GRIPPER[:, 0],
        "action.joint_position": JOINTS, "action.gripper_position": GRIPPER[:, 0],
    }  # fmt: skip
    features = {f"observation.image.{name}": picture() for name in cameras}
    data_set(root, columns, features=features)
    for number, name in enumerate(features):
        data_samples.write_clip(root / f"videos/{name}/chunk-000/file-000.mp4", 40, 15, seed=number)
    return root


DROID = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")


@pytest.mark.parametrize("asked", ["", ",cameras=wrist,left,right", f",cameras={','.join((DROID[2], *DROID[:2]))}"])
def test_the_cameras_of_a_policy_are_in_the_order_of_its_picture(tmp_path: Path, asked: str) -> None:
    source = read_source(f"{write_droid(tmp_path / 'robot', DROID)}{asked}", POLICY)
    item = source.items[0]
    assert item.clip is not None
    shown = [part.path.parent.parent.name.rpartition(".")[2] for part in (item.clip, *item.cameras)]
    assert shown == ["wrist_image_left", "exterior_image_1_left", "exterior_image_2_left"]
    (note,) = (note for note in source.notes if "are shown" in note)
    assert note.endswith("and not observation.images.front: cameras=… chooses others")


def test_a_camera_of_a_policy_that_is_missing(tmp_path: Path) -> None:
    root = write_droid(tmp_path / "robot", DROID[:2])
    error = refused("CX342", lambda: read_source(str(root), POLICY))
    assert "no video of wrist_image_left" in error.message and "wrist,left,right" in error.hint
    refused("CX342", lambda: read_source(f"{root},cameras=wrist,left,right", POLICY))
    message = refused("CX342", lambda: read_source(f"{root},cameras=left,right", POLICY)).message
    assert "one camera, or 3" in message
    (item, *_) = read_source(f"{root},cameras=front,left,right", POLICY).items
    assert item.clip is not None and "front" in str(item.clip.path) and len(item.cameras) == 2


def test_the_state_of_a_policy(tmp_path: Path) -> None:
    root = write_droid(tmp_path / "robot", DROID)
    policy = policy_embodiment("droid_lerobot", chunk=16)
    item = read_source(str(root), policy).items[1]
    assert item.state is not None
    np.testing.assert_allclose(item.state, np.concatenate([JOINTS + 1, GRIPPER], axis=1)[20:21])
    assert "actions of `droid_lerobot`" in refused(
        "CX611", lambda: read_source(f"{root},state=joint_positions", policy)
    ).message  # fmt: skip
    other = data_set(tmp_path / "other", {"action.joint_position": JOINTS, "action.gripper_position": GRIPPER})
    error = refused("CX342", lambda: read_source(f"{other},camera=front", policy))
    assert "is given the robot's state" in error.message and "state=" in error.hint


def picture(**info: Any) -> dict[str, Any]:
    return {"dtype": "video", "shape": [48, 64, 3], "info": info}


def test_depth_maps_are_no_pictures_and_other_cameras_are_named(tmp_path: Path) -> None:
    cameras = {
        "observation.images.depth": picture(**{"video.is_depth_map": True}),
        "observation.images.a_map": picture(is_depth_map=True),
        "observation.images.side": picture(**{"video.is_depth_map": False}),
    }
    root = data_samples.write_lerobot(tmp_path / "robot")
    file = root / "meta" / "info.json"
    document = json.loads(file.read_text())
    document["features"] |= cameras
    file.write_text(json.dumps(document))
    for name in cameras:
        data_samples.write_clip(root / f"videos/{name}/chunk-000/file-000.mp4", 40, 15)
    source = read_source(str(root))
    clip = source.items[0].clip
    assert clip is not None and data_samples.CAMERA in str(clip.path)
    notes = " | ".join(source.notes)
    assert f"{data_samples.CAMERA} is shown, and not observation.images.side" in notes
    assert "depth maps are not shown: observation.images.a_map, observation.images.depth" in notes
    for key in ("camera=side", "cameras=observation.images.side"):
        clip = read_source(f"{root},{key}").items[0].clip
        assert clip is not None and "observation.images.side" in str(clip.path)
    assert "is a depth map" in refused("CX342", lambda: read_source(f"{root},camera=depth")).message
    assert "`umi` is shown one camera" in refused("CX342", lambda: read_source(f"{root},cameras=front,side")).message
    refused("CX341", lambda: read_source(f"{root},camera=front,cameras=side"))


def tasks(root: Path, by_row: Sequence[int] | None, said: Sequence[str], words: Mapping[int, str]) -> Path:
    """``root`` with the task of each row, of each episode, and what tasks are called."""
    (table,) = (root / "data").rglob("*.parquet")
    columns = pq.read_table(table).to_pydict()
    if by_row is not None:
        data_samples._table(table, {**columns, "task_index": list(by_row)})
    (file,) = (root / "meta/episodes").rglob("*.parquet")
    data_samples._table(file, {**pq.read_table(file).to_pydict(), "tasks": [[one] for one in said]})
    index = {"task_index": list(words), "__index_level_0__": list(words.values())}
    data_samples._table(root / "meta/tasks.parquet", index)
    return root


@pytest.mark.parametrize(
    ("by_row", "said", "words", "expected"),
    [
        ([1] * 20 + [0] * 20, ["x", "y"], {0: "open", 1: "close"}, ["close", "open"]),
        ([0] * 20 + [1] * 20, ["open", ""], {0: "open", 1: ""}, ["open", ""]),
        (None, ["open", ""], {0: "open"}, ["open", ""]),
        (None, ["", ""], {0: "open"}, ["", ""]),
        ([0] * 20 + [1] * 20, ["", ""], {0: " |  | ", 1: "open | shut | "}, ["", "open"]),
    ],
)
def test_an_instruction_is_never_another_episodes(
    tmp_path: Path, by_row: list[int] | None, said: list[str], words: dict[int, str], expected: list[str]
) -> None:
    source = read_source(str(tasks(data_samples.write_lerobot(tmp_path / "robot"), by_row, said, words)))
    assert [item.prompt.text for item in source.items] == expected
    count = expected.count("")
    assert (f"{count} of 2 windows have no instruction" in source.notes) == bool(count)


def test_every_window_has_one_annotation(tmp_path: Path) -> None:
    root = data_samples.write_lerobot(tmp_path / "robot", episodes=1, length=60)
    source = read_source(str(tasks(root, [0] * 60, ["x"], {0: "open it | pull it"})))
    assert [item.prompt.text for item in source.items] == ["open it", "pull it", "open it"]
    root = tasks(data_samples.write_lerobot(tmp_path / "other"), [7] * 40, ["x", "y"], {0: "open"})
    assert "task_index 7" in refused("CX342", lambda: read_source(str(root))).message


def test_version_2_without_tasks(tmp_path: Path) -> None:
    root = data_samples.write_lerobot(tmp_path / "robot", "v2.1")
    lines = [{"episode_index": index, "length": 20} for index in range(2)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = read_source(str(root))
    assert [item.prompt.text for item in source.items] == ["", ""]
    assert "2 of 2 windows have no instruction" in source.notes


def test_chunk_and_rate_are_the_policys(tmp_path: Path) -> None:
    root = data_samples.write_lerobot(tmp_path / "robot", episodes=1, length=40, width=8)
    policy = policy_embodiment("droid_lerobot", history=0)
    root = f"{root},camera=front"
    (item,) = read_source(root, policy).items
    assert item.actions is not None and item.actions.shape == (32, 8)
    assert item.clip is not None and item.clip.count == 33
    info = tmp_path / "robot/meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fps": 30}))
    error = refused("CX343", lambda: read_source(root, policy))
    assert "trained at 15" in error.message and "fps=30" in error.hint
    assert any("usually has 15" in note for note in read_source(f"{root},fps=30", policy).notes)
    refused("CX343", lambda: read_source(f"{root},fps=15", policy))
    error = refused("CX610", lambda: read_source(f"{root},embodiment=umi", policy))
    assert "a policy for `droid_lerobot` only" in error.message
