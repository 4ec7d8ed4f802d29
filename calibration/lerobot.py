"""LeRobot data sets, versions 2 and 3: Parquet tables of actions, clips of cameras, and tasks in words.

Each item is a window of an episode: its task, as many actions as the embodiment's chunk has, and the frames of one
camera that go with them. Actions are scaled as the published statistics do it, between the 1 % and the 99 % quantile of
each column of the data set, and cut off at ±1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cosmos_export.calibration.sources import ClipPart, Found, Item, Options
from cosmos_export.checkpoint.strict_json import parse_object, read_object, shown
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.runtime.embodiments import EMBODIMENTS, Actions, ActionScale, embodiment
from cosmos_export.runtime.prompts import text_prompt

if TYPE_CHECKING:
    import pyarrow

DEFAULT_WINDOWS = 8
"""Windows of a data set where no limit is given, spread over its episodes."""
_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
_SMALLEST = 1e-8
_HINT = "a LeRobot data set has meta/info.json, data/, videos/, and meta/tasks and meta/episodes"


@dataclass(frozen=True)
class _Episode:
    """Where an episode lies: its rows in a table, its frames in a clip."""

    index: int
    length: int
    task: str
    data: Path
    video: Path
    first_frame: int


def read_lerobot(root: Path, options: Options) -> Found:
    """Windows of the episodes of the data set at ``root``.

    CX342: it is not as its info.json says, its camera's video is missing, or its actions are not numbers; CX610: no
    embodiment, which decides the domain; CX802: pyarrow is not installed.
    """
    info = read_object(root / "meta" / "info.json")
    version = str(info.get("codebase_version", ""))
    if not version.startswith(("v2.", "v3.")):
        _refuse(root, f"codebase_version {shown(version)}; known: v2.x, v3.x")
    robot = embodiment(options.embodiment, None) if options.embodiment else _robot(root, info)
    fps = info.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= 1000:
        _refuse(root, f"fps {shown(fps)} is not a rate")
    camera, missing = _camera(root, info, options.camera)
    tasks, task_file = _tasks(root, version)
    episodes, episode_files = _episodes(root, info, version, camera, float(fps), tasks)
    chunk = robot.chunk
    usable = [episode for episode in episodes if episode.length > chunk and episode.video.is_file()]
    if not usable:
        _refuse(root, f"no episode has {chunk + 1} frames and a video of {camera}")
    columns = {path: _actions(root, path) for path in sorted({episode.data for episode in usable})}
    scale = _scale(np.concatenate([actions for actions, _ in columns.values()]))
    windows = _windows(usable, chunk, options.limit or DEFAULT_WINDOWS)
    items = []
    for episode, start in windows:
        actions, rows = columns[episode.data]
        mine = actions[rows == episode.index]
        if len(mine) < start + chunk:
            _refuse(root, f"episode {episode.index} has {len(mine)} rows of actions; its length says {episode.length}")
        items.append(
            Item(
                name=f"{root.name}:{episode.index}+{start}",
                prompt=text_prompt(episode.task),
                clip=ClipPart(episode.video, episode.first_frame + start, chunk + 1, float(fps)),
                actions=scale.to_model(mine[start : start + chunk]),
                embodiment=robot.name,
                fps=float(fps),
            )
        )
    files = (root / "meta" / "info.json", task_file, *episode_files, *columns)
    note = (f"no video of {', '.join(missing)}; {camera} is used",) if missing else ()
    return Found("lerobot", tuple(items), files, note)


def _robot(root: Path, info: Mapping[str, Any]) -> Any:
    kind = info.get("robot_type")
    if kind in EMBODIMENTS:
        return EMBODIMENTS[str(kind)]
    raise UserError(
        "CX610",
        f"{root}: which embodiment is robot_type {shown(kind)}?",
        f"--data {root.name},embodiment=… with one of {', '.join(EMBODIMENTS)}",
    )


def _camera(root: Path, info: Mapping[str, Any], asked: str | None) -> tuple[str, list[str]]:
    """The camera to use, and those without a video."""
    features = info.get("features")
    if not isinstance(features, dict):
        _refuse(root, "meta/info.json has no features")
    cameras = sorted(k for k, v in features.items() if isinstance(v, dict) and v.get("dtype") in ("video", "image"))
    if not cameras:
        _refuse(root, "no feature is a video")
    present = [camera for camera in cameras if any((root / "videos").rglob(f"{camera}/**/*.mp4"))]
    if asked is not None:
        if asked not in cameras:
            _refuse(root, f"no camera {shown(asked)}; cameras: {', '.join(cameras)}")
        if asked not in present:
            _refuse(root, f"no video of {asked}; videos there are of {', '.join(present) or 'none'}")
        return asked, []
    if not present:
        _refuse(root, f"no video of any camera: {', '.join(cameras)}", "download videos/ too (git lfs pull)")
    return present[0], [camera for camera in cameras if camera not in present]


def _tasks(root: Path, version: str) -> tuple[dict[int, str], Path]:
    """Tasks in words by number, and the file that has them."""
    if version.startswith("v3"):
        file = root / "meta" / "tasks.parquet"
        rows = _table(root, file).to_pylist()
        # Written by pandas, the words are the index, whose column has a name of its own.
        keys = ("task", "__index_level_0__", "index")
        found = {row.get("task_index"): next((row[k] for k in keys if isinstance(row.get(k), str)), "") for row in rows}
        return {int(index): text for index, text in found.items() if index is not None}, file
    file = root / "meta" / "tasks.jsonl"
    return {int(row["task_index"]): str(row["task"]) for row in _lines(root, file, ("task_index", "task"))}, file


def _episodes(
    root: Path, info: Mapping[str, Any], version: str, camera: str, fps: float, tasks: Mapping[int, str]
) -> tuple[list[_Episode], list[Path]]:
    if version.startswith("v3"):
        files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
        rows = [row for file in files for row in _table(root, file).to_pylist()]
    else:
        files = [root / "meta" / "episodes.jsonl"]
        rows = _lines(root, files[0], ("episode_index", "length"))
    if not rows:
        _refuse(root, "no episodes")
    return [_episode(root, info, row, camera, fps, tasks) for row in rows], files


def _episode(
    root: Path, info: Mapping[str, Any], row: Mapping[str, Any], camera: str, fps: float, tasks: Mapping[int, str]
) -> _Episode:
    index, length = row.get("episode_index"), row.get("length")
    if type(index) is not int or type(length) is not int:
        _refuse(root, f"an episode has index {shown(index)} and length {shown(length)}")
    said = row.get("tasks")
    task = next((t for t in said if isinstance(t, str)), "") if isinstance(said, list | tuple) else ""
    first = row.get(f"videos/{camera}/from_timestamp") or 0.0
    return _Episode(
        index,
        length,
        task or next(iter(tasks.values()), ""),
        _place(root, info, "data_path", _DATA, row, camera, "data"),
        _place(root, info, "video_path", _VIDEO, row, camera, f"videos/{camera}"),
        round(float(first) * fps),
    )


def _place(
    root: Path, info: Mapping[str, Any], key: str, default: str, row: Mapping[str, Any], camera: str, prefix: str
) -> Path:
    """The file that a template of info.json names, inside the data set."""
    index, size = int(row["episode_index"]), info.get("chunks_size", 1000)
    chunk = row.get(f"{prefix}/chunk_index")
    file = row.get(f"{prefix}/file_index")
    chunk = chunk if isinstance(chunk, int) else index // int(size if isinstance(size, int) and size > 0 else 1000)
    file = file if isinstance(file, int) else 0
    values = {
        "episode_chunk": chunk, "episode_index": index, "episode_file": file, "chunk_index": chunk, "file_index": file,
        "video_key": camera,
    }  # fmt: skip
    template = info.get(key, default)
    try:
        path = root / str(template).format(**values)
    except (KeyError, ValueError, IndexError, AttributeError):
        _refuse(root, f"{key} = {shown(template)} is no template")
    # Not resolved: the files of a download cache are links to where the data is.
    if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:
        _refuse(root, f"{key} = {shown(template)} leads out of the data set")
    return path


def _actions(root: Path, path: Path) -> tuple[Actions, np.ndarray]:
    """float32 [rows, width] of the ``action`` column, or of all ``action.*`` columns, and each row's episode."""
    table = _table(root, path)
    names = (
        ["action"]
        if "action" in table.column_names
        else sorted(name for name in table.column_names if name.startswith("action."))
    )
    if not names:
        _refuse(root, f"{path.name} has no action column; columns: {', '.join(table.column_names[:12])}")
    parts = []
    for name in names:
        try:
            values = np.asarray(table.column(name).to_pylist(), dtype=np.float64)
        except (ValueError, TypeError):
            _refuse(root, f"column {name} of {path.name} has rows of different width, or no numbers")
        parts.append(values.reshape(len(values), -1))
    actions = np.concatenate(parts, axis=1)
    if not np.isfinite(actions).all():
        row = int(np.argwhere(~np.isfinite(actions))[0][0])
        _refuse(root, f"row {row} of {', '.join(names)} in {path.name} holds NaN or infinite values")
    if "episode_index" not in table.column_names:
        _refuse(root, f"{path.name} has no episode_index column")
    return actions.astype(np.float32), np.asarray(table.column("episode_index").to_pylist())


