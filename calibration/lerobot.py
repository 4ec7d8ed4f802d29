"""LeRobot data sets, versions 2 and 3: Parquet tables of actions, clips of cameras, and tasks in words.

Each item is a window of an episode: its task, as many actions as the embodiment's chunk has, and the frames of one
camera that go with them. The columns of an action are those that the embodiment wants, found by their names; where
their order is not known the data set is refused. Actions are scaled as the published statistics do it, between the 1 %
and the 99 % quantile of each column of the data set, and cut off at ±1.
"""

from __future__ import annotations

import glob
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cosmos_export import files
from cosmos_export.bundle.embodiment import Embodiment, require_width
from cosmos_export.calibration.columns import Columns, choose_columns
from cosmos_export.calibration.items import ClipPart, Item, Options, SourceContent
from cosmos_export.checkpoint.strict_json import parse_object, read_object
from cosmos_export.diagnostics import UnsupportedError, UserError, shown
from cosmos_export.embodiments import EMBODIMENTS, embodiment
from cosmos_export.runtime.embodiments import Actions, ActionScale
from cosmos_export.runtime.generate_options import MAX_FPS, MIN_FPS
from cosmos_export.runtime.prompts import text_prompt

if TYPE_CHECKING:
    import pyarrow

DEFAULT_WINDOWS = 8
"""Windows of a data set where no limit is given, spread over its episodes."""
_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
_SMALLEST = 1e-8
_WIDTH = re.compile(r"(0?[0-9]{1,2}d)?")
_RATE_TOLERANCE = 0.01
MAX_TABLE_BYTES = 4 * files.GIB
"""Bytes of a Parquet file, and of what its columns become."""
MAX_ROWS = 100_000_000
"""Rows of a table, frames of an episode, and the largest number of one."""
_HINT = "a LeRobot data set has meta/info.json, data/, videos/, and meta/tasks and meta/episodes"


@dataclass(frozen=True)
class _Episode:
    """Where the rows of an episode are in a table, and its frames in a clip."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    video: Path
    first_frame: int


@dataclass(frozen=True)
class _Rows:
    """Contents of a table: float32 actions [rows, width], and each row's episode and task."""

    actions: Actions
    episodes: np.ndarray
    tasks: np.ndarray | None


def read_lerobot(root: Path, options: Options) -> SourceContent:
    """Windows of the episodes of the data set at ``root``.

    CX342: it is not as its info.json says, its camera's video is missing, the order of its columns is not known, or its
    actions are not numbers; CX343: another rate than the policy's; CX610: no embodiment, which decides the domain;
    CX611: its actions are not those of the embodiment; CX802: pyarrow is not installed.
    """
    info = read_object(root / "meta" / "info.json")
    version = str(info.get("codebase_version", ""))
    if not version.startswith(("v2.", "v3.")):
        _refuse(root, f"codebase_version {shown(version)}; known: v2.x, v3.x")
    if options.embodiment is None and options.policy is None:
        robot = _robot(root, info)
    else:
        robot = embodiment(options.embodiment, options.policy)
    fps = info.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not MIN_FPS <= fps <= MAX_FPS:
        _refuse(root, f"fps {shown(fps)} is not a rate")
    notes = [*_rate(root, float(fps), robot, options)]
    camera, left_out = _camera(root, info, options.camera)
    notes += left_out
    tasks, task_file = _tasks(root, version)
    episodes, episode_files = _episodes(root, info, version, camera, float(fps))
    chunk = robot.chunk
    usable = [episode for episode in episodes if episode.length > chunk and episode.video.is_file()]
    if not usable:
        _refuse(root, f"no episode has {chunk + 1} frames and a video of {camera}")
    chosen: Columns | None = None
    rows: dict[Path, _Rows] = {}
    for path in sorted({episode.data for episode in usable}):
        table = _table(root, path)
        if chosen is None:
            chosen = choose_columns(root, table.column_names, info, robot, options.actions)
            notes += chosen.notes
        rows[path] = _read_rows(root, path, table, chosen, robot)
    scale = _scale(np.concatenate([found.actions for found in rows.values()]))
    windows = _windows(usable, chunk, options.limit or DEFAULT_WINDOWS)
    items = []
    cut = total = 0
    for episode, number in windows:
        found, start = rows[episode.data], number * chunk
        mine = found.episodes == episode.index
        actions = found.actions[mine]
        if len(actions) < start + chunk:
            what = f"episode {episode.index} has {len(actions)} rows of actions; its length says {episode.length}"
            _refuse(root, what)
        task = None if found.tasks is None else found.tasks[mine][start]
        used = actions[start : start + chunk]
        beyond = scale.beyond(used)
        cut, total = cut + beyond.count, total + beyond.of
        items.append(
            Item(
                name=f"{root.name}:{episode.index}+{start}",
                prompt=text_prompt(_instruction(root, episode, task, tasks, number)),
                clip=ClipPart(episode.video, episode.first_frame + start, chunk + 1, float(fps)),
                actions=scale.to_model(used, clamp=True),
                embodiment=robot.name,
                fps=float(fps),
            )
        )
    silent = sum(not item.prompt.text for item in items)
    if silent:
        notes.append(f"{silent} of {len(items)} windows have no instruction")
    if cut:
        notes.append(f"{cut} of {total} values of actions are beyond the 1 % and 99 % quantiles and cut off there")
    used_files = (root / "meta" / "info.json", task_file, *episode_files, *rows)
    return SourceContent("lerobot", tuple(items), used_files, tuple(notes))


