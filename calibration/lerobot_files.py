"""Files of a LeRobot data set, versions 2.0, 2.1 and 3.0: Parquet tables, lines of JSON, tasks in words, and where each
episode is."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cosmos_export import files, kinds
from cosmos_export.checkpoint.strict_json import parse_object
from cosmos_export.diagnostics import UnsupportedError, UserError, shown

if TYPE_CHECKING:
    import pyarrow

_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
_WIDTH = re.compile(r"(0?[0-9]{1,2}d)?")
MAX_TABLE_BYTES = 4 * files.GIB
"""Bytes of a Parquet file, and of what its columns become."""
MAX_ROWS = 100_000_000
"""Rows of a table, frames of an episode, and the largest number of one."""
_HINT = "a LeRobot data set has meta/info.json, data/, videos/, and meta/tasks and meta/episodes"


@dataclass(frozen=True)
class Recording:
    """The frames of an episode in a clip of one camera."""

    path: Path
    first_frame: int


@dataclass(frozen=True)
class Episode:
    """Where the rows of an episode are in a table, and what else the data set says of it."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    row: Mapping[str, Any]


def read_tasks(root: Path, version: str) -> tuple[dict[int, str], Path]:
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
            refuse(root, f"{file.name} has task_index {shown(index)} and task {shown(text)}")
        words[index] = text
    return words, file


def read_episodes(root: Path, info: Mapping[str, Any], version: str) -> tuple[list[Episode], list[Path]]:
    """The episodes, and the files that say so."""
    if version.startswith("v3"):
        tables = sorted((root / "meta" / "episodes").rglob("*.parquet"))
        rows = [row for table in tables for row in _table_rows(root, table)]
    else:
        tables = [root / "meta" / "episodes.jsonl"]
        rows = _lines(root, tables[0], ("episode_index", "length"))
    if not rows:
        refuse(root, "no episodes")
    return [_episode(root, info, row) for row in rows], tables


def _episode(root: Path, info: Mapping[str, Any], row: Mapping[str, Any]) -> Episode:
    index, length = row.get("episode_index"), row.get("length")
    for value in (index, length):
        if type(value) is not int or not 0 <= value <= MAX_ROWS:
            what = f"an episode has index {shown(index)} and length {shown(length)}; allowed: 0 to {MAX_ROWS:,}"
            refuse(root, what)
    assert isinstance(index, int)
    assert isinstance(length, int)
    said = row.get("tasks")
    tasks = tuple(t for t in said if isinstance(t, str)) if isinstance(said, list | tuple) else ()
    return Episode(index, length, tasks, _place(root, info, "data_path", _DATA, row, "", "data"), row)


def recordings(
    root: Path, info: Mapping[str, Any], episode: Episode, cameras: Sequence[str], fps: float
) -> tuple[Recording, ...]:
    """The frames of ``episode`` in the clips of ``cameras``. CX342: their place is not in the data set."""
    return tuple(
        Recording(
            _place(root, info, "video_path", _VIDEO, episode.row, camera, f"videos/{camera}"),
            _first_frame(root, episode.row, camera, fps),
        )
        for camera in cameras
    )


def _first_frame(root: Path, row: Mapping[str, Any], camera: str, fps: float) -> int:
    """Where the frames of an episode begin in a clip that has several."""
    first = row.get(f"videos/{camera}/from_timestamp") or 0.0
    if not isinstance(first, int | float) or not 0 <= first * fps <= MAX_ROWS:
        refuse(root, f"the video of episode {row.get('episode_index')} begins at {shown(first)} seconds")
    return round(float(first) * fps)


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
            refuse(root, f"episode {index} is in file {shown(number)} of {prefix}")
    values = {
        "episode_chunk": chunk, "episode_index": index, "episode_file": file, "chunk_index": chunk, "file_index": file,
        "video_key": camera,
    }  # fmt: skip
    template = info.get(key, default)
    if not isinstance(template, str) or not _is_template(template, values):
        refuse(root, f"{key} = {shown(template)} is no template of {', '.join(values)}")
    path = root / template.format(**values)
    # Not resolved: the files of a download cache are links to where the data is.
    if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:
        refuse(root, f"{key} = {shown(template)} leads out of the data set")
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


def read_table(root: Path, path: Path) -> pyarrow.Table:
    """The Parquet table at ``path`` of the data set at ``root``. CX342: it is none, or too large; CX802: no pyarrow."""
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
                refuse(root, f"{what}; allowed: {MAX_ROWS:,} and {MAX_TABLE_BYTES:,}")
            found = table.read()
    except pyarrow.ArrowException as error:
        _refuse_table(root, path, error)
    except OSError as error:  # Arrow's own have no number
        if error.errno:
            refuse(root, _unread(name, error))
        _refuse_table(root, path, error)
    twice = next((column for column, times in Counter(found.column_names).items() if times > 1), None)
    if twice is not None:
        refuse(root, f"{name} has two columns {shown(twice)}")
    return found


def _table_rows(root: Path, path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = read_table(root, path).to_pylist()
    except UnicodeDecodeError:
        refuse(root, f"{path.relative_to(root)} has text that is not UTF-8")
    return rows


def _lines(root: Path, path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    try:
        data = files.read_bytes(path)
    except OSError as error:
        refuse(root, _unread(path.relative_to(root), error))
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                row = parse_object(line)
            except ValueError as error:
                if (kind := kinds.of_file(path)) is not None:
                    refuse(root, f"{path.relative_to(root)} is {kind.what}", kind.hint)
                refuse(root, f"{path.name}, line {number}: {error}")
            if any(key not in row for key in needed):
                refuse(root, f"{path.name}, line {number} has no {' or '.join(needed)}")
            rows.append(row)
    return rows


def _unread(name: Path, error: OSError) -> str:
    return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {files.reason(error)}"


def _refuse_table(root: Path, path: Path, error: Exception) -> NoReturn:
    if (kind := kinds.of_file(path)) is not None:
        refuse(root, f"{path.relative_to(root)} is not a Parquet file: it is {kind.what}", kind.hint)
    refuse(root, f"{path.relative_to(root)} is not a Parquet file: {str(error)[:120]}")


def refuse(root: Path, found: str, hint: str = _HINT) -> NoReturn:
    """CX342 with what was ``found`` in the data set at ``root``."""
    raise UserError("CX342", f"{root}: {found}", hint)
