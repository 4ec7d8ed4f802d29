"""Manifests as builds write them, for bundles that are only described: the front end reads no engine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

import bundle_samples

from cosmos_export import bundle
from cosmos_export.bundle import DimRecord, Manifest
from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.checkpoint import demo_components
from cosmos_export.embodiments import embodiments_of, policy_embodiment
from cosmos_export.runtime.media import Mark
from cosmos_export.sampling import CheckpointSampling, Overrides, resolve_schedule

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "use_karras_sigmas": True,
    "sigma_max": 200.0,
    "sigma_min": 0.147,
}
EDGE = {k: v for k, v in UNIPC.items() if not k.startswith("sigma")} | {"use_karras_sigmas": False, "flow_shift": 3.0}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True, "shift": 1.0}
DISTILLED = (1.0, 0.9375, 0.8333333333333334, 0.625)
TOKENIZER = "tokenizer/tokenizer.json"
MARK = Mark("cd" * 32)

SMALL = {
    "und_len": DimRecord(1, 256, 4096),
    "frames": DimRecord(1, 3, 6),
    "height": DimRecord(3, 3, 3),
    "width": DimRecord(5, 5, 5),
    "sound_len": DimRecord(0, 0, 30),
    "action_len": DimRecord(0, 0, 0),
}
"""80 × 48 pixels, up to 21 frames."""
ROBOT = SMALL | {
    "frames": DimRecord(5, 5, 5),
    "height": DimRecord(4, 12, 40),
    "width": DimRecord(4, 20, 52),
    "sound_len": DimRecord(0, 0, 0),
    "action_len": DimRecord(16, 16, 16),
}
"""A chunk of 16 actions."""


def tokenizer(root: Path) -> Path:
    """A bundle directory with the demo checkpoint's tokenizer, and nothing else."""
    demo_components.write_tokenizer(root / "tokenizer")
    return root


@functools.cache
def tokenizer_file() -> tuple[int, str]:
    """Size and SHA-256 of the tokenizer."""
    with tempfile.TemporaryDirectory() as directory:
        data = (tokenizer(Path(directory)) / TOKENIZER).read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def prompt_record(*, use_system: bool = True) -> bundle.PromptRecord:
    ids = demo_components.token_ids()
    turn, end, answer = "<|im_start|>{}\n", "<|im_end|>\n", "<|im_start|>assistant\n"
    user = turn.format("user")
    return bundle.PromptRecord(
        tokenizer=TOKENIZER,
        plain=(user, end + answer),
        system=(turn.format("system"), end + user, end + answer),
        use_system=use_system,
        suffix_ids=(ids["<|im_end|>"], ids["<|vision_start|>"]),
    )


def _policy(domain: str | None) -> Embodiment | None:
    return None if domain is None else policy_embodiment(domain)


def manifest(
    profiles: Mapping[str, Mapping[str, DimRecord]] | None = None,
    *,
    modalities: tuple[str, ...] = ("vision", "sound", "action"),
    outputs: tuple[str, ...] | None = None,
    has_sound: bool = True,
    components: tuple[str, ...] = ("vae_encoder", "vae_decoder", "sound_decoder"),
    sampling: CheckpointSampling | None = None,
    built: Overrides | None = None,
    mode: str = "t2v",
    device_loop: bool = False,
    use_system: bool = True,
    policy: Embodiment | None = None,
) -> Manifest:
    sampling = sampling or CheckpointSampling(UNIPC)
    schedule = resolve_schedule(sampling, mode, built)
    contract = bundle.GraphContract((), ())
    shapes = profiles or {"small": SMALL}
    options: dict[str, Any] = {
        "modalities": modalities,
        "outputs": outputs or tuple(f"{name}_velocity" for name in modalities),
        "mode": mode,
        **{f"schedule.{name}": value for name, value in asdict(schedule).items()},
    }
    segments = (bundle.SegmentRecord("generator", schedule.steps),) if device_loop else ()
    sample = bundle_samples.manifest()
    model = dataclasses.replace(sample.model, geometry={"sound_dim": 8 if has_sound else None, "action_dim": 64})
    return dataclasses.replace(
        sample,
        model=model,
        profiles=tuple(bundle.ProfileRecord(name, dims) for name, dims in shapes.items()),
        loop=bundle.LoopRecord("generator", {}, segments),
        streams={name: bundle.StreamRecord("generator", "generator", {}) for name in components if "vae" in name},
        graphs=dict.fromkeys(("generator", *(c for c in components if c == "sound_decoder")), contract),
        engines=(),
        edges=(),
        plan_checks=(),
        files=(bundle.FileRecord(TOKENIZER, *tokenizer_file(), "tokenizer"),),
        request=bundle.RequestRecord(
            video=bundle.VideoRecord(4, 16, 4, 2, 24.0, True),
            sound=bundle.SoundRecord(8, 25.0, 48_000, 1920) if has_sound else None,
            action=bundle.ActionRecord(64, 32, embodiments_of(policy or _policy(sampling.policy), 32, 64)),
            prompt=prompt_record(use_system=use_system),
            sampling=bundle.SamplingRecord(
                {k: tuple(v) if isinstance(v, list) else v for k, v in sampling.scheduler.items()},
                sampling.native,
                sampling.distilled_sigmas,
                sampling.family.facts.recorded_as_edge,
                sampling.policy,
            ),
        ),
        options=options,
    )


def picture(height: int, width: int, frames: int = 1, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def text_of(ids: Any) -> str:
    """The text that ``ids`` of the demo checkpoint's tokenizer are, without control tokens."""
    return bytes(b for b in ids.tolist() if b < 256).decode("utf-8", "replace")
