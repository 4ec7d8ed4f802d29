"""The robots of a bundle, and the numbers that describe their actions: action files, and statistics that scale actions.

An action of an embodiment has a fixed width; the model's own is wider and the rest is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cosmos_export import files
from cosmos_export.bundle import RequestRecord
from cosmos_export.bundle.embodiment import Embodiment, choose_embodiment
from cosmos_export.checkpoint.safetensors_header import TensorEntry, read_header
from cosmos_export.checkpoint.strict_json import parse_document, parse_object
from cosmos_export.diagnostics import FindingError, UserError, shown
from cosmos_export.in_memory import InMemory

Actions = NDArray[np.float32]
"""[rows, width]."""


def policy_of(record: RequestRecord) -> Embodiment | None:
    """The embodiment of the policy that ``record`` is of, None where it is of none. CX610: one that is unknown."""
    domain = record.sampling.policy
    if domain is None or record.action is None:
        return None
    if len(record.action.embodiments) != 1:
        raise UserError(
            "CX610",
            f"this bundle is of a policy for {shown(domain)}, which its build did not know or its model has not",
        )
    return record.action.embodiments[0]


def robot_of(name: str | None, record: RequestRecord) -> Embodiment:
    """The robot ``name`` of those that the bundle has, or the one that it is a policy for.

    CX610: neither, an unknown one, or another than the policy's.
    """
    rows = () if record.action is None else record.action.embodiments
    return choose_embodiment(name, policy_of(record), {row.name: row for row in rows})


# -- files ------------------------------------------------------------------------------------------------------------

_MAX_ACTIONS_BYTES = 16 * files.MIB
"""Largest JSON file of actions. More actions are given as a ``.safetensors`` file."""
_MAX_STATISTICS_BYTES = files.MIB


@dataclass(frozen=True)
class ActionFile:
    """Actions as a file has them, and what it says of itself, as those that `run` writes do."""

    path: Path | InMemory[Actions]
    values: Actions
    embodiment: str | None = None
    """The embodiment that they are of."""
    domain: int | None = None
    """Its domain."""
    units: str | None = None
    """``model``, or ``raw``: those of the data."""

    def require(self, robot: Embodiment, scaled: bool) -> None:
        """CX611 where they are of another robot than ``robot``, or in other units than are read. ``scaled``: statistics
        of the data are given, and make them the model's."""
        name = self.embodiment
        same = name == robot.name if self.domain is None else self.domain == robot.domain
        if name is not None and not same:
            _refuse(self.path, f"they are of `{name}`, and the request is of `{robot.name}`", f"--embodiment {name}")
        if self.units == "raw" and not scaled:
            hint = "--action-stats with the statistics that made them so"
            _refuse(self.path, "they are in the units of the data", hint)
        if self.units == "model" and scaled:
            hint = "leave --action-stats out"
            _refuse(self.path, "they are in the model's units, and would be normalised again", hint)


def read_actions(path: Path | InMemory[Actions]) -> ActionFile:
    """float32 [rows, width] from a ``.json`` (rows of numbers, or an object with them under ``actions``) or a
    ``.safetensors`` file (``actions`` or ``action``, or its only tensor).

    CX611: unreadable, empty, rows of different width, or not finite.
    """
    facts: Mapping[str, Any] = {}
    suffix = "" if isinstance(path, InMemory) else path.suffix.lower()
    if isinstance(path, InMemory):
        values = path.value
    elif suffix == ".safetensors":
        header = read_header(path)
        values, facts = _read_tensor(path, header.tensors), header.metadata
    elif suffix == ".json":
        document = _read_json(path)
        values = _read_rows(path, document)
        facts = document if isinstance(document, dict) else facts
    else:
        _refuse(path, f"the name ends in {path.suffix or 'nothing'}", "allowed: .json, .safetensors")
    if values.ndim != 2 or 0 in values.shape:
        _refuse(path, f"shape {list(values.shape)}", "actions are [rows, width] with at least one of each")
    if not np.isfinite(values).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        _refuse(path, f"row {row}, column {column} is {values[row, column]}", "actions are finite numbers in float32")
    name, units, domain = facts.get("embodiment"), facts.get("units"), str(facts.get("domain"))
    return ActionFile(
        path,
        values,
        name if isinstance(name, str) else None,
        int(domain) if domain.isdecimal() and len(domain) <= 4 else None,
        units if units in ("model", "raw") else None,
    )


