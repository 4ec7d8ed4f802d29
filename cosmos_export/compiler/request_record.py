"""The manifest's record of the model for those who make requests: sizes of the latents, the prompt, the sampling.

No torch; the prompt's pieces are compiled in `cosmos_export.compiler.prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from cosmos_export.bundle import (
    ActionRecord,
    PolicyRecord,
    PromptRecord,
    RequestRecord,
    SamplingRecord,
    SoundRecord,
    VideoRecord,
)
from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.bundle.manifest import Scalar
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.policy import Policy, read_policy
from cosmos_export.compiler.selection import codec_config
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.embodiments import embodiments_of, policy_embodiment
from cosmos_export.plan.subject import sampling_of

_PIPELINE_DEFAULTS = {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
"""Sizes that the published pipeline assumes where there is no video autoencoder."""


def request_record(checkpoint: Checkpoint, modalities: tuple[str, ...], prompt: PromptRecord | None) -> RequestRecord:
    """The record that a request to a bundle of ``checkpoint`` needs."""
    geometry, vae = checkpoint.geometry, codec_config(checkpoint, "vae") or _PIPELINE_DEFAULTS
    sound = action = None
    if "sound" in modalities and geometry.sound_dim is not None:
        sound = _sound(geometry.sound_dim, geometry.sound_latent_fps, codec_config(checkpoint, "sound_tokenizer"))
    if "action" in modalities and geometry.action_dim is not None:
        robots = _robots(checkpoint, geometry.num_embodiment_domains, geometry.action_dim)
        action = ActionRecord(geometry.action_dim, geometry.num_embodiment_domains, robots)
    video = VideoRecord(
        channels=geometry.latent_channel,
        spatial=vae["scale_factor_spatial"],
        temporal=vae["scale_factor_temporal"],
        patch=geometry.latent_patch_size,
        base_fps=float(geometry.base_fps),
        fps_modulation=geometry.enable_fps_modulation,
    )
    return RequestRecord(video, sound, action, prompt, _sampling(checkpoint), _policy(checkpoint, video.temporal))


def _policy(checkpoint: Checkpoint, temporal: int) -> PolicyRecord | None:
    """The policy of checkpoint.json; CX103 where the model cannot have such actions."""
    found = read_policy(checkpoint.policy)
    if found is None:
        return None
    most = checkpoint.geometry.action_dim
    if found.width is not None and most is not None and found.width > most:
        what = f"checkpoint.json: policy: actions of {found.width} columns; the model has {most}"
        raise UserError("CX103", what, "restore the file, or correct the field")
    if found.chunk is not None and found.chunk % temporal:
        what = f"checkpoint.json: policy: a chunk of {found.chunk} actions is not a multiple of {temporal}"
        raise UserError("CX103", what, "restore the file, or correct the field")
    return PolicyRecord(found.domain, found.width, found.chunk, found.fps, found.state)


def _robots(checkpoint: Checkpoint, domains: int, width: int) -> tuple[Embodiment, ...]:
    """The robots that the bundle acts for. None of them where the policy's own is not known: requests are refused."""
    found = read_policy(checkpoint.policy)
    if found is None or found.domain is None:
        return embodiments_of(None, domains, width)
    own = _own(found)
    return () if own is None else embodiments_of(own, domains, width)


def _own(found: Policy) -> Embodiment | None:
    """The embodiment of a policy; None where it says no domain, or one that is not known."""
    if found.domain is None:
        return None
    try:
        return policy_embodiment(found.domain, found.width, found.chunk, found.fps, found.history)
    except UserError:
        return None


def checkpoint_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Notes on parts of the checkpoint that are not in its bundle, or not as a user may think."""
    names = ", ".join(path.relative_to(checkpoint.root).as_posix() for path in checkpoint.adapters)
    adapters = (f"adapters that are not in this bundle: {names}",) if names else ()
    folded = tuple(f"adapter in the weights: {text}" for text in checkpoint.folded)
    return (*checkpoint.notes, *folded, *adapters, *_position_notes(checkpoint), *policy_notes(checkpoint))


def _position_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    margin, stated = checkpoint.geometry.unified_3d_mrope_temporal_modality_margin, checkpoint.max_position
    if margin < stated:
        return ()
    return (
        f"generation begins at rotary position {margin:,}, beyond max_position_embeddings {stated:,}: that limits the "
        "prompts of profiles alone",
    )


def policy_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Notes on checkpoint.json that the user of a policy should read before a robot moves."""
    found = read_policy(checkpoint.policy)
    if found is None:
        return ()
    notes, own = [], _own(found)
    if found.state is None:
        does = "gives none" if own is None or not own.history else "wants it, as the published policy (use_state)"
        notes.append(f"checkpoint.json does not say whether this policy is given the robot's state: `run` {does}")
    if found.domain is None:
        notes.append("checkpoint.json has a policy without domain_name: `run` takes any --embodiment")
    elif own is not None:
        usual = policy_embodiment(found.domain)
        for what, said, known in (
            ("columns", found.width, usual.width), ("actions in a chunk", found.chunk, usual.chunk),
            ("frames per second", found.fps, usual.fps),
        ):  # fmt: skip
            if said is not None and known is not None and said != known:
                notes.append(f"checkpoint.json: {said:g} {what}; policies for {found.domain} usually have {known:g}")
    else:
        notes.append(f"checkpoint.json: no embodiment {shown(found.domain)}: `run` refuses its actions (CX610)")
    if found.unread:
        unread = ", ".join(map(shown, found.unread))
        notes.append(f"fields of the policy in checkpoint.json that are not read: {unread}")
    return tuple(notes)


def _sound(channels: int, latent_fps: float, config: Mapping[str, Any]) -> SoundRecord:
    """The published sizes where the checkpoint has no sound tokenizer."""
    strides = config.get("dec_strides", (2, 4, 5, 6, 8))
    return SoundRecord(channels, float(latent_fps), config.get("sampling_rate", 48_000), prod(strides))


def _sampling(checkpoint: Checkpoint) -> SamplingRecord:
    stated = sampling_of(checkpoint)
    return SamplingRecord(
        scheduler={key: _plain(value) for key, value in stated.scheduler.items() if _is_plain(value)},
        native=stated.native,
        distilled_sigmas=stated.distilled_sigmas,
        edge=stated.family.facts.recorded_as_edge,
        policy=stated.policy,
    )


def _is_plain(value: object) -> bool:
    scalar = (str, int, float, bool, type(None))
    return isinstance(value, scalar) or (isinstance(value, list) and all(isinstance(item, scalar) for item in value))


def _plain(value: Any) -> Scalar | tuple[Scalar, ...]:
    return tuple(value) if isinstance(value, list) else value
