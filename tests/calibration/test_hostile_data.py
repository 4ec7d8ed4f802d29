"""Data of a stranger: files that are none, and numbers, names and templates that would cost memory or time."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_samples
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosmos_export.calibration.sources import read_source
from cosmos_export.calibration.table import LINEAGE_FILE, SCALES_FILE, read_scale_table
from cosmos_export.diagnostics import UserError
from cosmos_export.precision.recipe import load_recipe


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def robots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("robots")
    return {version: data_samples.write_lerobot(root / version, version) for version in ("v2.1", "v3.0")}


def refused(call: Callable[[], object], *codes: str) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code in codes, caught.value
    return caught.value


# -- files that are none ----------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20_000_000_000)


def _directory(path: Path) -> None:
    path.mkdir()


NO_FILES = [_pipe, _zero, _sparse, _directory]


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.safetensors", "a.png", "a.mp4"])
def test_a_source_is_a_file(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / name
    make(path)
    if make is _directory or make is not _sparse or path.suffix not in (".png", ".mp4", ".safetensors"):
        refused(lambda: read_source(str(path)), "CX340")


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("key", ["image", "video", "action_path"])
def test_what_an_entry_names_is_a_file(key: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    name = "it.json" if key == "action_path" else "it.png"
    make(tmp_path / name)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x", key: name}))
    if make is not _sparse or key == "action_path":
        refused(lambda: read_source(str(tmp_path / "a.jsonl")), "CX340", "CX611")


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("v3.0", "meta/info.json"),
        ("v3.0", "meta/tasks.parquet"),
        ("v3.0", "meta/episodes/chunk-000/file-000.parquet"),
        ("v3.0", "data/chunk-000/file-000.parquet"),
        ("v2.1", "meta/tasks.jsonl"),
        ("v2.1", "meta/episodes.jsonl"),
        ("v2.1", "data/chunk-000/episode_000000.parquet"),
    ],
)
def test_files_of_robot_data_are_files(
    version: str, name: str, make: Callable[[Path], None], robots: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "robot"
    shutil.copytree(robots[version], root)
    (root / name).unlink()
    make(root / name)
    refused(lambda: read_source(str(root)), "CX340", "CX342", "CX101", "CX102")


@pytest.mark.parametrize("make", NO_FILES)
def test_a_recipe_and_a_table_are_files(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "own.toml")
    refused(lambda: load_recipe(str(tmp_path / "own.toml")), "CX350")
    for name in (LINEAGE_FILE, SCALES_FILE):
        table = tmp_path / f"table-{name}"
        table.mkdir()
        (table / LINEAGE_FILE).write_text(
            json.dumps(dict.fromkeys(("format", "version", "checkpoint", "scales_sha256", "lineage")))
        )
        (table / name).unlink(missing_ok=True)
        make(table / name)
        refused(lambda table=table: read_scale_table(table), "CX310", "CX101", "CX102")


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 5000, "a = " + "9" * 5000, "a = 1979-99-99", "\x00", "[a]\n[a]", 'title = 3\nsource = [["x"]]'],
)
def test_a_recipe_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(text)
    refused(lambda: load_recipe(str(tmp_path / "own.toml")), "CX351")


@pytest.mark.parametrize("field", ["not_for", "source"])
def test_a_recipe_has_lists_of_texts(field: str, tmp_path: Path) -> None:
    lines = {
        "title": '"t"', "summary": '"s"', "experimental": "false", "warning": '""', "not_for": "[]", "source": "[]",
        "rules": "[]", field: "[[1]]",
    }  # fmt: skip
    (tmp_path / "own.toml").write_text("\n".join(f"{key} = {value}" for key, value in lines.items()))
    assert "not a list of texts" in refused(lambda: load_recipe(str(tmp_path / "own.toml")), "CX351").message


# -- robot data -------------------------------------------------------------------------------------------------------


def _info(root: Path, **changes: Any) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize(
    "template",
    [
        "{episode_index:0>3000000000}",
        "{episode_index:03000000000d}",
        "{episode_index:{chunk_index}}",
        "{episode_index.__class__}",
        "{episode_index!r:>99}",
        "{video_key[0]}",
        "{video_key:d}",
        "{}",
        "{0}",
        "{",
        "{other}",
        3,
        ["x"],
    ],
)
def test_templates_have_numbers_and_the_camera_only(
    key: str, template: Any, robots: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(robots["v3.0"], tmp_path / "robot")
    _info(tmp_path / "robot", **{key: template})
    assert f"{key} = " in refused(lambda: read_source(str(tmp_path / "robot")), "CX342").message


@pytest.mark.parametrize("name", ["/etc", "", "..", ".", "a/b", "a\x1b[2J", "x" * 300])
def test_cameras_have_names(name: str, robots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(robots["v3.0"], tmp_path / "robot")
    _info(tmp_path / "robot", features={name: {"dtype": "video", "shape": [48, 64, 3]}, "action": {"dtype": "float32"}})
    message = refused(lambda: read_source(str(tmp_path / "robot")), "CX342").message
    assert "not a name of a camera" in message
    assert message.isprintable()


def test_a_camera_is_no_pattern(robots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(robots["v3.0"], tmp_path / "robot")
    _info(tmp_path / "robot", features={"*": {"dtype": "video", "shape": [48, 64, 3]}, "action": {"dtype": "float32"}})
    assert "no video of any camera" in refused(lambda: read_source(str(tmp_path / "robot")), "CX342").message


@pytest.mark.parametrize(
    "change",
    [
        {"length": 10**15},
        {"length": -1},
        {"length": "20"},
        {"episode_index": 10**15},
        {"episode_index": -1},
        {"length": 10**7},
    ],
)
def test_numbers_of_episodes_are_bounded(change: dict[str, Any], robots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(robots["v2.1"], tmp_path / "robot")
    lines = [{"episode_index": i, "length": 20, "tasks": ["x"]} | change for i in range(2)]
    (tmp_path / "robot/meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    refused(lambda: read_source(f"{tmp_path / 'robot'},limit=999999"), "CX342")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (f"videos/{data_samples.CAMERA}/from_timestamp", float("nan")),
        (f"videos/{data_samples.CAMERA}/from_timestamp", 1e300),
        (f"videos/{data_samples.CAMERA}/from_timestamp", -1.0),
        ("data/chunk_index", -1),
        ("data/chunk_index", 10**15),
        ("length", 10**15),
    ],
)
def test_numbers_of_tables_are_bounded(column: str, value: Any, robots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(robots["v3.0"], tmp_path / "robot")
    table = tmp_path / "robot/meta/episodes/chunk-000/file-000.parquet"
    columns = pq.read_table(table).to_pydict()
    data_samples._table(table, columns | {column: [value] * 2})
    refused(lambda: read_source(str(tmp_path / "robot")), "CX342")


@pytest.mark.parametrize("line", ['{"task_index": "a", "task": "x"}', '{"task_index": 0, "task": 3}', "{"])
def test_tasks_have_numbers_and_words(line: str, robots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(robots["v2.1"], tmp_path / "robot")
    (tmp_path / "robot/meta/tasks.jsonl").write_text(line)
    refused(lambda: read_source(str(tmp_path / "robot")), "CX342")


def test_no_two_columns_have_one_name(robots: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(robots["v3.0"], tmp_path / "data")
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(table.append_column("episode_index", table.column("frame_index")), path)
    error = refused(lambda: read_source(str(root)), "CX342")
    assert "two columns" in error.message and "episode_index" in error.message


def test_a_table_has_rows(robots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(robots["v3.0"], tmp_path / "robot")
    table = tmp_path / "robot/data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(table).slice(0, 0), table)
    assert "has no rows" in refused(lambda: read_source(str(tmp_path / "robot")), "CX342").message


@pytest.mark.parametrize("column", ["episode_index", "task_index"])
@pytest.mark.parametrize("value", [None, 1.0, [1], "0", True, 2**63])
def test_numbers_of_rows_are_whole(column: str, value: Any, robots: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(robots["v3.0"], tmp_path / "data")
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    rest = table.drop([column]) if column in table.column_names else table
    values = pa.array([value] * table.num_rows, pa.uint64() if value == 2**63 else None)
    pq.write_table(rest.append_column(column, values), path)
    assert column in refused(lambda: read_source(str(root)), "CX342").message


def test_a_picture_without_end_is_not_hashed(tmp_path: Path) -> None:
    data_samples.write_picture(tmp_path / "a.png")
    os.truncate(tmp_path / "a.png", 20 << 30)
    assert "allowed" in refused(lambda: read_source(str(tmp_path / "a.png")), "CX340").message