def _read_tensor(path: Path, tensors: Mapping[str, TensorEntry]) -> Actions:
    names = [name for name in ("actions", "action") if name in tensors] or list(tensors)
    if len(names) != 1:
        _refuse(path, f"tensors {', '.join(names[:8]) or 'none'}", "name one of them `actions`")
    entry = tensors[names[0]]
    if entry.dtype not in ("F64", "F32", "F16", "BF16"):
        _refuse(path, f"`{entry.name}` has type {entry.dtype}", "actions are floating-point numbers")
    return np.asarray(entry.array(), dtype=np.float32)


def _read_rows(path: Path, document: Any) -> Actions:
    rows = document.get("actions") if isinstance(document, dict) else document
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        _refuse(path, "it holds no list of rows", 'actions are [[…], …] or {"actions": [[…], …]}')
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        _refuse(path, f"rows of {min(widths)} to {max(widths)} numbers", "all rows have one width")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for row in rows for value in row):
        _refuse(path, "a value is not a number", "actions are rows of numbers")
    try:
        wide = np.asarray(rows, dtype=np.float64)
    except OverflowError:
        _refuse(path, "a number is too large", "actions are finite numbers in float32")
    with np.errstate(over="ignore"):  # becomes infinite, and is refused with its position
        return wide.astype(np.float32)


def _read_json(path: Path) -> Any:
    try:
        # NaN is accepted here and refused by its position.
        return parse_document(files.read_bytes(path, _MAX_ACTIONS_BYTES), finite=False)
    except OSError as error:
        _refuse(path, files.reason(error), "is it the right path?")
    except ValueError as error:
        _refuse(path, f"not JSON: {error}", "")


def _refuse(path: object, found: str, hint: str) -> NoReturn:
    raise UserError("CX611", f"actions in {path}: {found}", hint)


# -- statistics -------------------------------------------------------------------------------------------------------

_PAIRS: Mapping[str, tuple[str, str]] = {
    "quantile": ("q01", "q99"),
    "minmax": ("min", "max"),
    "meanstd": ("mean", "std"),
}
METHODS = tuple(_PAIRS)
_ALIASES = {"quantile_rot": "quantile"}
"""In the framework a name for quantiles whose rotation columns are left as they are, by statistics of −1 and 1."""
_SMALLEST = 1e-8
_LARGEST = 1e30
"""No robot has statistics beyond this, and their products would overflow float32."""
_FINITE = f"statistics are finite numbers, at most {_LARGEST:g}"
_ROUNDING = 1e-5
"""Actions in float32 at the very quantile are not outside."""


