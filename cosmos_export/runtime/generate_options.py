"""The options of a request, and whether a bundle can do it: modes, their options, and what each needs of a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from cosmos_export.bundle import Manifest, RequestRecord
from cosmos_export.diagnostics import UnsupportedError, UserError, shown
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime import request_file
from cosmos_export.sampling import MODES, Mode
from cosmos_export.sampling.modes import Clue, implied_mode

ENCODER, DECODER, SOUND_DECODER = "vae_encoder", "vae_decoder", "sound_decoder"
"""Names of the codecs of a bundle: streams, and a graph for sound."""
MAX_SEED = 2**63 - 1
MIN_FPS, MAX_FPS = 0.1, 1000.0


_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    name: tuple(mode.name for mode in MODES.values() if name in mode.options)
    for name in dict.fromkeys(name for mode in MODES.values() for name in mode.options)
}
"""Modes in which each option that is not for every mode means something."""
_INSTEAD = {
    "frames": "an action has --chunk and one frame more",
    "height": "the canvas of an action follows from its picture and --tier",
    "width": "the canvas of an action follows from its picture and --tier",
    "metadata": "the caption of an action says everything itself",
    "actions": "actions are given in forward dynamics and found in the other modes",
    "action_clamp": "it is about actions that are given",
    "state": "a policy alone is given the robot's state",
}
_NEEDED = {"actions": "a .json or .safetensors file of rows"}


def request_record(manifest: Manifest) -> RequestRecord:
    if manifest.request is None or manifest.loop is None:
        raise UnsupportedError(
            "CX605", "this bundle does not say how it is run", "build it again with this version of cosmos-export"
        )
    return manifest.request


def mode_of(asked: GenerateOptions, manifest: Manifest, record: RequestRecord) -> Mode:
    """The mode that is asked for, or the one that the files and the bundle speak of."""
    if asked.mode is not None:
        known = request_file.mode_named(asked.mode)
        if known is None:
            raise UserError(
                "CX604",
                f"{shown(asked.mode)} is not a mode; known: {', '.join(MODES)}",
                "leave --mode out, and the files and the bundle decide; modes that answer in text are not compiled",
            )
        return MODES[known]
    only_images = all(profile.dims["frames"].max == 1 for profile in manifest.profiles)
    found = {
        Clue.ACTIONS: asked.actions is not None,
        Clue.ROBOT: record.sampling.policy is not None or asked.embodiment is not None,
        Clue.CLIP: asked.video is not None,
        Clue.PICTURE: asked.image is not None,
        Clue.ONE_FRAME: asked.frames == 1 or (asked.frames is None and only_images),
    }
    return implied_mode([clue for clue, there in found.items() if there])


def require_options(asked: GenerateOptions, mode: Mode) -> None:
    """Every option that is given means something in ``mode``, and what it starts from is given once."""
    for name, modes in _ONLY_FOR.items():
        value = getattr(asked, name)
        if value is not None and value is not False and name not in mode.options:
            raise UserError(
                "CX604",
                f"{_flag(name)} is not for mode {mode}; it is for {', '.join(modes)}",
                _INSTEAD.get(name, "") if mode.acts or name == "actions" else "",
            )
    if asked.action_normalization is not None and asked.action_stats is None:
        raise UserError("CX604", "--action-normalization without --action-stats", "it says how to read that file")
    if asked.action_clamp and asked.action_stats is None:
        raise UserError("CX604", "--action-clamp without --action-stats", "it cuts off at the bounds of that file")
    allowed = mode.sources
    given = [name for name in ("image", "video") if getattr(asked, name) is not None]
    wanted = " or ".join(map(_flag, allowed))
    for name in given:
        if name not in allowed:
            raise UserError("CX604", f"{_flag(name)} is not for mode {mode}", f"it takes {wanted or 'text only'}")
    if isinstance(asked.image, Mapping) and not mode.acts:
        raise UserError("CX604", f"pictures by name in mode {mode}", "cameras have names in the modes of robots")
    if len(given) > 1:
        raise UserError("CX604", f"{' and '.join(map(_flag, given))} are given", "one of them is enough")
    if allowed and not given:
        raise UserError("CX604", f"mode {mode} starts from {wanted}")
    for name in mode.needs:
        if getattr(asked, name) is None:
            raise UserError("CX604", f"mode {mode} needs {_flag(name)}", _NEEDED.get(name, ""))


def _flag(name: str) -> str:
    return {"metadata": "--[no-]metadata"}.get(name, f"--{name.replace('_', '-')}")


def require_capabilities(manifest: Manifest, record: RequestRecord, mode: Mode, sound: bool) -> None:
    """The checkpoint, the graphs and the codecs of the bundle can do this."""
    what = f"{mode}{' with sound' if sound else ''}"
    modalities, outputs = (manifest.options.get(name) for name in ("modalities", "outputs"))
    for modality in sorted(mode.modalities(sound)):
        if modality not in _names(modalities):
            if manifest.model.geometry.get(f"{modality}_dim", ...) is None:
                _lacks(manifest, what, f"its model generates no {modality}", "another checkpoint does")
            _lacks(manifest, what, f"it was built without {modality}", f"build it with --modalities …,{modality}")
    for modality in (*mode.generated, *(["sound"] if sound else [])):
        if f"{modality}_velocity" not in _names(outputs):
            _lacks(
                manifest,
                what,
                f"it does not compute {modality}_velocity",
                f"build it with --outputs …,{modality}_velocity",
            )
    if mode.sources and not has_component(manifest, ENCODER):
        _lacks(manifest, what, "it has no encoder for pictures", "build it with its components")


def _lacks(manifest: Manifest, what: str, why: str, hint: str) -> NoReturn:
    raise UnsupportedError("CX605", f"this bundle of {manifest.model.id} cannot do {what}: {why}", hint)


def _names(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def require_numbers(asked: GenerateOptions) -> None:
    if not 0 <= asked.seed <= MAX_SEED:
        raise UserError("CX615", f"seed {asked.seed}; allowed: 0 to {MAX_SEED}")
    if asked.keep not in (None, "first", "last"):
        raise UserError("CX604", f"--keep {shown(asked.keep)}; allowed: first, last")
    if asked.fps is not None and not (math.isfinite(asked.fps) and MIN_FPS <= asked.fps <= MAX_FPS):
        raise UserError("CX615", f"{asked.fps} frames a second; allowed: {MIN_FPS} to {MAX_FPS:.0f}")


def sounds(manifest: Manifest, mode: Mode) -> bool:
    """Whether a video of ``manifest`` has sound in every profile, so that there is none without."""
    if mode.acts or mode.single or "sound_velocity" not in _names(manifest.options.get("outputs")):
        return False
    videos = [profile.dims for profile in manifest.profiles if not profile.dims["action_len"].min]
    return bool(videos) and all(dims["sound_len"].min > 0 for dims in videos)


def has_component(manifest: Manifest, name: str) -> bool:
    """Whether the bundle has the codec ``name``."""
    return name in manifest.streams or name in manifest.graphs
