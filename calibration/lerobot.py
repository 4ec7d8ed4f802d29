"""LeRobot data sets, versions 2.0, 2.1 and 3.0: tables of actions, clips of cameras, and tasks in words, as items.

Each item is a window of an episode: its task, as many actions as the embodiment's chunk has, and the frames of its
cameras that go with them. The columns of an action are those that the embodiment wants, found by their names; where
their order, or what brings them to the model's numbers, is not known the data set is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle.embodiment import Embodiment, require_width
from cosmos_export.calibration.cameras import choose_cameras
from cosmos_export.calibration.columns import Columns, DataColumn, choose_columns, choose_state
from cosmos_export.calibration.items import ClipPart, Item, Options, SourceContent
from cosmos_export.calibration.lerobot_files import Episode, read_episodes, read_table, read_tasks, recordings, refuse
from cosmos_export.calibration.poses import pose_changes
from cosmos_export.calibration.scales import choose_scale
from cosmos_export.checkpoint.strict_json import read_object
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.embodiments import EMBODIMENTS, ROBOT_TYPES, embodiment
from cosmos_export.runtime.embodiments import Actions
from cosmos_export.runtime.generate_options import MAX_FPS, MIN_FPS
from cosmos_export.runtime.prompts import text_prompt
from cosmos_export.sampling import MODES

if TYPE_CHECKING:
    import pyarrow

DEFAULT_WINDOWS = 8
"""Windows of a data set where no limit is given, spread over its episodes."""
_RATE_TOLERANCE = 0.01
_NO_CHANGE = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class _Rows:
    """Contents of a table: float32 actions [rows, width], and each row's episode, task and state."""

    actions: Actions
    episodes: NDArray[np.int64]
    tasks: NDArray[np.int64] | None
    state: Actions | None