@dataclass(frozen=True)
class ActionScale:
    """model = (raw − offset) / scale, a column at a time. The published normalisations are all of this form."""

    method: str
    offset: NDArray[np.float64]
    scale: NDArray[np.float64]
    """The two statistics, [width] each."""

    @property
    def bounded(self) -> bool:
        """Whether ±1 are bounds that the statistics state."""
        return self.method != "meanstd"

    def to_model(self, raw: Actions, clamp: bool = False) -> Actions:
        """Raw actions as the model takes them; ``clamp``: cut off at ±1.

        Models are trained without (``apply_forward_clamp=False`` in NVIDIA's framework), so quantiles, which leave 2 %
        of the data outside, do not bound what they are given. CX611 where a value leaves float32.
        """
        normalised = (raw.astype(np.float64) - self.offset) / self.scale
        with np.errstate(over="ignore"):
            model = (np.clip(normalised, -1, 1) if clamp else normalised).astype(np.float32)
        if not np.isfinite(model).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(model))[0])
            raise UserError(
                "CX611",
                f"row {row}, column {column} of the actions is {raw[row, column]:g}, which no statistics bring near ±1",
                "are the statistics those of these actions? --action-clamp cuts off what is beyond them",
            )
        return model

    def beyond(self, raw: Actions) -> Beyond:
        """How many values of ``raw`` are outside the statistics. None is where these are no bounds (``meanstd``)."""
        if not self.bounded:
            return Beyond(0, raw.size, 0.0)
        normalised = np.abs((raw.astype(np.float64) - self.offset) / self.scale)
        outside = normalised > 1 + _ROUNDING
        return Beyond(int(outside.sum()), raw.size, float(normalised.max()))

    def to_raw(self, model: Actions) -> Actions:
        """The model's actions in the units of the data. FindingError CX663 where one is not a finite number."""
        with np.errstate(over="ignore", invalid="ignore"):
            raw = (model.astype(np.float64) * self.scale + self.offset).astype(np.float32)
        if not np.isfinite(raw).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(raw))[0])
            raise FindingError(
                "CX663",
                f"row {row}, column {column} of the actions is {model[row, column]:g}, in the units of the data "
                f"{raw[row, column]}: nothing is written",
                "are the statistics those of this robot?",
            )
        return raw


@dataclass(frozen=True)
class Beyond:
    """Given actions outside the statistics that normalise them."""

    count: int
    of: int
    most: float
    """The largest distance from the middle, where the statistics are ±1."""
    clamped: bool = False


def read_scale(
    path: Path | InMemory[Mapping[str, Any]],
    width: int,
    method: str | None = None,
    columns: Sequence[tuple[str, Sequence[int] | None]] = (),
) -> ActionScale:
    """Statistics of actions: ``q01`` and ``q99``, ``min`` and ``max``, ``mean`` and ``std``, each a list of ``width``
    numbers.

    In the layout of NVIDIA's framework (at the top or under ``global``), of LeRobot's ``meta/stats.json`` (under
    ``action``, or under the ``columns`` that make an action, each with the elements that are taken) or of openpi's
    ``norm_stats.json`` (under ``actions``, with numbers for padding behind them). ``method`` says which pair is meant;
    without it the file's ``method``, or the only pair there is. CX613 otherwise.
    """
    try:
        if isinstance(path, InMemory):
            document = dict(path.value)
        else:
            document = parse_object(files.read_bytes(path, _MAX_STATISTICS_BYTES))
    except OSError as error:
        _refuse_scale(path, files.reason(error), "is it the right path?")
    except ValueError as error:
        _refuse_scale(path, f"not JSON: {error}", "")
    block = _block(path, document, width, columns)
    present = [name for name, pair in _PAIRS.items() if all(key in block for key in pair)]
    stated = method or block.get("method") or document.get("method")
    chosen = _ALIASES.get(str(stated), stated) or (present[0] if len(present) == 1 else None)
    if chosen not in present:
        found = f"it has statistics for {', '.join(present) or 'no method'}"
        _refuse_scale(path, f"{found}, not for `{stated}`" if stated else found, f"--action-normalization {_choice()}")
    keys = _PAIRS[chosen]
    first, second = (_column(path, key, block[key], width) for key in keys)
    if chosen == "meanstd":
        _require_columns(path, second < 0, lambda i: f"`std` of column {i} is {second[i]:g}", "it is 0 or more")
        return ActionScale(chosen, first, np.maximum(second, _SMALLEST))
    _require_columns(
        path,
        first > second,
        lambda i: f"`{keys[0]}` of column {i} is {first[i]:g}, above its `{keys[1]}`, {second[i]:g}",
        "are the two exchanged?",
    )
    return ActionScale(chosen, (second + first) / 2, np.maximum(second - first, _SMALLEST) / 2)


_KEYS = tuple(key for pair in _PAIRS.values() for key in pair)


