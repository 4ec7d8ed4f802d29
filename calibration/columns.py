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
from cosmos_export.embodiments import POSES, PoseColumns

_ACTION, _STATE = "action", "observation.state"
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
    poses: PoseColumns | None = None
    """They are poses and a gripper, of whose changes actions are made; None: they are actions."""


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
    if robot.poses and (made := _poses(root, present, [whole] if whole else several, names, robot)) is not None:
        return made
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


def _asked(
    root: Path, name: str, present: Sequence[str], names: Mapping[str, Sequence[str] | None], of: str = _ACTION
) -> DataColumn:
    """The column ``name``, ``of`` before it or not, or the element of the column ``of`` that info.json calls so."""
    for column in (name, f"{of}.{name}"):
        if column in present:
            return DataColumn(column)
    elements = names.get(of) or ()
    if of in present and elements.count(name) == 1:
        return DataColumn(of, (list(elements).index(name),))
    known, key = [column for column in present if column.startswith(of)], "actions" if of == _ACTION else "state"
    return _refuse(
        root,
        f"{key}={name}: no such column; columns: {', '.join(known or present[:12])}"
        + (f"; elements of {of}: {', '.join(elements)}" if elements else ""),
        f"{key}=… names columns, or elements of `{of}` as info.json calls them, in order",
    )


def _by_parts(robot: Embodiment, several: Sequence[str], of: str = _ACTION) -> tuple[DataColumn, ...] | None:
    """A column for each part of an action; None where one is missing."""
    found = [(_named(name, several, of), (name, width)) for name, width in _widths(robot)]
    columns = tuple(DataColumn(column, part=part) for column, part in found if column is not None)
    return columns if len(columns) == len(found) else None


def _named(part: str, several: Sequence[str], of: str = _ACTION) -> str | None:
    return next((name for name in (f"{of}.{part}", f"{of}.{part}s") if name in several), None)


def _by_elements(
    root: Path, names: Sequence[str] | None, robot: Embodiment, of: str = _ACTION
) -> tuple[int, ...] | None:
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
                f"{of} has {len(mine)} elements called {word}; actions of `{robot.name}` are "
                f"{parts_in_words(robot)}; elements: {', '.join(names)}",
                f"{'actions' if of == _ACTION else 'state'}=… names its elements in order (={of}: as they are)",
            )
        numbers = [_NUMBER.search(names[index]) for index in mine]
        if all(numbers) and len({n[1] for n in numbers if n}) == len(mine):
            mine = [index for _, index in sorted((int(n[1]), i) for n, i in zip(numbers, mine, strict=True) if n)]
        found += mine
    return None if found == list(range(len(names))) else tuple(found)


def _poses(
    root: Path,
    present: Sequence[str],
    columns: Sequence[str],
    names: Mapping[str, Sequence[str] | None],
    robot: Embodiment,
) -> Columns | None:
    """The poses that actions of ``robot`` are made of, where ``columns`` are positions of joints; None where names do
    not say so. CX611: there are none."""
    words = [*columns, *(name for column in columns for name in names.get(column) or ())]
    joints = [word for word in words if "joint" in word.lower()]
    if not joints:
        return None
    source = POSES.get(robot.name)
    if source is not None and {source.poses, source.gripper} <= set(present):
        note = (
            f"the actions are changes of {source.poses} and 1 − {source.gripper}: its joints are not read "
            f"({', '.join(joints[:8])})"
        )
        return Columns((DataColumn(source.poses), DataColumn(source.gripper)), (note,), source)
    wanted = "" if source is None else f"; they are made of {source.poses} and {source.gripper}, which are not there"
    raise UserError(
        "CX611",
        f"{root}: its actions are positions of joints ({', '.join(joints[:8])}); an action of `{robot.name}` is the "
        f"change of an end effector's pose: its position (3), its rotation as 6 numbers, and the gripper{wanted}",
        "a policy checkpoint for joints takes them; for this one, actions=… names columns that hold such changes",
    )


def choose_state(
    root: Path, present: Sequence[str], info: Mapping[str, Any], robot: Embodiment, asked: Sequence[str] | None
) -> tuple[DataColumn, ...]:
    """The columns that say where ``robot`` is, in the order of an action's, or those that are ``asked`` for. CX342:
    there are none, or their order is not known."""
    features = info.get("features")
    names = {key: _names(feature) for key, feature in features.items()} if isinstance(features, dict) else {}
    if asked is not None:
        return tuple(_asked(root, name, present, names, _STATE) for name in asked)
    several = [name for name in present if name.startswith(f"{_STATE}.")]
    if robot.parts and (parts := _by_parts(robot, several, _STATE)) is not None:
        return parts
    if _STATE in present:
        return (DataColumn(_STATE, _by_elements(root, names.get(_STATE), robot, _STATE) if robot.parts else None),)
    wanted = parts_in_words(robot) if robot.parts else f"{robot.width} numbers in the order of an action's columns"
    return _refuse(
        root,
        f"`{robot.name}` is given the robot's state ({wanted}) as the first row of its actions, and no column says it; "
        f"columns: {', '.join(several or present[:12])}",
        "state=… names the columns of the state, in order; mode=inverse-dynamics shows the data without it",
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