def _robot(root: Path, info: Mapping[str, Any]) -> Embodiment:
    kind = info.get("robot_type")
    if kind in EMBODIMENTS:
        return EMBODIMENTS[str(kind)]
    raise UserError(
        "CX610",
        f"{root}: which embodiment is robot_type {shown(kind)}?",
        f"--data {root.name},embodiment=… with one of {', '.join(EMBODIMENTS)}",
    )


def _rate(root: Path, fps: float, robot: Embodiment, options: Options) -> Iterator[str]:
    """A note where the data has another rate than is usual. CX343: another than the policy is trained at, or than
    ``fps=`` says."""
    if options.fps is not None and abs(options.fps - fps) > _RATE_TOLERANCE * fps:
        raise UserError(
            "CX343", f"{root}: info.json says {fps:g} frames per second, and fps={options.fps:g}", "leave fps= out"
        )
    if abs(fps - robot.fps) > _RATE_TOLERANCE * fps:
        if robot.rated and options.fps is None:
            raise UserError(
                "CX343",
                f"{root} has {fps:g} frames per second; the policy for `{robot.name}` is trained at {robot.fps:g}",
                f"resample the data set, or fps={fps:g} if the policy will run at that rate",
            )
        yield f"{fps:g} frames per second; `{robot.name}` usually has {robot.fps:g}"


def _camera(root: Path, info: Mapping[str, Any], asked: str | None) -> tuple[str, list[str]]:
    """The camera to use, and notes on those that are not shown."""
    features = info.get("features")
    if not isinstance(features, dict):
        _refuse(root, "meta/info.json has no features")
    pictures = {k: v for k, v in features.items() if isinstance(v, dict) and v.get("dtype") in ("video", "image")}
    for name in pictures:
        if not name.isprintable() or "/" in name or name in ("", ".", "..") or len(name) > 200:
            _refuse(root, f"{shown(name)} in meta/info.json is not a name of a camera")
    depth = sorted(name for name, feature in pictures.items() if _is_depth(name, feature))
    cameras = sorted(name for name in pictures if name not in depth)
    if not cameras:
        _refuse(root, f"no feature is a picture; depth maps: {', '.join(depth)}" if depth else "no feature is a video")
    present = [camera for camera in cameras if any((root / "videos").rglob(f"{glob.escape(camera)}/**/*.mp4"))]
    if asked is not None:
        named = _named(root, asked, cameras, depth)
        if named not in present:
            _refuse(root, f"no video of {named}; videos there are of {', '.join(present) or 'none'}")
        return named, []
    if not present:
        _refuse(root, f"no video of any camera: {', '.join(cameras)}", "download videos/ too (git lfs pull)")
    camera, *others = present
    missing = [name for name in cameras if name not in present]
    notes = [f"no video of {', '.join(missing)}; {camera} is used"] if missing else []
    if others:
        notes.append(f"of the cameras {camera} is shown, and not {', '.join(others)}: camera=… chooses another")
    if depth:
        notes.append(f"depth maps are not shown: {', '.join(depth)}")
    return camera, notes


def _named(root: Path, asked: str, cameras: Sequence[str], depth: Sequence[str]) -> str:
    """The camera that is ``asked`` for by its name or the end of it."""
    matching = [name for name in (*cameras, *depth) if name == asked or name.endswith((f".{asked}", f"/{asked}"))]
    if len(matching) != 1:
        _refuse(root, f"no camera {shown(asked)}; cameras: {', '.join(cameras)}")
    if matching[0] in depth:
        _refuse(root, f"{matching[0]} is a depth map, which is no picture; cameras: {', '.join(cameras)}")
    return matching[0]


