"""Calibration data as items: a prompt, and what goes with it. Nothing is opened here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.runtime.embodiments import Actions, ActionScale
from cosmos_export.runtime.prompts import Prompt

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True)
class ClipPart:
    """Frames of a file from ``skip`` on, at most ``count``; ``fps`` is what the data set says of them."""

    path: Path
    skip: int = 0
    count: int | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Item:
    """One thing to calibrate on. What it has decides which modes it can stand for."""

    name: str
    prompt: Prompt
    negative: Prompt | None = None
    mode: str | None = None
    image: Path | None = None
    clip: ClipPart | None = None
    cameras: tuple[ClipPart, ...] = ()
    """Clips of further cameras, which are composed with ``clip`` into one picture."""
    actions: Actions | None = None
    """[rows, width] in the units of the model; what the model has as 1 − the robot's number is the robot's."""
    state: Actions | None = None
    """[rows, width] of where the robot is, in the same form; None where its policy is not given it."""
    embodiment: str | None = None
    latents: Path | None = None
    fps: float | None = None
    frames: int | None = None
    beside: tuple[Path, ...] = ()
    """Further files it was made of."""


@dataclass(frozen=True)
class Options:
    """Options after the path of a source."""

    licence: str | None = None
    origin: str | None = None
    prompt: str | None = None
    negative: str | None = None
    mode: str | None = None
    embodiment: str | None = None
    video: Path | None = None
    fps: float | None = None
    frames: int | None = None
    limit: int | None = None
    cameras: tuple[str, ...] | None = None
    actions: tuple[str, ...] | None = None
    """Columns of a data set that make an action, in order."""
    state: tuple[str, ...] | None = None
    """Columns that say where the robot is, in the order of an action's."""
    stats: str | None = None
    """File with statistics of actions, or `own` or `none`."""
    normalization: str | None = None
    """Which of the statistics, of `METHODS`."""
    policy: Embodiment | None = None
    """The embodiment of a policy checkpoint; no key gives it."""


@dataclass(frozen=True)
class SourceContent:
    """The result of reading a source."""

    kind: str
    items: tuple[Item, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    scale: ActionScale | None = None
    """The statistics that brought its actions to the model's numbers."""
