"""Several cameras in one picture, as a policy was trained on it: the composition of each embodiment is a row of data.

What the published server does (NVIDIA's cosmos-framework) is followed to the bit: bilinear interpolation in float32
without a wider filter for shrinking, and values cut, not rounded, to whole levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle.embodiment import Views
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.runtime.canvas import fused

Picture = NDArray[np.uint8]
"""[height, width, 3] RGB."""


def bilinear(picture: Picture, height: int, width: int) -> Picture:
    """``picture`` at ``height`` × ``width``, between pixel centres, with values cut to whole levels.

    To the bit what torch makes of it on a CPU: products of weights, added in its order, each sum rounded once.
    """
    if picture.shape[:2] == (height, width):
        return picture
    if picture.shape[:2] == (2 * height, 2 * width):  # the mean of four pixels, exactly
        pairs = picture[0::2].astype(np.uint16) + picture[1::2]
        return ((pairs[:, 0::2] + pairs[:, 1::2]) >> 2).astype(np.uint8)
    top, bottom, down = _between(picture.shape[0], height)
    left, right, across = _between(picture.shape[1], width)
    below, far = down[:, None, None], across[:, None]
    above, near = np.float32(1) - below, np.float32(1) - far
    values = picture.astype(np.float32)
    made = above * far * values[top][:, right]
    for weight, rows, columns in (
        (above * near, top, left),
        (below * near, bottom, left),
        (below * far, bottom, right),
    ):
        made = fused(weight, values[rows][:, columns], made)
    return made.astype(np.uint8)


def _between(source: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each place in a line of ``size``: the places before and behind it in one of ``source``, and its distance
    from the first."""
    scale = np.full(size, np.float32(source) / np.float32(size))
    centre = np.maximum(fused(scale, np.arange(size, dtype=np.float32) + np.float32(0.5), -0.5), np.float32(0))
    first = np.minimum(centre.astype(np.intp), source - 1)
    return first, np.minimum(first + 1, source - 1), np.asarray(centre - first, dtype=np.float32)


def _wrist_over_two(size: Sequence[int], wrist: Picture, left: Picture, right: Picture) -> Picture:
    """The wrist's picture, and below it two others at half its size side by side."""
    height, width = wrist.shape[0], wrist.shape[1]
    if height % 2 or width % 2:
        raise UserError("CX640", f"the wrist's picture has {width} × {height} pixels", "both are even")
    below = [bilinear(one, height // 2, width // 2) for one in (left, right)]
    return np.concatenate([wrist, np.concatenate(below, axis=1)])


def _side_by_side(size: Sequence[int], *pictures: Picture) -> Picture:
    """All pictures in a row, each with its share of the width of ``size``."""
    height, width = size
    return np.concatenate([bilinear(one, height, width // len(pictures)) for one in pictures], axis=1)


LAYOUTS: Mapping[str, Callable[..., Picture]] = {
    "wrist over two": _wrist_over_two,
    "side by side": _side_by_side,
}


def compose(views: Views, pictures: Mapping[str, Picture]) -> Picture:
    """The one picture that the model is shown, of ``pictures`` by their names in ``views``.

    Cameras may go by their short names. Every picture that is given is in it. UserError CX640: one is missing or too
    many, or is no picture.
    """
    names = dict(zip(views.short, views.cameras, strict=False))
    given = [names.get(name, name) for name in pictures]
    if doubled := next((name for name in given if given.count(name) > 1), None):
        raise UserError("CX640", f"two pictures of `{doubled}`", _wanted(views))
    pictures = dict(zip(given, pictures.values(), strict=True))
    known = {views.whole, *views.cameras}
    for name, picture in pictures.items():
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise UserError(
                "CX640", f"`{name}` is {picture.dtype} of shape {list(picture.shape)}",
                "a picture is uint8 [height, width, 3], in RGB",
            )  # fmt: skip
        if name not in known:
            raise UserError("CX640", f"the picture `{name}` has no place in what the model sees", _wanted(views))
    if views.whole in pictures:
        if len(pictures) > 1:
            others = ", ".join(f"`{name}`" for name in pictures if name != views.whole)
            raise UserError("CX640", f"`{views.whole}` is the whole picture, and {others} beside it", _wanted(views))
        composed = pictures[views.whole]
    else:
        missing = [name for name in views.cameras or (views.whole,) if name not in pictures]
        if missing:
            raise UserError("CX640", f"no picture `{'`, `'.join(missing)}`", _wanted(views))
        composed = _layout(views)(views.size, *(pictures[name] for name in views.cameras))
    return bilinear(composed, *views.size) if views.size else composed


def _layout(views: Views) -> Callable[..., Picture]:
    if views.layout is None or views.layout not in LAYOUTS:
        raise UserError(
            "CX640", f"this version does not know the layout {shown(views.layout)}", f"give `{views.whole}`"
        )
    return LAYOUTS[views.layout]


def _wanted(views: Views) -> str:
    cameras = f", or {', '.join(f'`{name}`' for name in views.short or views.cameras)}" if views.cameras else ""
    return f"give `{views.whole}`{cameras}"
