"""Which statistics bring the actions of a data set to the model's numbers; they are never made up without a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.calibration.columns import Columns
from cosmos_export.calibration.items import Options
from cosmos_export.diagnostics import UserError
from cosmos_export.runtime.embodiments import Actions, ActionScale, read_scale, units_warning

_SMALLEST = 1e-8
_OWN, _NONE = "own", "none"
_METHOD = "quantile"
"""The published models' normalisation."""


@dataclass(frozen=True)
class Scaling:
    """How actions become the model's; without a scale they are."""

    scale: ActionScale | None = None
    notes: tuple[str, ...] = ()
    file: Path | None = None


def choose_scale(root: Path, options: Options, robot: Embodiment, columns: Columns, actions: Actions) -> Scaling:
    """The statistics of ``options``, those in the data set at ``root``, or none where the model has the robot's own
    numbers. ``actions`` [rows, width] are all of the data.

    CX613: there are none, or they are not of these actions; CX341: statistics where the model is trained without.
    """
    asked = options.stats
    if robot.normalization == _NONE and asked != _NONE:
        if asked is not None or options.normalization is not None:
            what = f"stats={asked}" if asked is not None else f"normalization={options.normalization}"
            raise UserError("CX341", f"{what}: `{robot.name}` is trained on the robot's own numbers", "leave it out")
        return Scaling()
    if asked in (_OWN, _NONE) and options.normalization is not None:
        raise UserError("CX341", f"normalization={options.normalization} with stats={asked}", "leave one of them out")
    if asked == _NONE:
        doubt = units_warning(actions, robot.poses)
        return Scaling(
            notes=(f"{root.name}: its actions are taken as the model's own numbers, but {doubt}",) * bool(doubt)
        )
    if asked == _OWN:
        low, high = np.quantile(actions, [0.01, 0.99], axis=0)
        scale = ActionScale(_METHOD, (high + low) / 2, np.maximum((high - low) / 2, _SMALLEST))
        note = "the actions are scaled by their own 1 % and 99 % quantiles, and not as the model was trained"
        return Scaling(scale, (note,))
    method, named = options.normalization or _METHOD, _named(columns)
    if asked is not None:
        path = Path(asked)
        return Scaling(read_scale(path, actions.shape[1], method, named), (_said(path.name, method),), path)
    path = root / "meta" / "stats.json"
    if columns.poses is not None:
        _refuse(root, "statistics of changes of a pose are in no data set")
    if not path.is_file():
        _refuse(root, "there is no meta/stats.json")
    try:
        scale = read_scale(path, actions.shape[1], method, named)
    except UserError as error:
        raise UserError("CX613", error.message, _way_out()) from error
    return Scaling(scale, (_said("meta/stats.json", method),), path)


def _named(columns: Columns) -> Sequence[tuple[str, Sequence[int] | None]]:
    return [(column.name, column.elements) for column in columns.columns]


def _said(name: str, method: str) -> str:
    return f"the actions are scaled by the statistics of {name} ({method})"


def _way_out() -> str:
    return (
        "stats=FILE with the statistics that the model was trained with, stats=own for quantiles of this data, "
        "stats=none where its numbers are the model's; normalization=minmax or meanstd for what stats.json has"
    )


def _refuse(root: Path, found: str) -> NoReturn:
    raise UserError("CX613", f"{root}: nothing says how its actions become the model's numbers: {found}", _way_out())
