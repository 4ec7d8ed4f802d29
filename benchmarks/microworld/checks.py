"""Atomic checks of generated clips, from pixels, sound and actions alone, and their confidence intervals.

Each check is a question with a yes or a no, and the exact facts of the clip are the answer. `observe` reads where the
shape is, its colour and its form from pixels without knowing what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.microworld import world

Frames = NDArray[np.uint8]
_GROUND = np.array(world.GROUND, dtype=np.float32)
_PALETTE = np.array(list(world.COLOURS.values()), dtype=np.float32)

FOREGROUND = 0.25
"""Coverage below which a pixel is ground: noise of the decoder, not a shape."""
RIGID = 0.25
"""Largest mean square difference of coverage from the form, as a share of its area."""
MOST = 15
"""How many of 17 frames must agree; the others may be the blur of one chunk of the decoder."""
BACK = 2.0
"""How many pixels a shape returns before it counts as a bounce."""
POSITION = 1.5
"""Median error in pixels within which a path is followed."""
ACTION = 0.5
"""Error of an action, in its own unit, within which it is recovered."""
CLICK_LEVEL = 0.15
"""Loudness above which a sound is a click; its own peak is 0.6."""
CLICK_SECONDS = 0.065
"""How far the click may be from the bounce: a frame of video and half a frame of sound."""


@dataclass(frozen=True)
class Observed:
    """Findings in a clip."""

    visible: NDArray[np.bool_]
    """[17], whether there is one thing as large as a shape."""
    centres: world.Points
    """[17, 2]; where nothing is visible, the centre of the last frame in which something was."""
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    rigid: NDArray[np.bool_]
    """[17], whether the form is that of a box or a ring."""


def observe(frames: Frames) -> Observed:
    """Reads frames [17, 64, 64, 3]."""
    difference = frames.astype(np.float32) - _GROUND
    names, away = list(world.COLOURS), _PALETTE - _GROUND
    products = difference @ away.T
    length = (away**2).sum(-1)
    nearness = 2 * products - length  # of two distances to the pixel, the one to the ground is 0
    best = nearness.argmax(-1)
    counts = np.stack([((best == index) & (nearness.max(-1) > 0)).sum((1, 2)) for index in range(len(names))], 1)
    colours = counts.argmax(1)
    picked = np.take_along_axis(products, colours[:, None, None, None], -1)[..., 0]
    covered = np.clip(picked / length[colours][:, None, None], 0, 1.2)
    covered[covered < FOREGROUND] = 0
    mass, places = covered.sum((1, 2)), np.arange(world.SIZE) + 0.5
    centres, last = np.empty((len(frames), 2)), np.full(2, world.CENTRE)
    for index in range(len(frames)):
        if mass[index] > 0:
            last = np.array([covered[index].sum(0) @ places, covered[index].sum(1) @ places]) / mass[index]
        centres[index] = last
    forms = np.stack([world.coverage(shape, centres) for shape in world.SHAPES])
    areas = forms.sum((2, 3))
    errors = ((covered - forms) ** 2).sum((2, 3)) / areas
    shapes = errors.argmin(0)
    area, error = (np.take_along_axis(values, shapes[None], 0)[0] for values in (areas, errors))
    visible = (0.6 * area <= mass) & (mass <= 1.5 * area)
    return Observed(
        visible,
        centres,
        tuple(names[index] for index in colours),
        tuple(world.SHAPES[index] for index in shapes),
        visible & (error <= RIGID),
    )


def scene_checks(what: world.Combination, seen: Observed) -> dict[str, bool]:
    """The checks of any scene."""
    return {
        "visible": int(seen.visible.sum()) >= MOST + 1,
        "colour": sum(colour == what.colour for colour in seen.colours) >= MOST,
        "shape": sum(shape == what.shape for shape in seen.shapes) >= MOST,
        "rigid": int(seen.rigid.sum()) >= MOST,
        "direction": direction_of(seen.centres) == what.direction,
        "speed": (speed_of(seen.centres) > 1.5) == (what.speed == "fast"),
        "bounce": (bounce_of(seen.centres) is not None) == what.bounces,
    }


def direction_of(centres: world.Points) -> str:
    """The direction of the first four steps."""
    moved = centres[4] - centres[0]
    return max(world.DIRECTIONS, key=lambda name: float(moved @ np.array(world.DIRECTIONS[name])))


def speed_of(centres: world.Points) -> float:
    """The median length of a step, in pixels per frame."""
    return float(np.median(np.hypot(*np.diff(centres, axis=0).T)))


def bounce_of(centres: world.Points) -> int | None:
    """The frame in which the shape turns back on its axis; None where it does not."""
    direction = np.array(world.DIRECTIONS[direction_of(centres)], dtype=np.float64)
    along = centres @ direction
    turn = int(along.argmax())
    return turn if along[turn] - along[-1] >= BACK else None


def position_error(seen: Observed, centres: world.Points) -> float:
    """The median distance of the generated frames to the true path, in pixels. The first frame is given."""
    return float(np.median(np.hypot(*(seen.centres - centres)[1:].T)))


def click_of(sound: NDArray[np.float32]) -> float | None:
    """When the first click begins, in seconds, in sound [2, samples]; None where there is none."""
    level = np.abs(sound).max(0)
    loud = np.flatnonzero(level >= CLICK_LEVEL)
    return float(loud[0] / world.SOUND_RATE) if len(loud) else None


def click_checks(what: world.Combination, seen: Observed, sound: NDArray[np.float32]) -> dict[str, bool]:
    """Whether there is a click just when the caption says bounce, and whether it is at the bounce that is seen."""
    heard, turn = click_of(sound), bounce_of(seen.centres)
    checks = {"click": (heard is not None) == what.bounces}
    if what.bounces:
        checks["click at the bounce"] = (
            heard is not None and turn is not None and abs(heard - turn / world.SCENE_FPS) <= CLICK_SECONDS
        )
    return checks


def identifiable(clip: world.Clip) -> NDArray[np.bool_]:
    """Which numbers of the actions [16, 2] the frames determine: those whose push no wall cut short."""
    assert clip.actions is not None
    moved = np.diff(clip.centres, axis=0)
    return np.isclose(moved, world.PUSH_PIXELS * clip.actions)


def recovered(clip: world.Clip, actions: NDArray[np.float64]) -> float:
    """The share of identifiable numbers of the actions that ``actions`` [16, 2] has within half a unit."""
    assert clip.actions is not None
    near = np.abs(actions - clip.actions) <= ACTION
    return float(near[identifiable(clip)].mean())


@dataclass(frozen=True)
class Share:
    """How many of how many, and the interval of 95 %."""

    right: float
    count: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.right / self.count

    def document(self) -> dict[str, float | int]:
        return {
            "share": round(self.share, 4), "count": self.count, "low": round(self.low, 4), "high": round(self.high, 4)
        }  # fmt: skip


def wilson(right: float, count: int, z: float = 1.959964) -> Share:
    """Wilson's interval of a share."""
    share, factor = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / factor
    half = z / factor * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Share(right, count, max(0.0, middle - half), min(1.0, middle + half))


def pooled(clips: Sequence[Mapping[str, bool]], seed: int = 0, draws: int = 2000) -> Share:
    """The share of all checks of all clips that are right. The interval draws whole clips (bootstrap), because the
    checks of a clip fail together."""
    right = np.array([sum(clip.values()) for clip in clips], dtype=np.float64)
    count = np.array([len(clip) for clip in clips], dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(clips), (draws, len(clips)))
    shares = right[chosen].sum(1) / count[chosen].sum(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return Share(float(right.sum()), int(count.sum()), float(low), float(high))


def table(clips: Sequence[Mapping[str, bool]]) -> dict[str, Share]:
    """The share of each check, and of all together."""
    names = list(dict.fromkeys(name for clip in clips for name in clip))
    found = {}
    for name in names:
        asked = [clip[name] for clip in clips if name in clip]
        found[name] = wilson(sum(asked), len(asked))
    return {**found, "all": pooled(clips)}
