"""What engines sample with when a request does not say: one row a kind of checkpoint and workload, with its source."""

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


WORKLOADS: Mapping[str, str] = {
    "t2i": "image",
    "t2v": "video",
    "i2v": "video",
    "v2v": "video",
    "policy": "action",
    "forward-dynamics": "action",
    "inverse-dynamics": "action",
}
"""Workload of each mode: modes of one workload share their settings in every engine."""

# Where engines differ, the one that samples on the checkpoint's own grid was preferred: TensorRT-LLM on Karras for
# images (guidance 4.0 of the framework belongs to its uniform grid), vLLM-Omni on the native grid for Edge.
DEFAULTS: Mapping[tuple[Family, str], Default] = {
    (Family.OMNI, "image"): Default(50, 7.0, 3.0, (400.0, 1000.0), "TensorRT-LLM defaults.py, vLLM-Omni"),
    (Family.OMNI, "video"): Default(
        35, 6.0, 10.0, None, "NVIDIA framework sample_args.json, vLLM-Omni, TensorRT-LLM, diffusers"
    ),
    (Family.OMNI, "action"): Default(30, 1.0, 10.0, None, "NVIDIA framework sample_args.json"),
    (Family.OMNI, "droid"): Default(4, 3.0, 5.0, None, "vLLM-Omni, LightX2V"),
    (Family.EDGE, "image"): Default(50, 4.0, 3.0, None, "TensorRT-LLM defaults.py"),
    (Family.EDGE, "video"): Default(35, 5.0, 3.0, None, "vLLM-Omni"),
    (Family.EDGE, "action"): Default(30, 1.0, 10.0, None, "NVIDIA framework sample_args.json"),
    (Family.EDGE, "droid"): Default(4, 3.0, 5.0, (960.0, 1001.0), "vLLM-Omni"),
}
"""By family and workload; ``droid`` is the policy mode of a DROID policy checkpoint."""


def default_for(mode: str, family: Family, policy: str | None) -> Default:
    droid = mode == "policy" and (policy or "").startswith("droid")
    return DEFAULTS[family, "droid" if droid else WORKLOADS[mode]]