def _block(
    path: object, document: Mapping[str, Any], width: int, columns: Sequence[tuple[str, Sequence[int] | None]]
) -> Mapping[str, Any]:
    """The statistics of actions in ``document``, wherever its layout has them."""
    if columns and all(isinstance(document.get(name), dict) for name, _ in columns):
        return {
            key: [value for name, elements in columns for value in _taken(document[name][key], elements)]
            for key in _KEYS
            if all(key in document[name] for name, _ in columns)
        }
    for key in ("global", "norm_stats"):
        if key in document:
            inner = document[key]
            if not isinstance(inner, dict):
                _refuse_scale(path, f"`{key}` is not an object", "")
            if key == "global":
                return inner
            document = inner
    if any(key in document for key in _KEYS):
        return document
    name = next((name for name in ("action", "actions") if isinstance(document.get(name), dict)), None)
    if name is None:
        found = ", ".join(shown(key) for key in list(document)[:12]) or "nothing"
        _refuse_scale(path, f"it has {found}, and no statistics of actions", "actions are under `global` or `action`")
    # openpi pads actions, and their statistics with them.
    return {k: v[:width] if name == "actions" and isinstance(v, list) else v for k, v in document[name].items()}


def _taken(values: Any, elements: Sequence[int] | None) -> list[Any]:
    """The ``elements`` of a column's statistics; what is no list is kept, and refused where it is read."""
    listed = values if isinstance(values, list) else [values]
    if elements is None or max(elements) >= len(listed):
        return listed
    return [listed[index] for index in elements]


def _column(path: object, key: str, values: Sequence[Any], width: int) -> NDArray[np.float64]:
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) != width:
        said = f"{len(values)} values" if isinstance(values, list) else shown(values)
        _refuse_scale(path, f"`{key}` is {said}", f"a list of {width} numbers, one a column of this embodiment")
    try:
        found = np.asarray(values, dtype=np.float64)
    except OverflowError:
        _refuse_scale(path, f"a value of `{key}` is too large", _FINITE)
    _require_columns(path, ~(np.abs(found) <= _LARGEST), lambda i: f"`{key}` of column {i} is {found[i]:g}", _FINITE)
    return found


def _require_columns(path: object, wrong: NDArray[np.bool_], says: Callable[[int], str], hint: str) -> None:
    """CX613 with what ``says`` of the first column that is ``wrong``."""
    if wrong.any():
        _refuse_scale(path, says(int(np.argmax(wrong))), hint)


def _choice() -> str:
    return " or ".join(METHODS)


def _refuse_scale(path: object, found: str, hint: str) -> NoReturn:
    raise UserError("CX613", f"action statistics in {path}: {found}", hint)


# -- units ------------------------------------------------------------------------------------------------------------

_TINY = 0.05
"""Numbers of a model reach about ±1: a chunk without one beyond this is in other units."""
_IDENTITY = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])


def units_warning(actions: Actions, poses: bool) -> str:
    """Signs that ``actions`` [rows, width], which are given as the model's own numbers, are those of the data; empty
    where there are none. ``poses``: they are changes of a pose, position (3), rotation (6) and gripper."""
    if poses and actions.shape[1] >= 9:
        near, reach = np.abs(actions[:, 3:9] - _IDENTITY).max(), float(np.abs(actions[:, :3]).max())
        if near < _TINY and reach < _TINY:
            return (
                "they look like changes of a pose in metres: the rotation columns are within "
                f"{near:.2g} of no rotation, and no position is beyond {reach:.2g}, about "
                f"{_factor(reach)} times less than the model's own numbers, which reach ±1"
            )
    most = float(np.abs(actions).max())
    if most < _TINY:
        return f"no value is beyond {most:.2g}, about {_factor(most)} times less than the model's own, which reach ±1"
    return ""


def _factor(reach: float) -> str:
    return f"{1 / reach:.2g}" if reach > 0 else "infinitely many"
