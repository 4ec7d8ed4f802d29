"""Images and clips onto the canvas a request is generated on, as the published pipeline puts them there. numpy only.

Three ways, by mode: an image covers the canvas and is cropped (`cover`), a clip is stretched to it (`stretch`), and
what a robot sees is shrunk into the nearest bin, never enlarged, and padded (`action_canvas`). Resampling is separable
with a filter that widens when it shrinks; in floating point as torch does it, or in 8 bits as Pillow does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.sampling.action_canvas import ActionCanvas
from cosmos_export.sampling.modes import Fit

Float = NDArray[np.float32]
Pixels = NDArray[np.uint8]
"""[frames, height, width, 3] RGB."""


@dataclass(frozen=True)
class Filter:
    """A resampling kernel, zero from ``support`` on."""

    support: float
    kernel: Callable[[NDArray[Any]], NDArray[Any]]


def fused(a: NDArray[Any], b: Any, c: Any) -> NDArray[Any]:
    """a·b + c of float32, rounded once: the product is exact in float64.

    torch is compiled to fused multiply-adds. An image is rounded to whole levels afterwards, and enlarging by a simple
    ratio makes many values that are exactly half a level, so the last bit decides which level it is.
    """
    return np.asarray(np.multiply(a, b, dtype=np.float64) + c, dtype=np.float32)


def _triangle(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.maximum(1 - np.abs(x), 0))


def _cubic(x: NDArray[Any]) -> NDArray[Any]:
    """float32 only; with a = −1/2: 3/2·x³ − 5/2·x² + 1 up to 1, then a·(x³ − 5·x² + 8·x − 4) up to 2."""
    x = np.abs(x)
    near = fused(fused(x, 1.5, -2.5) * x, x, 1.0)
    far = fused(fused(x - np.float32(5), x, 8.0), x, -4.0) * np.float32(-0.5)
    return np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))


TRIANGLE = Filter(1.0, _triangle)
CUBIC = Filter(2.0, _cubic)


def cover(image: Pixels, height: int, width: int) -> Float:
    """``image`` [H, W, 3] scaled to cover ``height`` × ``width`` and cropped around its centre: float32 [3, height,
    width] in [−1, 1].

    Values are rounded to whole levels, as the pipeline does with a conditioning image.
    """
    source_height, source_width = image.shape[:2]
    scale = max(width / source_width, height / source_height)
    rows, columns = math.ceil(scale * source_height), math.ceil(scale * source_width)
    # Python's round(): halves go to the even side, and so do the pipeline's.
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    # Only what stays is computed, a colour at a time: of a narrow picture the rest would be as large as it is long.
    across = _taps(source_width, columns, TRIANGLE, np.float32, left, width)
    down, weights = _taps(source_height, rows, TRIANGLE, np.float32, top, height)
    first = int(down.min())
    used = image[first : int(down.max()) + 1]
    planes = np.empty((3, height, width), np.float32)
    for colour, plane in enumerate(planes):
        lines = _weighted(used[..., colour].astype(np.float32), *across)
        plane[:] = _weighted(lines.swapaxes(-1, -2), down - first, weights).swapaxes(-1, -2)
    levels = np.clip(np.round(planes), 0, 255)
    return np.asarray(levels / np.float32(127.5) - np.float32(1), dtype=np.float32)


def keeping(fit: Fit, height: int, width: int) -> Callable[[Pixels], NDArray[Any]]:
    """Reduce a frame [1, H, W, 3] as it is decoded, for `placed`: no more than the canvas needs."""

    def covered(frame: Pixels) -> Float:
        return cover(frame[0], height, width)[None]

    def shrunk(frame: Pixels) -> Pixels:
        return resize(frame, height, width)

    return shrunk if fit == "stretch" else covered


def placed(kept: NDArray[Any], fit: Fit, height: int, width: int) -> Float:
    """Frames that were `keeping` on the canvas: float32 [3, frames, height, width] in [−1, 1]."""
    return stretch(kept, height, width) if fit == "stretch" else kept.swapaxes(0, 1)


def stretch(clip: Pixels, height: int, width: int) -> Float:
    """Every frame of ``clip`` at ``height`` × ``width``, whatever its aspect: float32 [3, frames, h, w] in [−1, 1]."""
    return _signed(resize(clip, height, width))


# -- actions ----------------------------------------------------------------------------------------------------------


def action_canvas(clip: Pixels, canvas: ActionCanvas) -> Float:
    """``clip`` on ``canvas``: float32 [3, frames, height, width] in [−1, 1], padded at the bottom and on the right."""
    return np.concatenate([_placed(frame[None], canvas) for frame in clip], axis=1)  # one large frame at a time


def _placed(frame: Pixels, canvas: ActionCanvas) -> Float:
    levels = frame.transpose(0, 3, 1, 2).astype(np.float32) if canvas.whole else None
    frames = _signed(resize(frame, *canvas.rounded)).swapaxes(0, 1) if levels is None else levels
    frames = resample(frames, canvas.content_height, canvas.content_width, CUBIC)
    if canvas.whole:
        frames = np.clip(np.round(frames), 0, 255) / np.float32(127.5) - np.float32(1)
    below, beside = canvas.height - canvas.content_height, canvas.width - canvas.content_width
    # A reflection cannot be longer than what it reflects.
    short = below >= canvas.content_height or beside >= canvas.content_width
    padded = np.pad(frames, ((0, 0), (0, 0), (0, below), (0, beside)), mode="edge" if short else "reflect")
    return np.ascontiguousarray(padded.swapaxes(0, 1))


# -- resampling -------------------------------------------------------------------------------------------------------


def resample(planes: Float, height: int, width: int, kernel: Filter) -> Float:
    """float32 [..., H, W] to [..., height, width] in floating point: torch's antialiased interpolation."""
    if planes.shape[-1] != width:
        planes = _weighted(planes, *_taps(planes.shape[-1], width, kernel, np.float32))
    if planes.shape[-2] != height:
        taps = _taps(planes.shape[-2], height, kernel, np.float32)
        planes = _weighted(planes.swapaxes(-1, -2), *taps).swapaxes(-1, -2)
    return planes


