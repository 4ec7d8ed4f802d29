"""Options after the path of a source: ``PATH[,key=value…]``, each value read and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from cosmos_export.calibration.items import Options
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.embodiments import embodiment
from cosmos_export.runtime.generate_options import MAX_FPS, MIN_FPS
from cosmos_export.sampling import MODES

ORIGINS = ("real", "synthetic")
OPTIONS = (
    "licence", "origin", "prompt", "negative", "mode", "embodiment", "video", "fps", "frames", "limit", "camera",
    "cameras", "actions",
)  # fmt: skip
_OPTION = re.compile(rf",({'|'.join(OPTIONS)})=")


def parse_source(text: str) -> tuple[Path, Options]:
    """``PATH[,key=value…]``; CX341 for an unknown or unusable option. A comma in the path stays one."""
    path, *pairs = _OPTION.split(text)
    values: dict[str, Any] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if key in values:
            _bad_option(key, value, "given twice")
        values[key] = _CONVERT[key](key, value) if key in _CONVERT else value
    if (cameras := values.pop("cameras", None)) is not None:
        if "camera" in values:
            _bad_option("cameras", cameras, "camera= is given too")
        values["camera"] = _one_camera("cameras", cameras)
    return Path(path), Options(**values)


def _bad_option(key: str, value: str, why: str) -> NoReturn:
    raise UserError("CX341", f"{key}={shown(value)}: {why}", f"options of --data: {', '.join(OPTIONS)}")


def _choice(allowed: Collection[str]) -> Callable[[str, str], str]:
    def convert(key: str, value: str) -> str:
        if value not in allowed:
            _bad_option(key, value, f"known: {', '.join(allowed)}")
        return value

    return convert


def whole_number(key: str, value: str) -> int:
    """The number above 0 that ``value`` is for ``key``; CX341 for anything else."""
    if not value.isdecimal() or not 0 < int(value) < 1_000_000:
        _bad_option(key, value, "not a whole number above 0")
    return int(value)


def rate(key: str, value: str) -> float:
    """Frames per second that ``value`` says for ``key``; CX341 outside `MIN_FPS` to `MAX_FPS`."""
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not MIN_FPS <= found <= MAX_FPS:
        _bad_option(key, value, f"not a rate, {MIN_FPS} to {MAX_FPS:.0f} frames per second")
    return found


def _robot(key: str, value: str) -> str:
    return embodiment(value, None).name


def _one_camera(key: str, value: str) -> str:
    """The camera that is named: a picture made of several cannot be composed yet."""
    if "," in value:
        _bad_option(key, value, "the model is shown one camera; several are not composed into one picture yet")
    return value


def _columns(key: str, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    if not all(names) or len(set(names)) != len(names):
        _bad_option(key, value, "not a list of different columns, as in actions=joint_position,gripper_position")
    return names


_CONVERT: Mapping[str, Callable[[str, str], Any]] = {
    "actions": _columns,
    "camera": _one_camera,
    "origin": _choice(ORIGINS),
    "mode": _choice(MODES),
    "embodiment": _robot,
    "video": lambda _, value: Path(value),
    "fps": rate,
    "frames": whole_number,
    "limit": whole_number,
}