def _is_depth(name: str, feature: Mapping[str, Any]) -> bool:
    """Whether a feature is a depth map, by what it says, or by its name where it says nothing."""
    places = [place for key in ("info", "video_info") if isinstance(place := feature.get(key), dict)]
    for place in (feature, *places):
        for key in ("is_depth_map", "video.is_depth_map"):
            if isinstance(place.get(key), bool):
                return bool(place[key])
    return "depth" in name.rpartition(".")[2].lower()


def _instruction(root: Path, episode: _Episode, task: Any, tasks: Mapping[int, str], number: int) -> str:
    """The instruction of window ``number`` of ``episode``: the task of its first row, else the episode's only one. Of
    several annotations each window has the next; an empty instruction stays empty."""
    if task is None:
        if len(set(episode.tasks)) > 1:
            what = f"episode {episode.index} has {len(episode.tasks)} tasks, and no task_index says which row has which"
            _refuse(root, what)
        text = episode.tasks[0] if episode.tasks else ""
    elif int(task) in tasks:
        text = tasks[int(task)]
    else:
        _refuse(root, f"episode {episode.index} has task_index {int(task)}, which meta/tasks does not have")
    annotations = [part.strip() for part in text.split("|") if part.strip()]
    return annotations[number % len(annotations)] if annotations else ""


def _tasks(root: Path, version: str) -> tuple[dict[int, str], Path]:
    """Tasks in words by number, and the file that has them."""
    if version.startswith("v3"):
        file = root / "meta" / "tasks.parquet"
        # Written by pandas, the words are the index, whose column has a name of its own.
        keys = ("task", "__index_level_0__", "index")
        found: list[tuple[Any, Any]] = [
            (row.get("task_index"), next((row[k] for k in keys if isinstance(row.get(k), str)), ""))
            for row in _table_rows(root, file)
        ]
    else:
        file = root / "meta" / "tasks.jsonl"
        found = [(row["task_index"], row["task"]) for row in _lines(root, file, ("task_index", "task"))]
    words: dict[int, str] = {}
    for index, text in found:
        if type(index) is not int or not isinstance(text, str):
            _refuse(root, f"{file.name} has task_index {shown(index)} and task {shown(text)}")
        words[index] = text
    return words, file


def _episodes(
    root: Path, info: Mapping[str, Any], version: str, camera: str, fps: float
) -> tuple[list[_Episode], list[Path]]:
    if version.startswith("v3"):
        tables = sorted((root / "meta" / "episodes").rglob("*.parquet"))
        rows = [row for table in tables for row in _table_rows(root, table)]
    else:
        tables = [root / "meta" / "episodes.jsonl"]
        rows = _lines(root, tables[0], ("episode_index", "length"))
    if not rows:
        _refuse(root, "no episodes")
    return [_episode(root, info, row, camera, fps) for row in rows], tables


