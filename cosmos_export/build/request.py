"""What the manifest says of the model to those who make requests: sizes of the latents, the prompt, the sampling.

No torch; the prompt's pieces are compiled in `cosmos_export.build.prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from cosmos_export.build.selection import codec_config
from cosmos_export.bundle import (
    ActionRecord,
    PromptRecord,
    RequestRecord,
    SamplingRecord,
    SoundRecord,
    VideoRecord,
)
from cosmos_export.bundle.manifest import Scalar
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.strict_json import shown
from cosmos_export.diagnostics import UserError
from cosmos_export.plan.subject import sampling_of

_PIPELINE_DEFAULTS = {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
"""What the published pipeline assumes where there is no video autoencoder."""


def request_record(checkpoint: Checkpoint, modalities: tuple[str, ...], prompt: PromptRecord | None) -> RequestRecord:
    """What a request to a bundle of ``checkpoint`` needs to know. UserError CX226 for a size that is no number."""
    geometry, vae = checkpoint.geometry, codec_config(checkpoint, "vae") or _PIPELINE_DEFAULTS
    sound = action = None
    if "sound" in modalities and geometry.sound_dim is not None:
        sound = _sound(geometry.sound_dim, geometry.sound_latent_fps, codec_config(checkpoint, "sound_tokenizer"))
    if "action" in modalities and geometry.action_dim is not None:
        action = ActionRecord(geometry.action_dim, geometry.num_embodiment_domains)
    video = VideoRecord(
        channels=geometry.latent_channel,
        spatial=_size(vae, "vae", "scale_factor_spatial", 8),
        temporal=_size(vae, "vae", "scale_factor_temporal", 4),
        patch=geometry.latent_patch_size,
        base_fps=float(geometry.base_fps),
        fps_modulation=geometry.enable_fps_modulation,
    )
    return RequestRecord(video, sound, action, prompt, _sampling(checkpoint))


def check_request(checkpoint: Checkpoint, modalities: tuple[str, ...]) -> None:
    """Raise before any work what `request_record` would raise after it."""
    request_record(checkpoint, modalities, None)


def _sound(channels: int, latent_fps: float, config: Mapping[str, Any]) -> SoundRecord:
    """Samples a latent are the product of the decoder's strides where the configuration does not say."""
    strides = config.get("dec_strides", (2, 4, 5, 6, 8))
    known = {key: value for key, value in config.items() if value is not None}
    hop = _size(known, "sound_tokenizer", "hop_size", prod(strides))
    return SoundRecord(channels, float(latent_fps), _size(known, "sound_tokenizer", "sampling_rate", 48_000), hop)


def _size(config: Mapping[str, Any], folder: str, key: str, default: int) -> int:
    """``config[key]``; ``default`` is that of the published class."""
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        what = f"{folder}/config.json: {key} = {shown(value)} is not a positive integer"
        raise UserError("CX226", what, "restore the published file")
    return value


def _sampling(checkpoint: Checkpoint) -> SamplingRecord:
    stated = sampling_of(checkpoint)
    return SamplingRecord(
        scheduler={key: _plain(value) for key, value in stated.scheduler.items() if _is_plain(value)},
        native=stated.native,
        distilled_sigmas=stated.distilled_sigmas,
        edge=stated.edge,
        policy=stated.policy,
    )


def _is_plain(value: object) -> bool:
    scalar = (str, int, float, bool, type(None))
    return isinstance(value, scalar) or (isinstance(value, list) and all(isinstance(item, scalar) for item in value))


def _plain(value: Any) -> Scalar | tuple[Scalar, ...]:
    return tuple(value) if isinstance(value, list) else value