def read_lerobot(root: Path, options: Options) -> SourceContent:
    """Windows of the episodes of the data set at ``root``.

    CX342: it is not as its info.json says, a camera's video is missing, the order of its columns is not known, or its
    actions are not numbers; CX343: another rate than the policy's; CX610: no embodiment, which decides the domain;
    CX611: its actions are not those of the embodiment; CX613: nothing says how they become the model's; CX802: pyarrow
    is not installed.
    """
    info = read_object(root / "meta" / "info.json")
    version = str(info.get("codebase_version", ""))
    if not version.startswith(("v2.", "v3.")):
        refuse(root, f"codebase_version {shown(version)}; known: v2.x, v3.x")
    notes: list[str] = []
    if options.embodiment is None and options.policy is None:
        robot = _robot(root, info, notes)
    else:
        robot = embodiment(options.embodiment, options.policy)
    if options.state is not None and not robot.history:
        raise UserError("CX341", f"state=…: `{robot.name}` is given no state", "leave it out")
    fps = info.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not MIN_FPS <= fps <= MAX_FPS:
        refuse(root, f"fps {shown(fps)} is not a rate")
    notes += _rate(root, float(fps), robot, options)
    tasks, task_file = read_tasks(root, version)
    episodes, episode_files = read_episodes(root, info, version)
    chunk = robot.chunk
    long = [episode for episode in episodes if episode.length > chunk]
    if not long:
        refuse(root, f"no episode has {chunk + 1} frames")
    first_file = next((episode.data for episode in long if episode.data.is_file()), long[0].data)
    table = read_table(root, first_file)
    chosen = choose_columns(root, table.column_names, info, robot, options.actions)
    state: Sequence[DataColumn] = ()
    if robot.history and (options.mode is None or MODES[options.mode].state):
        state = choose_state(root, table.column_names, info, robot, options.state)
    first = _read_rows(root, first_file, table, chosen, state, robot)  # what is wrong with it comes before the cameras
    notes += chosen.notes
    cameras, left_out = choose_cameras(root, info, robot, options.cameras)
    notes += left_out
    found_clips = [(episode, recordings(root, info, episode, cameras, float(fps))) for episode in long]
    clips = {episode.index: found for episode, found in found_clips if all(one.path.is_file() for one in found)}
    usable = [episode for episode in long if episode.index in clips]
    if not usable:
        refuse(root, f"no episode has {chunk + 1} frames and a video of {' and '.join(cameras)}")
    rows = {
        path: first if path == first_file else _read_rows(root, path, read_table(root, path), chosen, state, robot)
        for path in sorted({episode.data for episode in usable})
    }
    scaling = choose_scale(root, options, robot, chosen, np.concatenate([found.actions for found in rows.values()]))
    notes += scaling.notes
    windows = _windows(usable, chunk, options.limit or DEFAULT_WINDOWS)
    items = []
    cut = total = 0
    for episode, number in windows:
        found, start = rows[episode.data], number * chunk
        mine = found.episodes == episode.index
        actions = found.actions[mine]
        if len(actions) < start + chunk:
            what = f"episode {episode.index} has {len(actions)} rows of actions; its length says {episode.length}"
            refuse(root, what)
        task = None if found.tasks is None else found.tasks[mine][start]
        used = actions[start : start + chunk]
        where = None if found.state is None else _history(found.state[mine], start, robot.history)
        if (scale := scaling.scale) is not None:
            beyond = scale.beyond(used)
            cut, total = cut + beyond.count, total + beyond.of
            used, where = scale.to_model(used, clamp=scale.bounded), None if where is None else scale.to_model(where)
        clip, *others = (
            ClipPart(one.path, one.first_frame + start, chunk + 1, float(fps)) for one in clips[episode.index]
        )
        items.append(
            Item(
                name=f"{root.name}:{episode.index}+{start}",
                prompt=text_prompt(_instruction(root, episode, task, tasks, number)),
                clip=clip,
                cameras=tuple(others),
                actions=used,
                state=where,
                embodiment=robot.name,
                fps=float(fps),
            )
        )
    silent = sum(not item.prompt.text for item in items)
    if silent:
        notes.append(f"{silent} of {len(items)} windows have no instruction")
    if cut:
        notes.append(f"{cut} of {total} values of actions are beyond their statistics and cut off there")
    beside = () if scaling.file is None else (scaling.file,)
    used_files = (root / "meta" / "info.json", task_file, *episode_files, *rows, *beside)
    return SourceContent("lerobot", tuple(items), used_files, tuple(notes), scaling.scale)


def _history(state: Actions, start: int, rows: int) -> Actions:
    """The ``rows`` of ``state`` up to ``start``; before the first row the robot is where it is there."""
    return state[[max(start - rows + 1 + i, 0) for i in range(rows)]]


def _robot(root: Path, info: Mapping[str, Any], notes: list[str]) -> Embodiment:
    kind = info.get("robot_type")
    if kind in EMBODIMENTS:
        return EMBODIMENTS[str(kind)]
    name = ROBOT_TYPES.get(kind.lower()) if isinstance(kind, str) else None
    if name is not None:
        notes.append(f"robot_type {shown(kind)} is taken as embodiment {name}: embodiment=… says another")
        return EMBODIMENTS[name]
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


def _instruction(root: Path, episode: Episode, task: Any, tasks: Mapping[int, str], number: int) -> str:
    """The instruction of window ``number`` of ``episode``: the task of its first row, else the episode's only one. Of
    several annotations each window has the next; an empty instruction stays empty."""
    if task is None:
        if len(set(episode.tasks)) > 1:
            what = f"episode {episode.index} has {len(episode.tasks)} tasks, and no task_index says which row has which"
            refuse(root, what)
        text = episode.tasks[0] if episode.tasks else ""
    elif int(task) in tasks:
        text = tasks[int(task)]
    else:
        refuse(root, f"episode {episode.index} has task_index {int(task)}, which meta/tasks does not have")
    annotations = [part.strip() for part in text.split("|") if part.strip()]
    return annotations[number % len(annotations)] if annotations else ""