def _episode(root: Path, info: Mapping[str, Any], row: Mapping[str, Any], camera: str, fps: float) -> _Episode:
    index, length = row.get("episode_index"), row.get("length")
    for value in (index, length):
        if type(value) is not int or not 0 <= value <= MAX_ROWS:
            what = f"an episode has index {shown(index)} and length {shown(length)}; allowed: 0 to {MAX_ROWS:,}"
            _refuse(root, what)
    assert isinstance(index, int)
    assert isinstance(length, int)
    said = row.get("tasks")
    tasks = tuple(t for t in said if isinstance(t, str)) if isinstance(said, list | tuple) else ()
    first = row.get(f"videos/{camera}/from_timestamp") or 0.0
    if not isinstance(first, int | float) or not 0 <= first * fps <= MAX_ROWS:
        _refuse(root, f"the video of episode {index} begins at {shown(first)} seconds")
    return _Episode(
        index,
        length,
        tasks,
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
    for number in (chunk, file):
        if not 0 <= number <= MAX_ROWS:
            _refuse(root, f"episode {index} is in file {shown(number)} of {prefix}")
    values = {
        "episode_chunk": chunk, "episode_index": index, "episode_file": file, "chunk_index": chunk, "file_index": file,
        "video_key": camera,
    }  # fmt: skip
    template = info.get(key, default)
    if not isinstance(template, str) or not _is_template(template, values):
        _refuse(root, f"{key} = {shown(template)} is no template of {', '.join(values)}")
    path = root / template.format(**values)
    # Not resolved: the files of a download cache are links to where the data is.
    if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:
        _refuse(root, f"{key} = {shown(template)} leads out of the data set")
    return path


def _is_template(template: str, values: Mapping[str, object]) -> bool:
    """Whether ``template`` has fields for ``values`` alone, filled with zeros at most, as LeRobot's own. A width
    could ask for any amount of memory, and a field for any attribute."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError:
        return False
    return all(
        name is None or (name in values and not conversion and _WIDTH.fullmatch(spec or ""))
        for _, name, spec, conversion in fields
    )


def _read_rows(root: Path, path: Path, table: pyarrow.Table, chosen: Columns, robot: Embodiment) -> _Rows:
    """The ``chosen`` columns of a table. CX611: they are not as wide as an action of ``robot`` and its parts."""
    if not table.num_rows:
        _refuse(root, f"{path.name} has no rows")
    parts = []
    for column in chosen.columns:
        if column.name not in table.column_names:
            _refuse(root, f"{path.name} has no column {column.name}; columns: {', '.join(table.column_names[:12])}")
        try:
            values = np.asarray(table.column(column.name).to_pylist(), dtype=np.float64)
        except (ValueError, TypeError):
            _refuse(root, f"column {column.name} of {path.name} has rows of different width, or no numbers")
        parts.append(column.taken(root, values.reshape(len(values), -1), robot))
    names = ", ".join(column.name for column in chosen.columns)
    actions = np.concatenate(parts, axis=1)
    require_width(f"{root}: {names}", robot, actions.shape[1], "actions=… names the columns of an action, in order")
    if not np.isfinite(actions).all():
        row = int(np.argwhere(~np.isfinite(actions))[0][0])
        _refuse(root, f"row {row} of {names} in {path.name} holds NaN or infinite values")
    if "episode_index" not in table.column_names:
        _refuse(root, f"{path.name} has no episode_index column")
    indices = _whole_numbers(root, path, table, "episode_index")
    tasks = _whole_numbers(root, path, table, "task_index") if "task_index" in table.column_names else None
    return _Rows(actions.astype(np.float32), indices, tasks)


def _whole_numbers(root: Path, path: Path, table: pyarrow.Table, name: str) -> np.ndarray:
    values = table.column(name).to_pylist()
    if not all(type(value) is int and abs(value) < 1 << 63 for value in values):
        _refuse(root, f"{name} of {path.name} is no whole number in some rows")
    return np.asarray(values, dtype=np.int64)


def _scale(actions: Actions) -> ActionScale:
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    half = np.maximum((high - low) / 2, _SMALLEST)
    return ActionScale("quantile", (high + low) / 2, half)


def _windows(episodes: Sequence[_Episode], chunk: int, count: int) -> list[tuple[_Episode, int]]:
    """``count`` windows at most, by episode and number within it: all episodes before any twice."""
    found: list[tuple[_Episode, int]] = []
    windows = max((episode.length - 1) // chunk for episode in episodes)
    for number in range(windows):
        for episode in episodes:
            if len(found) == count:
                return found
            if (number + 1) * chunk < episode.length:
                found.append((episode, number))
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
    name = path.relative_to(root)
    try:
        with files.opened(path, MAX_TABLE_BYTES) as file, parquet.ParquetFile(file) as table:
            metadata = table.metadata
            size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            if metadata.num_rows > MAX_ROWS or size > MAX_TABLE_BYTES:
                what = f"{name} has {metadata.num_rows:,} rows of {size:,} bytes"
                _refuse(root, f"{what}; allowed: {MAX_ROWS:,} and {MAX_TABLE_BYTES:,}")
            found = table.read()
    except pyarrow.ArrowException as error:
        _refuse(root, f"{name} is not a Parquet file: {str(error)[:120]}")
    except OSError as error:  # Arrow's own have no number
        _refuse(root, _unread(name, error) if error.errno else f"{name} is not a Parquet file: {str(error)[:120]}")
    twice = next((column for column, times in Counter(found.column_names).items() if times > 1), None)
    if twice is not None:
        _refuse(root, f"{name} has two columns {shown(twice)}")
    return found


def _table_rows(root: Path, path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = _table(root, path).to_pylist()
    except UnicodeDecodeError:
        _refuse(root, f"{path.relative_to(root)} has text that is not UTF-8")
    return rows


def _lines(root: Path, path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    try:
        data = files.read_bytes(path)
    except OSError as error:
        _refuse(root, _unread(path.relative_to(root), error))
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                row = parse_object(line)
            except ValueError as error:
                _refuse(root, f"{path.name}, line {number}: {error}")
            if any(key not in row for key in needed):
                _refuse(root, f"{path.name}, line {number} has no {' or '.join(needed)}")
            rows.append(row)
    return rows


def _unread(name: Path, error: OSError) -> str:
    return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {files.reason(error)}"


def _refuse(root: Path, found: str, hint: str = _HINT) -> NoReturn:
    raise UserError("CX342", f"{root}: {found}", hint)