def _scale(actions: Actions) -> ActionScale:
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    half = np.maximum((high - low) / 2, _SMALLEST)
    return ActionScale("quantile", ((high + low) / 2).astype(np.float32), half.astype(np.float32))


def _windows(episodes: Sequence[_Episode], chunk: int, count: int) -> list[tuple[_Episode, int]]:
    """``count`` windows at most, episode after episode, then the next window of each: all episodes before any twice."""
    found: list[tuple[_Episode, int]] = []
    windows = max((episode.length - 1) // chunk for episode in episodes)
    for number in range(windows):
        for episode in episodes:
            if (number + 1) * chunk < episode.length and len(found) < count:
                found.append((episode, number * chunk))
    return found


def _table(root: Path, path: Path) -> pyarrow.Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UnsupportedError(
            "CX802",
            "LeRobot data needs pyarrow, which is not installed",
            "pip install '.[calibrate]' in the checkout",
        ) from error
    if not path.is_file():
        _refuse(root, f"{path.relative_to(root)} is missing")
    try:
        return parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        _refuse(root, f"{path.relative_to(root)} is not a Parquet file: {str(error)[:120]}")


def _lines(root: Path, path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.is_file():
        _refuse(root, f"{path.relative_to(root)} is missing")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = parse_object(line.encode())
            except ValueError as error:
                _refuse(root, f"{path.name}, line {number}: {error}")
            if any(key not in row for key in needed):
                _refuse(root, f"{path.name}, line {number} has no {' or '.join(needed)}")
            rows.append(row)
    return rows


def _refuse(root: Path, found: str, hint: str = _HINT) -> NoReturn:
    raise UserError("CX342", f"{root}: {found}", hint)
