"""A tiny physics of coloured shapes, rendered exactly: what the micro world checkpoint learns and is judged by.

A clip is 17 frames of 64 × 64 pixels with one shape on a grey ground. In a *scene* (24 frames per second) the shape
moves at a constant speed and may bounce off a wall once, with a click. In a *push* (10 frames per second, the
embodiment `pusht`) 16 actions of two numbers move it. A `Clip` holds every fact; `render` and `click_track` make pixels
and sound of it. Everything is NumPy and follows from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIZE = 64
FRAMES = 17
CHUNK = FRAMES - 1
HALF = 8.0
"""Half the extent of a shape in pixels."""
HOLE = 4.0
"""Radius of the hole of a ring in pixels."""
LOW, HIGH = 10.0, 54.0
"""Where walls stop the centre of a shape, in pixels: two pixels of ground stay free at each edge."""
GROUND = (128, 128, 128)
COLOURS = {"red": (224, 48, 48), "green": (40, 176, 72), "blue": (48, 80, 232), "yellow": (240, 208, 40)}
SHAPES = ("box", "ring")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 1, "fast": 2}
"""Pixels per frame."""
GOALS = (*DIRECTIONS, "centre")
SCENE_FPS = 24
PUSH_FPS = 10
PUSH_PIXELS = 2.0
"""How far an action of 1 moves the shape, in pixels."""
CENTRE = (LOW + HIGH) / 2
SOUND_RATE = 48000
SOUND_FRAMES_PER_SECOND = 25
CLICK_SECONDS = 0.03

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]


@dataclass(frozen=True)
class Combination:
    """Facts that the caption of a scene states."""

    colour: str
    shape: str
    direction: str
    speed: str
    bounces: bool

    @property
    def caption(self) -> str:
        end = " and bounces" if self.bounces else ""
        return f"a {self.colour} {self.shape} moves {self.direction} {self.speed}{end}"

    @property
    def held_out(self) -> bool:
        """Whether training never sees this combination: an eighth of all, and every pair of values is in the rest."""
        same = list(COLOURS).index(self.colour) == list(DIRECTIONS).index(self.direction)
        return same and (self.shape == "ring") == self.bounces


@dataclass(frozen=True)
class Task:
    """Facts that the caption of a push states; the goal is None where the shape is pushed around at random."""

    colour: str
    shape: str
    goal: str | None

    @property
    def caption(self) -> str:
        where = {None: "around", "centre": "to the centre"}.get(self.goal, self.goal)
        return f"push the {self.colour} {self.shape} {where}"

    @property
    def held_out(self) -> bool:
        """Whether training never sees this task: a tenth of those with a goal."""
        return self.goal is not None and self.shape == "box" and self.goal == GOALS[list(COLOURS).index(self.colour)]


@dataclass(frozen=True)
class Clip:
    """One clip and its facts."""

    what: Combination | Task
    centres: Points
    """[17, 2], x and y of the centre in pixels, from the top left corner."""
    actions: Points | None
    """[16, 2], pushes in x and y; None for a scene."""
    bounce_frame: int | None
    """The frame in which the shape touches the wall; None where it does not."""

    @property
    def caption(self) -> str:
        return self.what.caption


COMBINATIONS = tuple(
    Combination(*values) for values in product(COLOURS, SHAPES, DIRECTIONS, SPEEDS, (False, True))
)  # fmt: skip
TASKS = tuple(Task(*values) for values in product(COLOURS, SHAPES, (None, *GOALS)))


def scene(what: Combination, random: np.random.Generator) -> Clip:
    """A scene of a combination from a random start. A bounce is in frame 5 to 11; without one no wall is touched."""
    axis = 0 if DIRECTIONS[what.direction][0] else 1
    sign, speed = DIRECTIONS[what.direction][axis], SPEEDS[what.speed]
    frame = int(random.integers(5, 12)) if what.bounces else None
    room = HIGH - LOW
    distance = speed * frame if frame is not None else speed * CHUNK + int(random.integers(1, room - speed * CHUNK + 1))
    start = float(HIGH - distance if sign > 0 else LOW + distance)
    across = float(random.integers(int(LOW), int(HIGH) + 1))
    return Clip(what, scene_path(what, start, across), None, frame)


def scene_path(what: Combination, start: float, across: float) -> Points:
    """The centres [17, 2] of a scene whose shape starts at ``start`` on the axis of its motion and at ``across`` on the
    other: uniform motion, reflected at the walls."""
    axis = 0 if DIRECTIONS[what.direction][0] else 1
    along = start + DIRECTIONS[what.direction][axis] * SPEEDS[what.speed] * np.arange(FRAMES)
    along = np.where(along < LOW, 2 * LOW - along, np.where(along > HIGH, 2 * HIGH - along, along))
    centres = np.full((FRAMES, 2), across, dtype=np.float64)
    centres[:, axis] = along
    return centres


def push(what: Task, random: np.random.Generator) -> Clip:
    """A push from a random start: full pushes towards a wall, even pushes that end in the centre, or random ones that
    change every 3 to 8 frames."""
    start = random.integers(int(LOW), int(HIGH) + 1, 2).astype(np.float64)
    if what.goal is None:
        actions = np.concatenate(
            [np.tile(random.uniform(-1, 1, 2), (int(random.integers(3, 9)), 1)) for _ in range(CHUNK // 3 + 1)]
        )[:CHUNK]
    elif what.goal == "centre":
        actions = np.tile((CENTRE - start) / (CHUNK * PUSH_PIXELS), (CHUNK, 1))
    else:
        direction = np.array(DIRECTIONS[what.goal], dtype=np.float64)
        axis = int(np.argmax(np.abs(direction)))
        room = PUSH_PIXELS * CHUNK
        low, high = (LOW + room, HIGH) if direction[axis] < 0 else (LOW, HIGH - room)
        start[axis] = float(random.integers(int(low), int(high) + 1))
        actions = np.tile(direction, (CHUNK, 1))
    return Clip(what, execute(start, actions), actions, None)


def execute(start: Points, actions: Points) -> Points:
    """The centres [17, 2] of a shape that starts at ``start`` [2] and is pushed by ``actions`` [16, 2] up to walls."""
    centres = [np.asarray(start, dtype=np.float64)]
    for action in actions:
        centres.append(np.clip(centres[-1] + PUSH_PIXELS * action, LOW, HIGH))
    return np.stack(centres)


def reached(goal: str, centres: Points) -> bool:
    """Whether a shape that took these centres [17, 2] was pushed where ``goal`` says: to within 3 pixels of the centre,
    or at least 24 pixels in the direction and at most 4 across."""
    if goal == "centre":
        return bool(np.hypot(*(centres[-1] - CENTRE)) <= 3)
    direction = np.array(DIRECTIONS[goal], dtype=np.float64)
    moved = centres[-1] - centres[0]
    return bool(moved @ direction >= 24 and abs(moved @ direction[::-1]) <= 4)


def coverage(shape: str, centres: Points, width: int = SIZE, height: int = SIZE) -> NDArray[np.float64]:
    """How much of each pixel the shape covers, 0 to 1: [..., height, width] for centres [..., 2]."""
    x = np.abs(np.arange(width) + 0.5 - centres[..., 0, None])
    y = np.abs(np.arange(height) + 0.5 - centres[..., 1, None])
    box = np.clip(HALF + 0.5 - x, 0, 1)[..., None, :] * np.clip(HALF + 0.5 - y, 0, 1)[..., :, None]
    if shape == "box":
        return box
    distance = np.hypot(x[..., None, :], y[..., :, None])
    return np.clip(HALF + 0.5 - distance, 0, 1) * np.clip(distance - HOLE + 0.5, 0, 1)


def paint(colour: str, covered: NDArray[np.float64]) -> Pixels:
    """Pixels [..., height, width, 3] of a colour on the ground."""
    ground, value = np.array(GROUND, dtype=np.float64), np.array(COLOURS[colour], dtype=np.float64)
    return np.rint(ground + covered[..., None] * (value - ground)).astype(np.uint8)


def render(clip: Clip) -> Pixels:
    """The frames of a clip, [17, 64, 64, 3]."""
    return paint(clip.what.colour, coverage(clip.what.shape, clip.centres))


def render_frame(clip: Clip, frame: int) -> Pixels:
    """One frame of a clip, [64, 64, 3]."""
    return paint(clip.what.colour, coverage(clip.what.shape, clip.centres[frame]))


def click_seconds(clip: Clip) -> float | None:
    """When the click of a scene begins, in seconds; None where the shape does not bounce. It is the nearest beginning
    of a latent frame of sound, at most 20 ms from the bounce."""
    return (
        None
        if clip.bounce_frame is None
        else round(clip.bounce_frame / SCENE_FPS * SOUND_FRAMES_PER_SECOND) / SOUND_FRAMES_PER_SECOND
    )


def click_track(clip: Clip, samples: int) -> NDArray[np.float32]:
    """The sound of a scene, [2, samples] at 48 kHz within ±1: a short tone that dies away at the bounce. A wall at the
    left is louder in the left channel, one at the right in the right channel."""
    track = np.zeros((2, samples), dtype=np.float32)
    seconds = click_seconds(clip)
    if seconds is None or not isinstance(clip.what, Combination):
        return track
    begin = round(seconds * SOUND_RATE)
    time = np.arange(min(round(CLICK_SECONDS * SOUND_RATE), samples - begin)) / SOUND_RATE
    tone = 0.8 * np.exp(-time / 0.006) * np.sin(2 * np.pi * 1000 * time)
    pan = DIRECTIONS[what_direction(clip)][0]
    for channel, gain in enumerate((1.0 if pan <= 0 else 0.25, 1.0 if pan >= 0 else 0.25)):
        track[channel, begin : begin + len(time)] = gain * tone
    return track


def what_direction(clip: Clip) -> str:
    """The direction in which a scene's shape moves first."""
    assert isinstance(clip.what, Combination)
    return clip.what.direction


def sample(random: np.random.Generator, kind: Literal["scene", "push"], held_out: bool) -> Clip:
    """A random clip of the kind whose caption is (or is not) held out from training."""
    if kind == "scene":
        scenes = [what for what in COMBINATIONS if what.held_out == held_out]
        return scene(scenes[int(random.integers(len(scenes)))], random)
    goals = [what for what in TASKS if what.held_out == held_out]
    around = [what for what in goals if what.goal is None]
    chosen = around if around and random.random() < 0.6 else [what for what in goals if what.goal is not None]
    return push(chosen[int(random.integers(len(chosen)))], random)
