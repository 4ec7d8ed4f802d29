"""A robot's observation and instruction, from the messages of both protocols.

Names of cameras and of the state are those of the robot's data sets (`Embodiment`): openpi writes ``observation/NAME``,
GR00T has a map for each of ``video``, ``state`` and ``language``. Everything is looked at before it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.runtime.recorded import array_digest
from cosmos_export.runtime.views import Picture

PREFIX = "observation/"
MAX_PROMPT_CHARACTERS = 8192
"""Task of a robot. A caption as long as a page is no task."""
MAX_KEYS = 256


@dataclass(frozen=True)
class Observation:
    """One look of the robot."""

    prompt: str
    pictures: Mapping[str, Picture]
    """Pictures by their names in the embodiment's views."""
    state: NDArray[np.float64] | None = None
    """[rows, columns]: where the robot was, as it says so itself, the last row now; None where it was not said."""

    @property
    def now(self) -> NDArray[np.float64] | None:
        """[columns]: where the robot is."""
        return None if self.state is None else np.asarray(self.state[-1])

    @property
    def digests(self) -> dict[str, Any]:
        """SHA-256 of what was given, for the audit trail."""
        return {
            "prompt": hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest(),
            "pictures": {name: array_digest(picture) for name, picture in sorted(self.pictures.items())},
            "state": None if self.state is None else array_digest(self.state),
        }


def from_openpi(message: object, robot: Embodiment) -> Observation:
    """The observation in a message of openpi. UserError CX640: it is none."""
    found = _map(message, "the observation")
    pictures: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for key, value in found.items():
        name = key.removeprefix(PREFIX)
        if name in (robot.views.whole, *robot.views.cameras) or _looks_like_a_picture(value):
            pictures[name] = _array(key, value)
        elif name in _parts(robot):
            state[name] = _array(key, value)
    return Observation(_prompt("prompt", found.get("prompt")), pictures, _state(state, robot))


def from_groot(message: object, robot: Embodiment) -> Observation:
    """The observation in a message of GR00T: maps ``video``, ``state`` and ``language``, or keys such as
    ``video.NAME``, each with one batch and the last of the times. UserError CX640: it is none."""
    found = _nested(_map(message, "the observation"))
    pictures = {name: _last(f"video.{name}", value, 3) for name, value in found["video"].items()}
    states = {name: _times(f"state.{name}", value, 1) for name, value in found["state"].items()}
    tasks = list(found["language"].items())
    if len(tasks) != 1:
        _refuse(f"{len(tasks)} instructions", "one under `language`, or one key `annotation.…`")
    key, task = tasks[0]
    while isinstance(task, list) and len(task) == 1:
        task = task[0]
    known = {name: value for name, value in states.items() if name in _parts(robot)}
    return Observation(_prompt(f"language.{key}", task), pictures, _state(known, robot))


def _nested(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    groups: dict[str, dict[str, Any]] = {"video": {}, "state": {}, "language": {}}
    for key, value in found.items():
        group, dot, name = key.partition(".")
        group = "language" if group in ("annotation", "task") else group
        if group not in groups:
            continue
        if dot or key not in ("video", "state", "language"):
            groups[group][name or key] = value
        else:
            groups[group] |= _map(value, f"`{key}`")
    return dict(groups)


def _last(name: str, value: object, dims: int) -> NDArray[Any]:
    """The newest of [batch, times, …] or [times, …]."""
    return np.asarray(_times(name, value, dims)[-1])


def _times(name: str, value: object, dims: int) -> NDArray[Any]:
    """[times, …] of [batch, times, …] with a batch of one, or of [times, …]."""
    array = _array(name, value)
    if array.ndim == dims + 2:
        if array.shape[0] != 1:
            _refuse(f"`{name}` has a batch of {array.shape[0]}", "a request is for one robot")
        array = array[0]
    if array.ndim != dims + 1 or not array.shape[0]:
        _refuse(f"`{name}` has shape {list(array.shape)}", "[batch, times, …] with a batch of one")
    return array


def _map(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_KEYS or not all(isinstance(key, str) for key in value):
        _refuse(f"{what} is no map with keys of text" if not isinstance(value, dict) else f"{what} has odd keys")
    return value


def _array(name: str, value: object) -> NDArray[Any]:
    if isinstance(value, bool | int | float | np.generic):
        return np.asarray(value)
    if isinstance(value, list) and len(value) <= 64 and all(type(one) in (int, float) for one in value):
        return np.asarray(value, dtype=np.float64)
    if not isinstance(value, np.ndarray):
        _refuse(f"{shown(name)} is {type(value).__name__}", "an array of numbers")
    return value


def _looks_like_a_picture(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim >= 3


def _prompt(name: str, value: object) -> str:
    if not isinstance(value, str):
        _refuse(f"`{name}` is {type(value).__name__}", "the task as text")
    if len(value) > MAX_PROMPT_CHARACTERS:
        _refuse(f"`{name}` has {len(value):,} characters; allowed: {MAX_PROMPT_CHARACTERS:,}")
    return value


def _parts(robot: Embodiment) -> dict[str, int]:
    """The parts of the robot's state, which has the columns of an action; without names it is one part."""
    if robot.history and not robot.parts and robot.width is not None:
        return {"state": robot.width}
    return {part.name: part.columns for part in robot.parts}


def _state(parts: Mapping[str, Any], robot: Embodiment) -> NDArray[np.float64] | None:
    """[rows, columns]: as many rows as the policy is given, or one, with all parts in their order; None where no part
    is there."""
    if not parts:
        return None
    found, rows = [], robot.history or 1
    for name, count in _parts(robot).items():
        if name not in parts:
            _refuse(f"a state without `{name}`", f"all of {', '.join(f'`{one}`' for one in _parts(robot))}, or none")
        array = np.asarray(parts[name])
        if array.dtype.kind not in "iuf":
            _refuse(f"`{name}` has type {array.dtype}", "numbers")
        if array.ndim < 2 and array.size == count:
            array = array.reshape(1, count)
        if array.ndim != 2 or array.shape[1] != count or len(array) < rows:
            wanted = f"{count} numbers" if rows == 1 else f"{rows} rows of {count} numbers, the last now"
            _refuse(f"`{name}` has shape {list(array.shape)}", wanted)
        found.append(array[-rows:].astype(np.float64))
    state = np.concatenate(found, axis=1)
    if not np.isfinite(state).all():
        _refuse("a state that is not finite")
    return state


def _refuse(found: str, hint: str = "") -> NoReturn:
    raise UserError("CX640", f"no observation: {found}", hint)
