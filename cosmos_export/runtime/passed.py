"""Values that a program passes where the path of a file is taken: pictures, actions, statistics and noise in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.diagnostics import UserError
from cosmos_export.in_memory import InMemory


def picture(called: str, value: object, name: str = "image") -> Any:
    """A path as it is, anything else in memory; ``called`` is how messages speak of it."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    return InMemory(pictures(name, value), called)


def pictures(name: str, value: object) -> NDArray[np.uint8]:
    """uint8 [frames, height, width, 3] of an array, a PIL image or a sequence of them. CX614 for anything else."""
    if isinstance(value, list | tuple) and value:
        frames = [pictures(name, one) for one in value]
        if len({frame.shape[1:] for frame in frames}) > 1:
            raise UserError("CX614", f"`{name}`: frames of several sizes", "resize them to one size")
        return np.concatenate(frames)
    array = np.asarray(value.convert("RGB") if hasattr(value, "convert") else value)
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise UserError(
            "CX614",
            f"`{name}` is {type(value).__name__} of shape {list(array.shape)}",
            "pass a path, a PIL image, or an array [height, width, 3] or [frames, height, width, 3]",
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" or not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise UserError(
            "CX614",
            f"`{name}` has values of type {array.dtype} that are not in [0, 1]",
            "pass uint8, or floats in [0, 1]",
        )
    return np.round(array * 255).astype(np.uint8)


def rows(value: object) -> NDArray[np.float32]:
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(
            "CX611", f"`actions` is {type(value).__name__}: {error}", "pass an array [rows, width]"
        ) from error


def statistics(value: object) -> Mapping[str, Any]:
    """Lists in place of arrays, as the file has them."""
    if not isinstance(value, Mapping):
        raise UserError(
            "CX613",
            f"`action_stats` is {type(value).__name__}",
            "pass a path, or a mapping such as {'q01': …, 'q99': …}",
        )
    return {
        str(key): one.tolist() if hasattr(one, "tolist") else statistics(one) if isinstance(one, Mapping) else one
        for key, one in value.items()
    }


def noise(value: object) -> Mapping[str, NDArray[Any]]:
    if not isinstance(value, Mapping):
        raise UserError("CX617", f"`noise` is {type(value).__name__}", "pass a path, or a mapping {'vision': array, …}")
    return {str(name): np.asarray(array) for name, array in value.items()}


def numbers(value: object) -> object:
    """A state as it is: `cosmos_export.runtime.conversion.read_state` looks at it."""
    return value
