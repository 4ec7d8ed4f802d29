"""Limits of a robot, and the review of a chunk of actions before it leaves this program.

A review is a pure function of the actions, the limits and what is known of the robot at that moment. It passes a chunk,
clips columns whose limits allow it, or rejects the chunk. It is a plausibility check of what a network has made. It is
no safety function: that is the robot's certified controller.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from cosmos_export import files
from cosmos_export.diagnostics import FindingError, UserError, shown
from cosmos_export.runtime.conversion import Units
from cosmos_export.runtime.embodiments import Actions

Verdict = Literal["pass", "clip", "reject"]
Floats = NDArray[np.float64]

MAX_LIMITS_BYTES = files.MIB
SLACK = 1e-5
"""Share of a bound (or of 1, where that is more) by which float32 may miss it: actions at the very bound pass."""
_BREACHES_SHOWN = 8


@dataclass(frozen=True)
class ColumnLimits:
    """Limits of one column of an action; None is no limit."""

    name: str
    low: float
    high: float
    """Values in the units of the limits."""
    step_per_s: float | None = None
    """Largest change per second, from one row to the next."""
    jump: float | None = None
    """Largest distance of the first row from where the robot is."""
    clip: bool = False
    """Whether a value outside may be brought inside."""


@dataclass(frozen=True)
class Limits:
    """The limits of a robot, as ``limits.toml`` has them."""

    units: Units
    """Units of the actions: ``raw``, those of the data, or ``model``, without statistics."""
    columns: tuple[ColumnLimits, ...]
    workspace: tuple[tuple[str, float, float], ...] = ()
    """Columns that are a position, each with the bounds of the box that it stays in. Nothing is clipped to it."""
    max_age_s: float | None = None
    """Oldest observation whose actions may still leave."""
    robot: str = ""
    digest: str = ""
    """SHA-256 of the file, in hexadecimal digits."""

    @property
    def needs_state(self) -> bool:
        """Whether a review must know where the robot is."""
        return any(column.jump is not None for column in self.columns)

    def require(self, width: int, units: Units) -> None:
        """UserError CX632 where these are no limits of actions of ``width`` columns in ``units``."""
        if len(self.columns) != width:
            raise UserError(
                "CX632",
                f"the limits have {len(self.columns)} columns, and an action has {width}",
                "are they those of this robot?",
            )
        if self.units != units:
            made = "without statistics, in the model's units" if units == "model" else "in the units of the data"
            hint = "--action-stats with the statistics of the data" if units == "model" else "leave --action-stats out"
            raise UserError(
                "CX632", f"the limits are in units `{self.units}`, and actions are made {made}",
                f"{hint}, or state the limits in those units",
            )  # fmt: skip


@dataclass(frozen=True)
class Breach:
    """One limit that actions do not keep, at the place where they miss it most."""

    rule: Literal["finite", "range", "step", "jump", "workspace", "age"]
    where: str
    """Column and row, where there are such."""
    found: float
    allowed: str
    clipped: bool = False

    def __str__(self) -> str:
        return f"{self.rule}{f' of {self.where}' if self.where else ''}: {self.found:.6g}, allowed {self.allowed}"


@dataclass(frozen=True)
class Review:
    """The actions that may leave."""

    verdict: Verdict
    actions: Actions | None
    """The actions that may leave; None where they are rejected."""
    breaches: tuple[Breach, ...] = ()
    unchecked: tuple[str, ...] = ()
    """Limits that could not be looked at, because what they need was not given."""
    limits: str | None = None
    """SHA-256 of the limits; None where there were none."""

    @property
    def document(self) -> dict[str, Any]:
        """The review as results, replies and the audit trail have it."""
        return {
            "verdict": self.verdict,
            "limits": self.limits,
            "breaches": [str(breach) for breach in self.breaches[:_BREACHES_SHOWN]],
            "unchecked": list(self.unchecked),
        }

    def require(self) -> Actions:
        """The actions that may leave. FindingError CX631 where they are rejected."""
        if self.actions is None:
            said = "; ".join(str(breach) for breach in self.breaches[:_BREACHES_SHOWN] if not breach.clipped)
            raise FindingError(
                "CX631", f"the actions are rejected: {said}",
                "nothing left; the limits are those of the file that was given",
            )  # fmt: skip
        return self.actions


def review(
    actions: Actions,
    limits: Limits | None,
    *,
    fps: float,
    state: Sequence[float] | NDArray[np.floating[Any]] | None = None,
    age_s: float | None = None,
) -> Review:
    """Look at ``actions``, float [rows, columns] with ``fps`` rows per second, before they leave.

    ``state``: where the robot is, a number per column in the same units; ``age_s``: seconds since that was seen. A
    value that is not finite rejects the chunk, with limits or without. Where clipping is allowed, values are brought
    into their range, the first row towards the state, and every row towards the one before it; then everything is
    looked at again, and what still misses a limit rejects the chunk.
    """
    values = np.asarray(actions, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(
            "CX632", f"actions of shape {list(values.shape)}", "they are [rows, columns], one of each or more"
        )
    digest = None if limits is None else limits.digest
    finite = np.isfinite(values)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        name = (
            limits.columns[column].name if limits is not None and column < len(limits.columns) else f"column {column}"
        )
        breach = Breach("finite", f"{name} in row {row}", float(values[row, column]), "a finite number")
        return Review("reject", None, (breach,), limits=digest)
    if limits is None:
        return Review("pass", np.asarray(actions, dtype=np.float32))
    limits.require(values.shape[1], limits.units)
    now = None if state is None else np.asarray(state, dtype=np.float64)
    if now is not None and (now.shape != values.shape[1:] or not np.isfinite(now).all()):
        raise UserError("CX632", f"a state of shape {list(now.shape)} beside actions of {values.shape[1]} columns")
    unchecked = tuple(
        what
        for what, missing in (
            ("jump: no state", limits.needs_state and now is None),
            ("age: no time", limits.max_age_s is not None and age_s is None),
        )
        if missing
    )
    bounds = _Bounds(limits, fps)
    first = list(bounds.breaches(values, now))
    clipped = values
    if first and any(column.clip for column in limits.columns):
        clipped = bounds.clipped(values, now)
        clipped = clipped.astype(np.float32).astype(np.float64)  # what leaves is what is looked at
    left = list(bounds.breaches(clipped, now)) if clipped is not values else first
    if limits.max_age_s is not None and age_s is not None and not age_s <= limits.max_age_s:
        left.append(Breach("age", "", age_s, f"{limits.max_age_s:g} s"))
    if left:
        return Review("reject", None, tuple(left), unchecked, digest)
    if not first:
        return Review("pass", np.asarray(actions, dtype=np.float32), (), unchecked, digest)
    done = tuple(Breach(b.rule, b.where, b.found, b.allowed, clipped=True) for b in first)
    return Review("clip", clipped.astype(np.float32), done, unchecked, digest)


class _Bounds:
    """The limits as arrays, one number per column; infinite where there is none."""

    def __init__(self, limits: Limits, fps: float) -> None:
        if not (math.isfinite(fps) and fps > 0):
            raise UserError("CX632", f"{fps} actions per second", "a rate is above 0")
        columns = limits.columns
        self.names = [column.name for column in columns]
        self.low = np.array([column.low for column in columns])
        self.high = np.array([column.high for column in columns])
        self.step = np.array([_or_infinite(column.step_per_s) / fps for column in columns])
        self.jump = np.array([_or_infinite(column.jump) for column in columns])
        self.clip = np.array([column.clip for column in columns])
        self.box = [(self.names.index(name), low, high) for name, low, high in limits.workspace]

    def breaches(self, values: Floats, state: Floats | None) -> list[Breach]:
        """The worst miss of each limit, column by column."""
        found: list[Breach] = []
        outside = np.maximum(self.low - values, values - self.high)
        room = SLACK * np.maximum(1, np.maximum(np.abs(self.low), np.abs(self.high)))
        for i, row in self._worst(outside, room):
            allowed = f"{self.low[i]:g} to {self.high[i]:g}"
            found.append(Breach("range", f"{self.names[i]} in row {row}", float(values[row, i]), allowed))
        if len(values) > 1:
            changes = np.abs(np.diff(values, axis=0))
            scale = SLACK * np.maximum(1, np.abs(values).max(axis=0))
            for i, row in self._worst(changes - self.step, scale):
                where = f"{self.names[i]} from row {row} to {row + 1}"
                found.append(Breach("step", where, float(changes[row, i]), f"{self.step[i]:g} per row"))
        if state is not None:
            away = np.abs(values[:1] - state)
            for i, _ in self._worst(away - self.jump, SLACK * np.maximum(1, np.abs(state))):
                where = f"{self.names[i]} from the state to row 0"
                found.append(Breach("jump", where, float(away[0, i]), f"{self.jump[i]:g}"))
        for i, low, high in self.box:
            outside = np.maximum(low - values[:, i], values[:, i] - high)
            row = int(np.argmax(outside))
            if outside[row] > SLACK * max(1, abs(low), abs(high)):
                where = f"{self.names[i]} in row {row}"
                found.append(Breach("workspace", where, float(values[row, i]), f"{low:g} to {high:g}"))
        return found

    @staticmethod
    def _worst(excess: Floats, room: Floats) -> list[tuple[int, int]]:
        """Column and row of the largest ``excess`` of each column where it is more than ``room``."""
        rows = excess.argmax(axis=0)
        columns = np.flatnonzero(excess[rows, np.arange(excess.shape[1])] > room)
        return [(int(i), int(rows[i])) for i in columns]

    def clipped(self, values: Floats, state: Floats | None) -> Floats:
        """``values`` brought inside, in the columns where that is allowed."""
        made = np.where(self.clip, np.clip(values, self.low, self.high), values)
        if state is not None:
            made[0] = np.where(self.clip, np.clip(made[0], state - self.jump, state + self.jump), made[0])
        for row in range(1, len(made)):
            before = made[row - 1]
            made[row] = np.where(self.clip, np.clip(made[row], before - self.step, before + self.step), made[row])
        return np.asarray(made)


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


# -- the file ---------------------------------------------------------------------------------------------------------

_TOP = {"robot": str, "units": str, "max_age_s": float, "column": list, "workspace": dict}
_COLUMN = {"name": str, "low": float, "high": float, "max_step_per_s": float, "max_jump": float, "clip": bool}
_BOX = {"columns": list, "low": list, "high": list}


def read_limits(path: Path) -> Limits:
    """The limits in the TOML file ``path``; docs/serve.md describes it. CX630: it is not such a file."""
    try:
        data = files.read_bytes(path, MAX_LIMITS_BYTES)
        document = files.parse_toml(data.decode())
    except OSError as error:
        _refuse(path, files.reason(error), "is it the right path?")
    except ValueError as error:  # also bytes that are not UTF-8, and numbers of thousands of digits
        _refuse(path, f"not TOML: {error}")
    top = _fields(path, "the file", document, _TOP, ("units", "column"))
    if top["units"] not in ("raw", "model"):
        _refuse(path, f"`units` is {shown(top['units'])}", "raw: those of the data; model: as the model makes them")
    columns = tuple(_read_column(path, i, entry) for i, entry in enumerate(top["column"]))
    names = [column.name for column in columns]
    if not columns or len(set(names)) != len(names):
        _refuse(path, "no column" if not columns else "two columns have the same name", "one [[column]] per column")
    age = top.get("max_age_s")
    if age is not None and age <= 0:
        _refuse(path, f"`max_age_s` is {age:g}", "it is above 0")
    box = _read_box(path, top["workspace"], names) if "workspace" in top else ()
    digest = hashlib.sha256(data).hexdigest()
    return Limits(top["units"], columns, box, age, top.get("robot", ""), digest)


def _read_column(path: Path, index: int, entry: Any) -> ColumnLimits:
    where = f"column {index}"
    found = _fields(path, where, entry, _COLUMN, ("name", "low", "high"))
    where = f"column {index} (`{shown(found['name'])}`)"
    if not found["low"] < found["high"]:
        _refuse(path, f"{where}: low {found['low']:g} is not below high {found['high']:g}")
    for name in ("max_step_per_s", "max_jump"):
        if found.get(name, 1.0) <= 0:
            _refuse(path, f"{where}: `{name}` is {found[name]:g}", "it is above 0; leave it out for no limit")
    return ColumnLimits(
        found["name"], found["low"], found["high"], found.get("max_step_per_s"), found.get("max_jump"),
        found.get("clip", False),
    )  # fmt: skip


def _read_box(path: Path, entry: Any, names: Sequence[str]) -> tuple[tuple[str, float, float], ...]:
    found = _fields(path, "workspace", entry, _BOX, tuple(_BOX))
    columns = found["columns"]
    lows, highs = ([_number(path, f"workspace: `{key}`", v) for v in found[key]] for key in ("low", "high"))
    if not len(columns) == len(lows) == len(highs) > 0 or not all(name in names for name in columns):
        _refuse(path, "workspace: its columns are not columns of the file, each with low and high")
    box = tuple(zip(columns, lows, highs, strict=True))
    for name, low, high in box:
        if not low < high:
            _refuse(path, f"workspace: low {low:g} of `{shown(name)}` is not below its high {high:g}")
    return box


def _fields(path: Path, where: str, entry: Any, kinds: Mapping[str, type], needed: Sequence[str]) -> dict[str, Any]:
    """The fields of a table, each of its kind; no others. Numbers are floats."""
    if not isinstance(entry, dict):
        _refuse(path, f"{where} is not a table")
    if unknown := sorted(entry.keys() - kinds.keys()):
        _refuse(path, f"{where} has {', '.join(map(shown, unknown))}", f"known: {', '.join(kinds)}")
    if lacking := [name for name in needed if name not in entry]:
        _refuse(path, f"{where} has no {', '.join(lacking)}")
    found: dict[str, Any] = {}
    for name, value in entry.items():
        if kinds[name] is float:
            found[name] = _number(path, f"{where}: `{name}`", value)
        elif type(value) is not kinds[name]:
            _refuse(path, f"{where}: `{name}` is {shown(value)}", f"it is of type {kinds[name].__name__}")
        else:
            found[name] = value
    return found


def _number(path: Path, where: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e30:  # NaN too; an integer may be beyond every float
        _refuse(path, f"{where} is {shown(value)}", "a finite number")
    return float(value)


def _refuse(path: Path, found: str, hint: str = "") -> NoReturn:
    raise UserError("CX630", f"limits in {path}: {found}", hint)