_FRACTION_BITS = 22
"""Bits of the fraction in Pillow's fixed-point weights: 32 less 8 of the value and 2 for a negative lobe."""


def resize(clip: Pixels, height: int, width: int) -> Pixels:
    """[..., H, W, 3] bytes to [..., height, width, 3]: Pillow's bilinear ``resize``, in bytes after each direction.

    Which direction comes first decides the last bit: the height where it loses more than twice as many pixels as the
    width does (Pillow 13; before it was always the width).
    """
    lost_rows, lost_columns = clip.shape[-3] - height, clip.shape[-2] - width
    height_first = lost_rows > 0 and lost_rows > 2 * lost_columns
    for axis, size in ((-3, height), (-2, width)) if height_first else ((-2, width), (-3, height)):
        if clip.shape[axis] != size:
            clip = _fixed_point(clip.swapaxes(-1, axis), size).swapaxes(-1, axis)
    return clip


def _fixed_point(lines: Pixels, size: int) -> Pixels:
    indices, weights = _taps(lines.shape[-1], size, TRIANGLE, np.float64)
    fixed = np.trunc(weights * (1 << _FRACTION_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    total = np.full((*lines.shape[:-1], size), 1 << (_FRACTION_BITS - 1), dtype=np.int32)
    for tap in range(indices.shape[1]):
        total += lines[..., indices[:, tap]].astype(np.int32) * fixed[:, tap]
    return np.asarray(np.clip(total >> _FRACTION_BITS, 0, 255), dtype=np.uint8)


def _taps(
    source: int, size: int, kernel: Filter, dtype: Any, start: int = 0, count: int | None = None
) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """Sample positions [size, taps] in a line of ``source`` and their weights, which add up to 1; or of ``count``
    samples from ``start`` on.

    Taps beyond an end of the line have weight 0 (and a valid position).
    """
    scale = dtype(source) / dtype(size)
    widened = max(scale, dtype(1))
    support = dtype(kernel.support) * widened
    count = size - start if count is None else count
    centre = scale * (np.arange(start, start + count).astype(dtype) + dtype(0.5))
    first = np.maximum((centre - support + dtype(0.5)).astype(np.intp), 0)
    last = np.minimum((centre + support + dtype(0.5)).astype(np.intp), source)
    positions = first[:, None] + np.arange(int((last - first).max()))
    distance = (positions.astype(dtype) - centre[:, None] + dtype(0.5)) * (dtype(1) / widened)
    weights = np.where(positions < last[:, None], kernel.kernel(distance), dtype(0)).astype(dtype)
    total = np.zeros(count, dtype)
    for tap in range(weights.shape[1]):  # in order: numpy's own sum is pairwise
        total += weights[:, tap]
    weights /= total[:, None]
    return np.minimum(positions, source - 1), weights


def _weighted(lines: Float, indices: NDArray[np.intp], weights: Float) -> Float:
    total = lines[..., indices[:, 0]] * weights[:, 0]
    for tap in range(1, indices.shape[1]):
        total = fused(lines[..., indices[:, tap]], weights[:, tap], total)
    return total


def _signed(clip: Pixels) -> Float:
    """[frames, H, W, 3] bytes as float32 [3, frames, H, W] in [−1, 1], in the two steps that the pipeline takes."""
    unit = clip.transpose(3, 0, 1, 2).astype(np.float32) / np.float32(255)
    return np.asarray(np.float32(2) * unit - np.float32(1), dtype=np.float32)
