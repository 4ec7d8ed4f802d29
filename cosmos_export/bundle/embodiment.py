"""Robots as a bundle describes them: columns of actions, rate, cameras and their composition, the state that is given.

A bundle has a row for each robot that its model acts for, so that no runtime needs a table of robots.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from cosmos_export.bundle.strict import AtLeast, AtMost, Pattern, StrictError
from cosmos_export.diagnostics import UserError, shown

_Name = Annotated[str, Pattern(r"[^\x00-\x1f\x7f-\x9f]{1,256}", "a name of at most 256 printable characters")]
_Count = Annotated[int, AtLeast(1), AtMost(1 << 20)]
_Rows = Annotated[int, AtLeast(0), AtMost(1024)]


@dataclass(frozen=True)
class ColumnGroup:
    """Columns of an action that belong together."""

    name: _Name
    """As data sets and observations call it."""
    columns: _Count
    unit: _Name | None = None
    """Unit of the robot's own numbers; null: not known."""
    mirrored: bool = False
    """Whether the model has 1 − the robot's own number."""


@dataclass(frozen=True)
class Views:
    """The cameras of a robot, and how their pictures become the one that the model is shown."""

    whole: _Name = "image"
    """A picture that needs no composition."""
    cameras: tuple[_Name, ...] = ()
    """Cameras that are composed into one picture, in the order in which ``layout`` takes them."""
    short: tuple[_Name, ...] = ()
    """Short names of the same cameras."""
    layout: _Name | None = None
    """How they are composed: docs/bundle.md has each layout."""
    size: tuple[_Count, ...] = ()
    """Height and width that the picture is brought to, bilinear, without padding; empty: it stays as it is."""
    viewpoint: _Name | None = None
    """Perspective that the caption speaks of; null: the usual one."""


PLAIN_VIEWS = Views()


@dataclass(frozen=True)
class Embodiment:
    """A robot's actions, and the usual form of its clips."""

    name: _Name
    domain: Annotated[int, AtLeast(0)]
    """Index into the model's domain matrices."""
    width: _Count | None
    """Columns of an action; null where the data set decides."""
    chunk: _Count = 16
    """Actions in a request; the clip has one frame more."""
    fps: float = 10.0
    """Actions, and frames, per second."""
    rated: bool = False
    """Trained at this rate alone; otherwise it is what clips usually have."""
    tier: _Count = 480
    """Resolution tier of the canvas."""
    parts: tuple[ColumnGroup, ...] = ()
    """The parts of an action, in order. Empty: one vector, whose order the data set decides."""
    poses: bool = False
    """An action is the change of an end effector's pose and a gripper: position (3), rotation as 6 numbers, gripper."""
    views: Views = PLAIN_VIEWS
    history: _Rows = 0
    """Rows of the robot's state, in the columns of an action, that come before the actions and are given: the last is
    where the robot is at the first frame."""
    normalization: _Name | None = None
    """Scale of the model's numbers: `none`, the robot's own; null: scaled by statistics of the data, which a bundle
    does not have."""

    @property
    def mirrored(self) -> tuple[int, ...]:
        """Columns of which the model has 1 − the robot's own number."""
        found: list[int] = []
        first = 0
        for part in self.parts:
            found += range(first, first + part.columns) if part.mirrored else ()
            first += part.columns
        return tuple(found)


def choose_embodiment(name: str | None, policy: Embodiment | None, known: Mapping[str, Embodiment]) -> Embodiment:
    """The embodiment ``name`` of ``known``, or that of a checkpoint that is a ``policy``.

    CX610: neither, an unknown one, or another than the policy's.
    """
    if policy is not None:
        if name is not None and name != policy.name and (name not in known or known[name].domain != policy.domain):
            raise UserError(
                "CX610",
                f"embodiment `{name}`; this checkpoint is a policy for `{policy.name}` only",
                "leave --embodiment out",
            )
        return policy
    if name is None:
        raise UserError("CX610", "an action needs an embodiment", f"--embodiment with one of {', '.join(known)}")
    return known_embodiment(name, known)


def known_embodiment(name: str, known: Mapping[str, Embodiment]) -> Embodiment:
    """The embodiment ``name``. CX610: there is none."""
    if name in known:
        return known[name]
    parts = [one for one in known if name.lower() in re.split(r"[_-]", one.lower())]
    near = parts or difflib.get_close_matches(name.lower(), known, n=1)
    raise UserError(
        "CX610",
        f"unknown embodiment {shown(name)}; known: {', '.join(known)}",
        f"did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else "the one that the model was trained on",
    )


def require_width(what: str, robot: Embodiment, columns: int, hint: str = "is it the right embodiment=?") -> None:
    """CX611 where actions called ``what`` have other ``columns`` than those of ``robot``."""
    if robot.width is not None and columns != robot.width:
        raise UserError("CX611", f"{what} has {columns} columns; actions of `{robot.name}` have {robot.width}", hint)


def embodiment_problems(rows: tuple[Embodiment, ...], width: int, domains: int) -> Iterator[StrictError]:
    """Contradictions within ``rows`` of a model with actions of ``width`` columns and ``domains`` domains."""
    for i, row in enumerate(rows):
        where = f"request.action.embodiments[{i}]"
        if row.name in [other.name for other in rows[:i]]:
            yield StrictError(where, f"name {shown(row.name)} is used twice")
        if row.domain >= domains:
            yield StrictError(where, f"domain {row.domain}; the model has {domains}")
        if row.width is not None and row.width > width:
            yield StrictError(where, f"{row.width} columns; the model has {width}")
        if row.parts and sum(part.columns for part in row.parts) != row.width:
            yield StrictError(where, f"parts of {sum(part.columns for part in row.parts)} columns, and {row.width}")
        if row.history and row.width is None:
            yield StrictError(where, "rows of the state, and no width")
        if not 0 < row.fps <= 1000:
            yield StrictError(where, f"{row.fps:g} actions per second")
        views = row.views
        if bool(views.cameras) != (views.layout is not None) or len(views.short) not in (0, len(views.cameras)):
            yield StrictError(f"{where}.views", "cameras have a layout, and as many short names or none")
        if len(views.size) not in (0, 2):
            yield StrictError(f"{where}.views", "a size is a height and a width")
