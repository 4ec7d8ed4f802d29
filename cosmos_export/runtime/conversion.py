"""Between a robot's numbers and the model's: the one place where columns are turned around and statistics applied.

Whatever leaves here for a robot, a file or a review of limits is in the robot's numbers; whatever goes on to the model
is in the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from cosmos_export import files
from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.checkpoint.strict_json import parse_document
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.in_memory import InMemory
from cosmos_export.runtime.embodiments import Actions, ActionScale, Beyond

Units = Literal["raw", "model"]
"""``raw``: those of the data, by statistics; ``model``: the model's own, without. Turned-around columns are the
robot's either way."""
_MAX_STATE_BYTES = files.MIB


@dataclass(frozen=True)
class Conversion:
    """A robot's columns that the model has as 1 − the robot's own number, and the statistics of the data."""

    mirrored: tuple[int, ...] = ()
    scale: ActionScale | None = None
    """None where no statistics were given."""

    @property
    def units(self) -> Units:
        """Units of what goes in and comes out."""
        return "model" if self.scale is None else "raw"

    def to_model(self, robot: Actions, clamp: bool = False) -> Actions:
        """float32 [rows, width] as the model takes them; ``clamp``: cut off at the bounds of the statistics."""
        turned = self._turned(robot)
        return turned if self.scale is None else self.scale.to_model(turned, clamp)

    def to_robot(self, model: Actions) -> Actions:
        """float32 [rows, width] as the robot takes them. FindingError CX663: one is not a finite number."""
        return self._turned(model if self.scale is None else self.scale.to_raw(model))

    def beyond(self, robot: Actions) -> Beyond | None:
        """How many values of ``robot`` are outside the statistics; None without them."""
        return None if self.scale is None else self.scale.beyond(self._turned(robot))

    def _turned(self, actions: Actions) -> Actions:
        columns = list(self.mirrored)
        turned = np.array(actions, dtype=np.float32)
        turned[:, columns] = np.float32(1) - turned[:, columns]
        return turned


UNCHANGED = Conversion()


def read_state(given: Path | InMemory[Any], robot: Embodiment, width: int) -> Actions:
    """float32 [rows, width] of where ``robot`` is, in its own numbers, in the columns of an action, the last row now.

    A ``.json`` file or its contents: a list of numbers, a list of such rows, or an object with a list for each part of
    an action by its name. An array is the same. CX619: anything else, or numbers that are not finite.
    """
    value = given.value if isinstance(given, InMemory) else _read(given)
    if isinstance(value, Mapping):
        value = _joined(given, value, robot)
    try:
        rows = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        _refuse(given, "it is not a list of numbers", _wanted(robot, width))
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows) or np.asarray(value).dtype.kind not in "iuf":
        _refuse(given, f"shape {list(np.shape(value))}", _wanted(robot, width))
    with np.errstate(over="ignore"):
        state = rows.astype(np.float32)
    if not np.isfinite(state).all():
        _refuse(given, "a value is not a finite number in float32", _wanted(robot, width))
    return state


def _read(path: Path) -> Any:
    if path.suffix.lower() != ".json":
        _refuse(path, f"the name ends in {path.suffix or 'nothing'}", "allowed: .json")
    try:
        document = parse_document(files.read_bytes(path, _MAX_STATE_BYTES))
    except OSError as error:
        _refuse(path, files.reason(error), "is it the right path?")
    except ValueError as error:
        _refuse(path, f"not JSON: {error}")
    return document["state"] if isinstance(document, dict) and list(document) == ["state"] else document


def _joined(given: object, parts: Mapping[str, Any], robot: Embodiment) -> Any:
    """Rows of all parts of an action, in their order."""
    names = [part.name for part in robot.parts]
    if set(parts) != set(names):
        said = ", ".join(map(shown, parts)) or "nothing"
        wanted = ", ".join(f"`{part.name}` ({part.columns})" for part in robot.parts)
        _refuse(given, f"it has {said}", f"all of {wanted}" if names else "a list of numbers: the parts have no names")
    found = []
    for part in robot.parts:
        try:
            value = np.asarray(parts[part.name])
        except (TypeError, ValueError, OverflowError):  # lists of different lengths
            _refuse(given, f"`{part.name}` is no list of numbers", f"{part.columns} numbers")
        found_shape = list(value.shape)
        value = value.reshape(1, -1) if value.ndim < 2 else value
        if value.ndim != 2 or value.shape[1] != part.columns or value.dtype.kind not in "iuf":
            _refuse(given, f"`{part.name}` has shape {found_shape}", f"{part.columns} numbers")
        found.append(value)
    if len({len(value) for value in found}) > 1:
        _refuse(given, "its parts have different numbers of rows")
    return np.concatenate(found, axis=1)


def _wanted(robot: Embodiment, width: int) -> str:
    parts = ", then ".join(f"{part.columns} of {part.name}" for part in robot.parts)
    return f"{width} numbers in the order of an action's columns{f': {parts}' if parts else ''}"


def _refuse(given: object, found: str, hint: str = "") -> NoReturn:
    raise UserError("CX619", f"the state in {given}: {found}", hint)
