"""Calibration data as items: a prompt, and what goes with it. Nothing is opened here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.runtime.embodiments import Actions
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
    actions: Actions | None = None
    """Actions in the model's units."""
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
    camera: str | None = None
    actions: tuple[str, ...] | None = None
    """Columns of a data set that make an action, in order."""
    policy: Embodiment | None = None
    """The embodiment of a policy checkpoint; no key gives it."""


@dataclass(frozen=True)
class SourceContent:
    """The result of reading a source."""

    kind: str
    items: tuple[Item, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
