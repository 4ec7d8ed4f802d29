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
POLICY = policy_embodiment("droid_lerobot", chunk=16)
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
    return root


def scaled(raw: np.ndarray) -> np.ndarray:
    """The first window of ``raw`` between the quantiles of all of it."""
    low, high = np.quantile(raw, [0.01, 0.99], axis=0)
    return np.clip((raw[:16] - (low + high) / 2) / ((high - low) / 2), -1, 1)


def first(source: Source) -> np.ndarray:
    actions = source.items[0].actions
    assert actions is not None
    return actions


EXPECTED = scaled(np.concatenate([JOINTS, GRIPPER], axis=1))
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
    source = read_source(str(data_set(tmp_path / "robot", columns, version=version)), POLICY)
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
    source = read_source(str(data_set(tmp_path / "robot", {"action": whole}, features={"action": feature})), POLICY)
    np.testing.assert_allclose(first(source), EXPECTED, atol=1e-5)


def test_an_element_too_many_is_named(tmp_path: Path) -> None:
    whole = np.concatenate([JOINTS, GRIPPER, GRIPPER], axis=1)
    feature = {"names": [*NAMES[1:], "gripper", "terminate"]}
    source = read_source(str(data_set(tmp_path / "robot", {"action": whole}, features={"action": feature})), POLICY)
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
    error = refused(code, lambda: read_source(str(root), POLICY))
    assert words in error.message and error.hint


def test_columns_that_are_named(tmp_path: Path) -> None:
    columns = {"action.a": JOINTS, "action.b": GRIPPER, "action.c": data_samples.actions(40, 2)}
    root = data_set(tmp_path / "robot", columns)
    refused("CX342", lambda: read_source(str(root), POLICY))
    np.testing.assert_allclose(first(read_source(f"{root},actions=a,action.b,limit=1", POLICY)), EXPECTED, atol=1e-5)
    swapped = first(read_source(f"{root},actions=b,a,limit=1", POLICY))
    np.testing.assert_allclose(swapped, EXPECTED[:, [7, *range(7)]], atol=1e-5)
    assert "has 9 columns" in refused("CX611", lambda: read_source(f"{root},actions=a,c", POLICY)).message
    assert "no such column" in refused("CX342", lambda: read_source(f"{root},actions=a,d", POLICY)).message
    for bad in ("actions=a,a", "actions=a,,b", "actions="):
        refused("CX341", lambda bad=bad: read_source(f"{root},{bad}", POLICY))  # type: ignore[misc]
    whole = data_set(
        tmp_path / "whole",
        {"action": np.concatenate([GRIPPER, JOINTS], axis=1)},
        features={"action": {"names": list("gabcdefh")}},
    )
    refused("CX342", lambda: read_source(str(whole), POLICY))
    named = first(read_source(f"{whole},actions=a,b,c,d,e,f,h,g", POLICY))
    np.testing.assert_allclose(named, EXPECTED, atol=1e-5)


def test_the_base_model_has_changes_of_a_pose(tmp_path: Path) -> None:
    joints = data_set(tmp_path / "joints", {"action.gripper_position": GRIPPER, "action.joint_position": JOINTS})
    error = refused("CX611", lambda: read_source(f"{joints},embodiment=droid_lerobot"))
    assert "positions of joints (action.joint_position)" in error.message and "end effector's pose" in error.message
    several = data_set(tmp_path / "several", {"action.delta": np.zeros((40, 9)), "action.gripper": GRIPPER})
    error = refused("CX342", lambda: read_source(f"{several},embodiment=droid_lerobot"))
    assert "nothing says their order" in error.message and "actions=" in error.hint
    found = read_source(f"{several},actions=delta,gripper,embodiment=droid_lerobot")
    assert first(found).shape == (16, 10)
    for width in (2, 7, 9, 14):
        root = data_set(tmp_path / f"w{width}", {"action": data_samples.actions(40, width)})
        message = refused("CX611", lambda root=root: read_source(str(root))).message  # type: ignore[misc]
        assert f"has {width} columns; actions of `umi` have 10" in message


@pytest.mark.skipif(not SAMPLE.exists(), reason="the data set is not on this machine")
def test_the_published_sample_lacks_joints() -> None:
    message = refused("CX611", lambda: read_source(str(SAMPLE), policy_embodiment("droid_lerobot"))).message
    assert "action.joint_position has 1 columns" in message and "7 of joint_position, then 1 of gripper" in message
    error = refused("CX611", lambda: read_source(f"{SAMPLE},embodiment=droid_lerobot"))
    assert "positions of joints" in error.message


def picture(**info: Any) -> dict[str, Any]:
    return {"dtype": "video", "shape": [48, 64, 3], "info": info}


def test_depth_maps_are_no_pictures_and_other_cameras_are_named(tmp_path: Path) -> None:
    cameras = {
        "observation.images.depth": picture(**{"video.is_depth_map": True}),
        "observation.images.a_map": picture(is_depth_map=True),
        "observation.images.side": picture(**{"video.is_depth_map": False}),
    }
    root = data_set(tmp_path / "robot", {"action": data_samples.actions(40, 10)}, features=cameras)
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
    assert "one camera" in refused("CX341", lambda: read_source(f"{root},cameras=front,side")).message
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
    policy = policy_embodiment("droid_lerobot")
    (item,) = read_source(str(root), policy).items
    assert item.actions is not None and item.actions.shape == (32, 8)
    assert item.clip is not None and item.clip.count == 33
    info = root / "meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fps": 30}))
    error = refused("CX343", lambda: read_source(str(root), policy))
    assert "trained at 15" in error.message and "fps=30" in error.hint
    assert any("usually has 15" in note for note in read_source(f"{root},fps=30", policy).notes)
    refused("CX343", lambda: read_source(f"{root},fps=15", policy))
    error = refused("CX610", lambda: read_source(f"{root},embodiment=umi", policy))
    assert "a policy for `droid_lerobot` only" in error.message
