"""Sampling settings of engines when a request has none: one row per family and kind of request, with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cosmos_export.family import Family

Interval = tuple[float, float]


@dataclass(frozen=True)
class Default:
    """``shift`` is for a grid that is not the checkpoint's own; that one has its own shift."""

    steps: int
    guidance: float
    shift: float
    guidance_interval: Interval | None
    source: str


@dataclass(frozen=True)
class Settings:
    """Settings of requests of one kind that have none of their own; modes of one kind share it in every engine."""

    defaults: Mapping[Family, Default]
    prompt_tokens: tuple[int, int]
    """Tokens of the prompt and of the negative prompt in the official recipes: a JSON caption, and the negative prompt
    for video; for images and actions an empty one in its template."""


# Where engines differ, the one that samples on the checkpoint's own grid was preferred: TensorRT-LLM on Karras for
# images (guidance 4.0 of the framework belongs to its uniform grid), vLLM-Omni on the native grid for Edge.
IMAGES = Settings(
    {
        Family.OMNI: Default(50, 7.0, 3.0, (400.0, 1000.0), "TensorRT-LLM defaults.py, vLLM-Omni"),
        Family.EDGE: Default(50, 4.0, 3.0, None, "TensorRT-LLM defaults.py"),
    },
    prompt_tokens=(1544, 64),
)
_VIDEO_SOURCES = "NVIDIA framework sample_args.json, vLLM-Omni, TensorRT-LLM, diffusers"
VIDEOS = Settings(
    {
        Family.OMNI: Default(35, 6.0, 10.0, None, _VIDEO_SOURCES),
        Family.EDGE: Default(35, 5.0, 3.0, None, "vLLM-Omni"),
    },
    prompt_tokens=(1615, 2863),
)
ACTIONS = Settings(
    dict.fromkeys(Family, Default(30, 1.0, 10.0, None, "NVIDIA framework sample_args.json")),
    prompt_tokens=(132, 64),
)
DROID_POLICY = Settings(
    {
        Family.OMNI: Default(4, 3.0, 5.0, None, "vLLM-Omni, LightX2V"),
        Family.EDGE: Default(4, 3.0, 5.0, (960.0, 1001.0), "vLLM-Omni"),
    },
    prompt_tokens=ACTIONS.prompt_tokens,
)
"""The policy mode of a checkpoint whose policy is for DROID."""