def _read_rows(
    root: Path, path: Path, table: pyarrow.Table, chosen: Columns, state: Sequence[DataColumn], robot: Embodiment
) -> _Rows:
    """The ``chosen`` columns of a table, and those of the ``state``. CX611: they are not as wide as an action of
    ``robot`` and its parts."""
    if not table.num_rows:
        refuse(root, f"{path.name} has no rows")
    if "episode_index" not in table.column_names:
        refuse(root, f"{path.name} has no episode_index column")
    episodes = _whole_numbers(root, path, table, "episode_index")
    values = _values(root, path, table, chosen.columns, robot)
    where = [_values(root, path, table, state, robot)] if state else []
    if chosen.poses is not None:
        values = _changes(root, values, episodes)
    names = ", ".join(column.name for column in chosen.columns)
    for what, found in ((names, values), *((", ".join(c.name for c in state), one) for one in where)):
        key = "actions" if found is values else "state"
        require_width(f"{root}: {what}", robot, found.shape[1], f"{key}=… names the columns of an action, in order")
    tasks = _whole_numbers(root, path, table, "task_index") if "task_index" in table.column_names else None
    return _Rows(values.astype(np.float32), episodes, tasks, where[0].astype(np.float32) if where else None)


def _values(
    root: Path, path: Path, table: pyarrow.Table, columns: Sequence[DataColumn], robot: Embodiment
) -> NDArray[np.float64]:
    """[rows, width] of ``columns``, side by side."""
    parts = []
    for column in columns:
        if column.name not in table.column_names:
            refuse(root, f"{path.name} has no column {column.name}; columns: {', '.join(table.column_names[:12])}")
        try:
            values = np.asarray(table.column(column.name).to_pylist(), dtype=np.float64)
        except (ValueError, TypeError):
            refuse(root, f"column {column.name} of {path.name} has rows of different width, or no numbers")
        parts.append(column.taken(root, values.reshape(len(values), -1), robot))
    found = np.concatenate(parts, axis=1)
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found))[0][0])
        names = ", ".join(column.name for column in columns)
        refuse(root, f"row {row} of {names} in {path.name} holds NaN or infinite values")
    return found


def _changes(root: Path, values: NDArray[np.float64], episodes: NDArray[np.int64]) -> NDArray[np.float64]:
    """[rows, 10] of poses and a gripper [rows, 7]: the change from each row to the next one of its episode. The last
    row of an episode has no change; no window has it."""
    if values.shape[1] != 7:
        refuse(root, f"poses and a gripper of {values.shape[1]} columns; they are 6 and 1")
    found = np.concatenate([np.tile(_NO_CHANGE, (len(values), 1)), 1 - values[:, 6:]], axis=1)
    for episode in np.unique(episodes):
        mine = np.flatnonzero(episodes == episode)
        if len(mine) > 1:
            found[mine[:-1], :9] = pose_changes(values[mine, :6])
    return found


def _whole_numbers(root: Path, path: Path, table: pyarrow.Table, name: str) -> NDArray[np.int64]:
    values = table.column(name).to_pylist()
    if not all(type(value) is int and abs(value) < 1 << 63 for value in values):
        refuse(root, f"{name} of {path.name} is no whole number in some rows")
    return np.asarray(values, dtype=np.int64)


def _windows(episodes: Sequence[Episode], chunk: int, count: int) -> list[tuple[Episode, int]]:
    """``count`` windows at most, by episode and number within it: all episodes before any twice."""
    found: list[tuple[Episode, int]] = []
    windows = max((episode.length - 1) // chunk for episode in episodes)
    for number in range(windows):
        for episode in episodes:
            if len(found) == count:
                return found
            if (number + 1) * chunk < episode.length:
                found.append((episode, number))
    return found
