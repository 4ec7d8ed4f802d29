"""Which columns of a data set make an action, and in which order: by names, never by the alphabet.

An embodiment whose actions are put together from parts (joints, then a gripper) finds them by the names of columns, or
of the elements of one vector. Where names do not say the order of several columns, it has to be said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.diagnostics import UserError

_ACTION = "action"
_NUMBER = re.compile(r"(\d+)\D*$")


@dataclass(frozen=True)
class DataColumn:
    """A column of the tables, and which of its elements are taken in which order; None: all of them."""

    name: str
    elements: tuple[int, ...] | None = None
    part: tuple[str, int] | None = None
    """The part of an action that it is, with the columns that this has."""

    def taken(self, root: Path, values: np.ndarray, robot: Embodiment) -> np.ndarray:
        """Its elements of ``values`` [rows, width]. CX611: not as many as the part has."""
        width = values.shape[1]
        if self.part is not None and self.elements is None and width != self.part[1]:
            raise UserError(
                "CX611",
                f"{root}: {self.name} has {width} columns; actions of `{robot.name}` are {parts_in_words(robot)}",
                "the data set lacks what is missing: take one with whole actions, or name the columns with actions=…",
            )
        if self.elements is None:
            return values
        if max(self.elements) >= width:
            what = f"{root}: {self.name} has {width} columns, and names for {max(self.elements) + 1} or more"
            raise UserError("CX342", what, "correct the names in meta/info.json")
        return values[:, list(self.elements)]


@dataclass(frozen=True)
class Columns:
    """The columns of an action, in order."""

    columns: tuple[DataColumn, ...]
    notes: tuple[str, ...] = ()


def choose_columns(
    root: Path, present: Sequence[str], info: Mapping[str, Any], robot: Embodiment, asked: Sequence[str] | None
) -> Columns:
    """The columns of ``present`` that make an action of ``robot``, or those that are ``asked`` for.

    CX342: there are none, or their order is not known. CX611: they are of another representation.
    """
    features = info.get("features")
    names = {key: _names(feature) for key, feature in features.items()} if isinstance(features, dict) else {}
    if asked is not None:
        return Columns(tuple(_asked(root, name, present, names) for name in asked))
    several = [name for name in present if name.startswith(f"{_ACTION}.")]
    whole = _ACTION if _ACTION in present else None
    if whole is None and not several:
        _refuse(
            root, f"no action column; columns: {', '.join(present[:12])}", "actions=… names the columns of an action"
        )
    if robot.poses:
        _require_poses(root, [whole] if whole else several, names, robot)
    if robot.parts and (parts := _by_parts(robot, several)) is not None:
        return _with_note(parts, several, whole)
    if whole is not None:
        called = names.get(whole)
        elements = _by_elements(root, called, robot) if robot.parts else None
        found = _with_note((DataColumn(whole, elements),), several, whole)
        rest = [] if elements is None or called is None else [n for i, n in enumerate(called) if i not in elements]
        note = (f"elements of {whole} that are not read: {', '.join(rest)}",) if rest else ()
        return Columns(found.columns, (*found.notes, *note))
    if robot.parts:
        missing = [f"{_ACTION}.{name} ({width})" for name, width in _widths(robot) if _named(name, several) is None]
        _refuse(
            root,
            f"actions of `{robot.name}` are {parts_in_words(robot)}; there is no {', '.join(missing)}; columns: "
            f"{', '.join(several)}",
            "actions=… names the columns of an action, in order",
        )
    if len(several) > 1:
        _refuse(
            root,
            f"several columns of actions, and nothing says their order in `{robot.name}`: {', '.join(several)}",
            f"say it: actions={','.join(name.removeprefix(f'{_ACTION}.') for name in several[:2])}…",
        )
    return Columns((DataColumn(several[0]),))


def parts_in_words(robot: Embodiment) -> str:
    """``7 of joint_position, then 1 of gripper_position``"""
    return ", then ".join(f"{width} of {name}" for name, width in _widths(robot))


def _widths(robot: Embodiment) -> tuple[tuple[str, int], ...]:
    """The parts of an action with their columns."""
    return tuple((part.name, part.columns) for part in robot.parts)


def _with_note(columns: Sequence[DataColumn], several: Sequence[str], whole: str | None) -> Columns:
    """``columns``, and a note on other columns of actions, which are not read."""
    used = {column.name for column in columns}
    rest = [name for name in (*([whole] if whole else []), *several) if name not in used]
    note = f"columns that are not read: {', '.join(rest)}; the actions are {', '.join(c.name for c in columns)}"
    return Columns(tuple(columns), (note,) if rest else ())


def _asked(root: Path, name: str, present: Sequence[str], names: Mapping[str, Sequence[str] | None]) -> DataColumn:
    """The column ``name``, ``action.`` before it or not, or the element of `action` that info.json calls so."""
    for column in (name, f"{_ACTION}.{name}"):
        if column in present:
            return DataColumn(column)
    elements = names.get(_ACTION) or ()
    if _ACTION in present and elements.count(name) == 1:
        return DataColumn(_ACTION, (list(elements).index(name),))
    known = [column for column in present if column.startswith(_ACTION)]
    return _refuse(
        root,
        f"actions={name}: no such column; columns: {', '.join(known or present[:12])}"
        + (f"; elements of {_ACTION}: {', '.join(elements)}" if elements else ""),
        "actions=… names columns, or elements of `action` as info.json calls them, in order",
    )


def _by_parts(robot: Embodiment, several: Sequence[str]) -> tuple[DataColumn, ...] | None:
    """A column for each part of an action; None where one is missing."""
    found = [(_named(name, several), (name, width)) for name, width in _widths(robot)]
    columns = tuple(DataColumn(column, part=part) for column, part in found if column is not None)
    return columns if len(columns) == len(found) else None


def _named(part: str, several: Sequence[str]) -> str | None:
    return next((name for name in (f"{_ACTION}.{part}", f"{_ACTION}.{part}s") if name in several), None)


def _by_elements(root: Path, names: Sequence[str] | None, robot: Embodiment) -> tuple[int, ...] | None:
    """The elements of one vector in the order of the parts of ``robot``, by what info.json calls them; None where it
    gives them no names, or says that they are in order. CX342: the names are of something else."""
    if names is None:
        return None
    found: list[int] = []
    for part, width in _widths(robot):
        word = part.partition("_")[0]
        mine = [index for index, name in enumerate(names) if word in re.split(r"[^a-z]+", name.lower())]
        if len(mine) != width:
            _refuse(
                root,
                f"action has {len(mine)} elements called {word}; actions of `{robot.name}` are "
                f"{parts_in_words(robot)}; elements: {', '.join(names)}",
                "actions=… names the elements of an action, in order (actions=action: as they are)",
            )
        numbers = [_NUMBER.search(names[index]) for index in mine]
        if all(numbers) and len({n[1] for n in numbers if n}) == len(mine):
            mine = [index for _, index in sorted((int(n[1]), i) for n, i in zip(numbers, mine, strict=True) if n)]
        found += mine
    return None if found == list(range(len(names))) else tuple(found)


def _require_poses(
    root: Path, columns: Sequence[str], names: Mapping[str, Sequence[str] | None], robot: Embodiment
) -> None:
    """CX611 where names say that actions are positions of joints, and ``robot`` has changes of a pose."""
    words = [*columns, *(name for column in columns for name in names.get(column) or ())]
    joints = [word for word in words if "joint" in word.lower()]
    if joints:
        raise UserError(
            "CX611",
            f"{root}: its actions are positions of joints ({', '.join(joints[:8])}); an action of `{robot.name}` is "
            "the change of an end effector's pose: its position (3), its rotation as 6 numbers, and the gripper",
            "a policy checkpoint for joints takes them; for this one, actions=… names columns that hold such changes",
        )


def _names(feature: Any) -> tuple[str, ...] | None:
    """Names of a feature's elements in info.json: a list, or one list under any key; None where it has none."""
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _refuse(root: Path, found: str, hint: str) -> NoReturn:
    raise UserError("CX342", f"{root}: {found}", hint)
