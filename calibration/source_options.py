"""Options after the path of a source: ``PATH[,key=value…]``, each value read and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from cosmos_export.arguments import whole
from cosmos_export.calibration.items import Options
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.embodiments import embodiment
from cosmos_export.runtime.embodiments import METHODS
from cosmos_export.runtime.generate_options import MAX_FPS, MIN_FPS
from cosmos_export.sampling import MODES

ORIGINS = ("real", "synthetic")
OPTIONS = (
    "licence", "origin", "prompt", "negative", "mode", "embodiment", "video", "fps", "frames", "limit", "camera",
    "cameras", "actions", "state", "stats", "normalization",
)  # fmt: skip
_SPELLINGS = {"license": "licence"}
_OPTION = re.compile(rf",({'|'.join((*OPTIONS, *_SPELLINGS))})=")


def parse_source(text: str) -> tuple[Path, Options]:
    """``PATH[,key=value…]``; CX341 for an unknown or unusable option. A comma in the path stays one."""
    path, *pairs = _OPTION.split(text)
    values: dict[str, Any] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        key = _SPELLINGS.get(key, key)
        if key in values:
            _bad_option(key, value, "given twice")
        values[key] = _CONVERT[key](key, value) if key in _CONVERT else value
    if (camera := values.pop("camera", None)) is not None:
        if "cameras" in values:
            _bad_option("camera", camera, "cameras= is given too")
        values["cameras"] = (camera,)
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
    found = whole(value)
    if found is None or not 0 < found < 1_000_000:
        _bad_option(key, value, "not a whole number above 0")
    return found


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


def _names(example: str) -> Callable[[str, str], tuple[str, ...]]:
    def convert(key: str, value: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in value.split(","))
        if not all(names) or len(set(names)) != len(names):
            _bad_option(key, value, f"not a list of different names, as in {key}={example}")
        return names

    return convert


_CONVERT: Mapping[str, Callable[[str, str], Any]] = {
    "actions": _names("joint_position,gripper_position"),
    "state": _names("joint_position,gripper_position"),
    "cameras": _names("wrist,left,right"),
    "normalization": _choice(METHODS),
    "origin": _choice(ORIGINS),
    "mode": _choice(MODES),
    "embodiment": _robot,
    "video": lambda _, value: Path(value),
    "fps": rate,
    "frames": whole_number,
    "limit": whole_number,
}
