"""The published model that a checkpoint is: by its repository name where the contents bear it out, else by contents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_REPOSITORY = re.compile(r"cosmos3-(nano|super|edge)(-[a-z0-9-]+)?$", re.IGNORECASE)
_CACHE_FOLDER = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)$")
_SUFFIXES = frozenset({"", "text2image", "image2video", "text2image-4step", "image2video-4step", "policy-droid"})
_IMAGE2VIDEO_FPS = 16
"""The image-to-video variants are trained at 16 frames per second, all others at 24."""


@dataclass(frozen=True)
class Origin:
    """Where a directory says it was downloaded from; None where it does not say."""

    repository: str | None
    revision: str | None


def origin(root: Path) -> Origin:
    """Reads the layout of the Hugging Face cache: ``models--owner--name/snapshots/revision``."""
    for folder in (root.absolute(), root.resolve()):
        match = _CACHE_FOLDER.search(folder.parent.parent.name)
        if match and folder.parent.name == "snapshots":
            return Origin(f"{match['owner']}/{match['name']}", folder.name)
    return Origin(None, None)


@dataclass(frozen=True)
class Traits:
    """The variant by the contents. ``steps``: distilled steps; ``policy``: embodiment domain of a policy checkpoint."""

    size: str | None
    base_fps: int
    steps: int | None
    policy: str | None


def variant_name(root: Path, found: Origin, traits: Traits) -> str:
    """``nano``, ``super-text2image-4step``, ``nano-policy-droid`` … or ``custom`` for other widths."""
    if traits.size is None:
        return "custom"
    for name in (found.repository, root.name, root.resolve().name):
        match = _REPOSITORY.search(name or "")
        if match is not None and match[1].lower() == traits.size:
            suffix = (match[2] or "").lower().removeprefix("-")
            if suffix in _SUFFIXES and _agrees(suffix, traits):
                return "-".join(filter(None, (traits.size, suffix)))
    parts = [traits.size]
    if traits.base_fps == _IMAGE2VIDEO_FPS:
        parts.append("image2video")
    if traits.steps is not None:
        parts.append(f"{traits.steps}step")
    if traits.policy is not None:
        parts.append(f"policy-{traits.policy.split('_')[0]}")
    return "-".join(parts)


def _agrees(suffix: str, traits: Traits) -> bool:
    return suffix.endswith("4step") == (traits.steps == 4) and ("policy" in suffix) == (traits.policy is not None)
