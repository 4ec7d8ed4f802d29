"""The policy in ``checkpoint.json``: its domain, its actions, and whether it is given the robot's state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cosmos_export.diagnostics import UserError, shown

_LARGEST_CHUNK, _LARGEST_RATE = 100_000, 1000.0
_LONGEST_HISTORY = 1024


@dataclass(frozen=True)
class Policy:
    """A policy as its checkpoint describes it; None where it does not say."""

    domain: str | None = None
    """Embodiment whose actions it was trained on."""
    width: int | None = None
    """Columns of an action."""
    chunk: int | None = None
    """Actions in a request."""
    fps: float | None = None
    state: bool | None = None
    """Whether the robot's state is the first row of its actions."""
    history: int | None = None
    """Rows of the state before the actions; the last is where the robot is now."""
    unread: tuple[str, ...] = ()
    """Fields that nothing here reads."""


def read_policy(fields: Mapping[str, Any] | None) -> Policy | None:
    """The ``policy`` of checkpoint.json; None where there is none. CX103: a field is not what it should be, or two
    fields that mean the same differ."""
    if fields is None:
        return None
    read: set[str] = set()

    def value(*names: str) -> tuple[str, Any]:
        """The name and the value of the one of ``names`` that is given; all that are given say the same."""
        given = [name for name in names if fields.get(name) is not None]
        read.update(name for name in names if name in fields)
        for name in given[1:]:
            if fields[name] != fields[given[0]]:
                _refuse(f"{given[0]} is {shown(fields[given[0]])} and {name} is {shown(fields[name])}")
        return (given[0], fields[given[0]]) if given else (names[0], None)

    domain = _checked(*value("domain_name"), str)
    width = _whole(*value("raw_action_dim", "action_dim"), 4096)
    chunk = _whole(*value("action_chunk_size", "chunk_size", "chunk"), _LARGEST_CHUNK)
    rate_name, rate = value("conditioning_fps", "fps")
    fps = _checked(rate_name, rate, int, float)
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= _LARGEST_RATE):
        _refuse(f"{rate_name} = {fps} is not a rate")
    state = _checked(*value("use_state"), bool)
    history_name, history = value("history_length")
    rows = _checked(history_name, history, int)
    if rows is not None and not 0 <= rows <= _LONGEST_HISTORY:
        _refuse(f"{history_name} = {rows} is not within 0 … {_LONGEST_HISTORY}")
    if rows is not None and state is not None and (rows > 0) != state:
        _refuse(f"use_state is {str(state).lower()} and {history_name} is {rows}")
    return Policy(
        domain=domain or None,
        width=width,
        chunk=chunk,
        fps=None if fps is None else float(fps),
        state=state if rows is None else rows > 0,
        history=rows if rows is not None or state is None else int(state),
        unread=tuple(sorted(set(fields) - read)),
    )


def _checked(name: str, value: Any, *kinds: type) -> Any:
    if value is not None and type(value) not in kinds:
        _refuse(f"{name} = {shown(value)} is no {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _whole(name: str, value: Any, largest: int) -> int | None:
    number: int | None = _checked(name, value, int)
    if number is not None and not 1 <= number <= largest:
        _refuse(f"{name} = {number} is not within 1 … {largest:,}")
    return number


def _refuse(what: str) -> NoReturn:
    raise UserError("CX103", f"checkpoint.json: policy: {what}", "restore the file, or correct the field")
