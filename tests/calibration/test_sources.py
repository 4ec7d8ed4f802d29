"""What people have: each kind of source is read, its hash follows the contents alone, and what is broken is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import data_samples
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from cosmos_export.calibration.source_options import parse_source
from cosmos_export.calibration.sources import Source, read_source
from cosmos_export.diagnostics import UserError


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value.message


def test_lines_of_text_are_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a, b.txt"
    path.write_text("First.\n\n  Second.json \n")
    source = read_source(f"{path},licence=CC0-1.0,origin=real,negative=bad,limit=5")
    assert [item.prompt.text for item in source.items] == ["First.", "Second.json"]
    assert (source.kind, source.licence, source.origin) == ("prompts", "CC0-1.0", "real")
    assert all(item.negative is not None and item.negative.text == "bad" for item in source.items)


def test_objects_say_what_they_are(tmp_path: Path) -> None:
    data_samples.write_clip(tmp_path / "clip.mp4")
    (tmp_path / "actions.json").write_text(json.dumps(data_samples.actions(8, 10).tolist()))
    rows = [
        {"prompt": "A towel.", "video": "clip.mp4", "num_frames": 9, "fps": 12, "negative_prompt": "blur"},
        {"caption_json": {"subjects": ["a cup"]}, "mode": "t2i"},
        {"prompt": "Go.", "vision_path": "clip.mp4", "action_path": "actions.json", "domain_name": "umi",
         "model_mode": "forward_dynamics"},
    ]  # fmt: skip
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second, third = read_source(str(tmp_path / "items.jsonl")).items
    assert first.clip is not None and (first.frames, first.fps) == (9, 12.0)
    assert second.prompt.caption and second.mode == "t2i"
    assert third.actions is not None and third.actions.shape == (8, 10)
    assert (third.embodiment, third.mode) == ("umi", "forward-dynamics")


def test_json_is_a_caption_a_list_or_actions(tmp_path: Path) -> None:
    for name, document in {
        "caption": {"subjects": [{"description": "a robot"}]},
        "list": [{"name": "one", "prompt": "A ball."}, {"name": "two", "prompt": "A cube."}],
        "rows": [[0.0, 1.0], [2.0, 3.0]],
        "object": {"actions": [[0.0, 1.0]]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    found = {path.stem: read_source(str(path)) for path in tmp_path.glob("*.json")}
    assert found["caption"].kind == "caption" and found["caption"].items[0].prompt.caption
    assert [item.prompt.text for item in found["list"].items] == ["A ball.", "A cube."]
    assert found["rows"].kind == found["object"].kind == "actions"
    assert found["rows"].items[0].actions is not None


def test_a_folder_takes_its_pictures_and_clips_with_what_is_beside_them(tmp_path: Path) -> None:
    data_samples.write_clip(tmp_path / "sub" / "b.mp4")
    data_samples.write_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("A picture.\n")
    (tmp_path / "notes.md").write_text("no medium")
    first, second = read_source(str(tmp_path)).items
    assert first.image is not None and first.prompt.text == "A picture."
    assert second.clip is not None and second.prompt.text == ""


def test_what_is_beside_a_picture_is_read_as_what_it_is(tmp_path: Path) -> None:
    for name in "abcd":
        data_samples.write_picture(tmp_path / f"{name}.png")
    (tmp_path / "a.TXT").write_text("A picture.")
    (tmp_path / "b.json").write_text(json.dumps({"subjects": ["a cup"]}))
    (tmp_path / "c.JSON").write_text(json.dumps({"prompt": "A towel.", "negative_prompt": "blur", "model_mode": "t2i"}))
    (tmp_path / "d.txt").write_text("First.")
    (tmp_path / "d.json").write_text(json.dumps({"subjects": ["a cup"]}))
    source = read_source(str(tmp_path))
    a, b, c, d = source.items
    assert (a.prompt.text, d.prompt.text) == ("A picture.", "First.")
    assert b.prompt.caption and b.prompt.text == '{"subjects": ["a cup"]}'
    assert c.negative is not None and (c.prompt.text, c.negative.text, c.mode) == ("A towel.", "blur", "t2i")
    assert all(item.image is not None for item in source.items)
    assert source.notes == ("d.json is not read: d.txt is beside d.png too",)
    (tmp_path / "c.JSON").write_text(json.dumps({"prompt": "A towel.", "image": "a.png"}))
    assert "another picture" in refused("CX340", lambda: read_source(str(tmp_path)))


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"model_mode": "image2sound"}, "model_mode"), ({"mode": 3}, "mode"), ({"fps": "24"}, "fps"),
        ({"num_frames": 9.5}, "num_frames"), ({"negative_prompt": {"a": "b"}}, "negative_prompt"),
        ({"vision_path": ["a.png"]}, "vision_path"), ({"domain_name": 7}, "domain_name"),
    ],
)  # fmt: skip
def test_what_an_entry_says_is_read_or_refused(tmp_path: Path, entry: dict[str, object], word: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"prompt": "A towel.", **entry}))
    assert word in refused("CX340", lambda: read_source(str(path)))
    path.write_text(json.dumps({"prompt": "A towel.", "model_mode": "image2video"}))
    assert read_source(str(path)).items[0].mode == "i2v"


@pytest.mark.parametrize(
    "document", [{}, {"prompts": ["A", "B"]}, {"seed": 3, "num_frames": 5}, {"q01": [0], "q99": [1]}]
)
def test_a_document_that_is_no_caption_is_none(tmp_path: Path, document: dict[str, object]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(document))
    assert "no caption" in refused("CX600", lambda: read_source(str(tmp_path / "x.json")))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_episodes_become_windows(version: str, tmp_path: Path) -> None:
    source = read_source(str(data_samples.write_lerobot(tmp_path / "robot", version)))
    first, second = source.items
    assert [item.prompt.text for item in source.items] == ["task 0", "task 1"]
    for item in source.items:
        assert item.actions is not None and item.actions.shape == (16, 10)
        assert np.abs(item.actions).max() <= 1 and item.embodiment == "umi" and item.fps == 15
    assert first.clip is not None and second.clip is not None
    assert (first.clip.skip, second.clip.skip) == ((0, 20) if version == "v3.0" else (0, 0))
    assert any(data_samples.OTHER_CAMERA in note for note in source.notes)
    # The published normalisation: 1 % and 99 % quantiles of the whole data set become −1 and 1.
    whole = np.concatenate([data_samples.actions(20, 10, seed=index) for index in range(2)])
    low, high = np.quantile(whole, [0.01, 0.99], axis=0)
    expected = np.clip((data_samples.actions(20, 10)[:16] - (low + high) / 2) / ((high - low) / 2), -1, 1)
    np.testing.assert_allclose(first.actions, expected, atol=1e-5)


def test_lerobot_without_video_is_refused(tmp_path: Path) -> None:
    root = data_samples.write_lerobot(tmp_path / "robot")
    shutil.rmtree(root / "videos")
    assert "no video of any camera" in refused("CX342", lambda: read_source(str(root)))


def test_lerobot_that_is_not_as_it_says_is_refused(tmp_path: Path) -> None:
    root = data_samples.write_lerobot(tmp_path / "robot")
    assert "front" in refused("CX342", lambda: read_source(f"{root},camera=nose"))
    assert "no video" in refused("CX342", lambda: read_source(f"{root},camera={data_samples.OTHER_CAMERA}"))
    table = root / "data/chunk-000/file-000.parquet"
    columns = pq.read_table(table).to_pydict()
    columns["action"][7][3] = float("nan")
    data_samples._table(table, columns)
    assert "row 7" in refused("CX342", lambda: read_source(str(root)))
    table.write_bytes(b"not a table")
    assert "not a Parquet file" in refused("CX342", lambda: read_source(str(root)))
    table.unlink()
    assert "missing" in refused("CX342", lambda: read_source(str(root)))
    info = root / "meta/info.json"
    document = json.loads(info.read_text())
    for changes, word in (
        ({"codebase_version": "v9"}, "codebase_version"),
        ({"data_path": "../{episode_index}.parquet"}, "leads out"),
        ({"data_path": "{nonsense}"}, "template"),
        ({"fps": -1}, "rate"),
    ):
        info.write_text(json.dumps(document | changes))
        assert word in refused("CX342", lambda: read_source(str(root)))
    info.write_text(json.dumps(document | {"robot_type": "unheard of"}))
    refused("CX610", lambda: read_source(str(root)))


def test_the_hash_is_of_the_contents(tmp_path: Path) -> None:
    def source(folder: str, names: tuple[str, str], second: int = 1) -> Source:
        for index, name in enumerate(names):
            data_samples.write_picture(tmp_path / folder / name, seed=index and second)
        return read_source(str(tmp_path / folder))

    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
    one, two, three = source("one", ("a.png", "b.png")), source("two", ("y.png", "x.png")), source(
        "three", ("a.png", "b.png"), second=2
    )  # fmt: skip
    assert one.digest == two.digest != three.digest


@pytest.mark.parametrize(
    ("option", "code"),
    [("limit=0", "CX341"), ("origin=unknown", "CX341"), ("mode=t3v", "CX341"), ("fps=-1", "CX341"),
     ("embodiment=dog", "CX610"), ("limit=1,limit=2", "CX341")],
)  # fmt: skip
def test_options_are_checked(option: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A prompt.")
    refused(code, lambda: parse_source(f"{tmp_path / 'a.txt'},{option}"))


def test_actions_say_whose_they_are_and_in_which_units(tmp_path: Path) -> None:
    """As `run` writes them, in both of its formats: another robot's, or in the units of the data, would pass unseen."""
    rows = np.zeros((4, 10), np.float32)

    def write(name: str, **facts: str) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({**facts, "actions": rows.tolist()}))
        save_file({"actions": rows}, tmp_path / f"{name}.safetensors", metadata=facts)

    write("model", units="model", embodiment="umi")
    write("raw", units="raw", embodiment="umi")
    (item,) = read_source(str(tmp_path / "model.json")).items
    assert item.embodiment == "umi" and item.actions is not None and item.actions.shape == (4, 10)
    assert "units of the data" in refused("CX611", lambda: read_source(str(tmp_path / "raw.json")))
    (tmp_path / "both.json").write_text(json.dumps({"prompt": "Fold.", "actions": rows.tolist()}))
    assert read_source(str(tmp_path / "both.json")).items[0].prompt.text == "Fold."  # an item, as ever
    listed = tmp_path / "items.jsonl"
    for suffix in ("json", "safetensors"):
        for file, domain, said in (("raw", "umi", "units of the data"), ("model", "libero", "of `umi`, not of")):
            entry = {"prompt": "Fold.", "action_path": f"{file}.{suffix}", "domain_name": domain}
            listed.write_text(json.dumps(entry))
            assert said in refused("CX611", lambda: read_source(str(listed)))
        listed.write_text(json.dumps({"prompt": "Fold.", "action_path": f"model.{suffix}"}))
        assert read_source(str(listed)).items[0].embodiment == "umi"


def test_what_is_no_source_is_said(tmp_path: Path) -> None:
    refused("CX340", lambda: read_source(str(tmp_path / "missing.txt")))
    refused("CX340", lambda: read_source(str(tmp_path)))  # an empty folder
    broken = {
        "empty.txt": b"\n\n",
        "x.doc": b"x",
        "bad.txt": b"\xff\xfe\xff",
        "bad.json": b"{",
        "list.json": b"[1]",
        "line.jsonl": b"{}{}",
        "none.jsonl": b'{"image": "a.png"}',
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        refused("CX340", lambda name=name: read_source(str(tmp_path / name)))  # type: ignore[misc]
    (tmp_path / "nan.json").write_text("[[1, NaN]]")
    refused("CX611", lambda: read_source(str(tmp_path / "nan.json")))
