"""From what a user asks to what the generator runs: `prepare` makes a `Request` of `Asked`, or refuses it.

Everything that can be wrong is found here, before an engine is loaded: first what needs no file (mode, options,
schedule, sizes), then what is in the files, at last the length of the prompt. What the model sees follows the published
pipeline (diffusers, ``Cosmos3OmniPipeline``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle import MANIFEST_NAME, DimRecord, Manifest, ProfileRecord, RequestRecord, parse_manifest
from cosmos_export.bundle.manifest import MAX_MANIFEST_BYTES
from cosmos_export.bundle.strict import StrictError
from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.checkpoint.strict_json import shown
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.runtime import canvas, embodiments, media
from cosmos_export.runtime.embodiments import ActionScale, Embodiment
from cosmos_export.runtime.media import Mark
from cosmos_export.runtime.prompts import (
    DEFAULT_VIEWPOINT,
    Scene,
    action_caption,
    read_prompt,
    system_message,
    with_metadata,
)
from cosmos_export.runtime.request import ActionPart, Request
from cosmos_export.runtime.tokenize import PromptTokenizer, TokenIds
from cosmos_export.sampling import MODES, CheckpointSampling, Mode, Overrides, Schedule, resolve_schedule

Keep = Literal["first", "last"]

ENCODER, DECODER, SOUND_DECODER = "vae_encoder", "vae_decoder", "sound_decoder"
"""Names of the codecs of a bundle: streams, and a graph for sound."""
KEPT_LATENTS = 2
"""Latent frames of a clip that video-to-video continues: five pixel frames."""
MAX_SEED = 2**63 - 1
MAX_FPS = 1000.0


@dataclass(frozen=True)
class Asked:
    """The options of a request as a user gives them; None (and no path) is the default of the mode or the bundle."""

    prompt: str
    """Text, or the path of a ``.json`` caption; the task of an action."""
    negative: str | None = None
    mode: str | None = None
    image: Path | None = None
    video: Path | None = None
    actions: Path | None = None
    frames: int | None = None
    """In pixels, as are height and width."""
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int = 0
    sampling: Overrides = field(default_factory=Overrides)
    sound: bool = False
    keep: Keep | None = None
    """End of a longer clip that video-to-video continues."""
    metadata: bool | None = None
    """Whether sentences on duration and resolution follow the prompt; None: unless it is a JSON caption."""
    system: bool | None = None
    """Whether there is a system message; None: as the checkpoint says."""
    embodiment: str | None = None
    viewpoint: str | None = None
    chunk: int | None = None
    """Actions in the request."""
    tier: int | None = None
    action_width: int | None = None
    action_stats: Path | None = None
    action_normalization: str | None = None
    noise: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A request that the bundle can run, and what is left to know about its results."""

    request: Request
    profile: str
    """The shape profile that takes it."""
    size: tuple[int, int]
    """Height and width of the pictures in pixels."""
    sound_len: int
    embodiment: Embodiment | None = None
    scale: ActionScale | None = None
    """How actions of the model become those of the data; None where the request brought no statistics."""
    notes: tuple[str, ...] = ()
    """What a user may not have meant."""


def prepare(asked: Asked, manifest: Manifest, bundle: Path) -> Prepared:
    """The request that ``asked`` is for the bundle ``manifest`` describes, which lies at ``bundle``.

    UserError with what was found and what is allowed: CX600–CX603 prompts, CX604 options that do not go together,
    CX606 a schedule that is not the compiled one, CX607 outside all profiles, CX608 size, CX609 frames, CX610–CX613
    actions, CX614 media, CX615 rates and seed, CX616 a negative prompt nobody reads, CX617 noise; CX46x sampling.
    UnsupportedError CX605: the bundle lacks what the mode needs.
    """
    record = _record(manifest)
    mode = _mode(asked, manifest, record)
    _require_options(asked, mode)
    _require_capabilities(manifest, record, mode, asked.sound)
    _require_numbers(asked)
    schedule = _schedule(asked.sampling, manifest, record, mode)
    if asked.negative is not None and not any(schedule.guided):
        raise UserError(
            "CX616", "a negative prompt where no step is guided", "leave --negative out, or set --guidance above 1"
        )
    builder = _action_scene if mode in _ACTION_MODES else _video_scene
    stage = builder(asked, manifest, record, mode)
    noise = _read_noise(asked.noise, stage, schedule, record) if asked.noise else {}
    ids, negative_ids = _tokenized(asked, stage, manifest, record, bundle, guided=any(schedule.guided))
    lengths = [len(ids)] if negative_ids is None else [len(ids), len(negative_ids)]
    profile = _profile(manifest.profiles, {**stage.dims, "und_len": lengths}, record)
    request = Request(
        mode=mode,
        input_ids=ids,
        negative_ids=negative_ids,
        schedule=schedule,
        frames=stage.scene.frames,
        height=stage.dims["height"],
        width=stage.dims["width"],
        fps=stage.scene.fps,
        clean_frames=stage.clean_frames,
        pixels=stage.pixels,
        sound=asked.sound,
        action=stage.action,
        seed=asked.seed,
        noise=noise,
    )
    size = (request.height * record.video.spatial, request.width * record.video.spatial)
    return Prepared(request, profile.name, size, stage.dims["sound_len"], stage.embodiment, stage.scale, stage.notes)


def open_manifest(bundle: Path) -> tuple[Manifest, Mark]:
    """The manifest of ``bundle``, and the mark of what is made with it. Reads no other file and verifies none.

    CX618: there is none, or it is damaged.
    """
    path = bundle / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
        return parse_manifest(data), Mark(hashlib.sha256(data).hexdigest())
    except OSError as error:
        raise UserError(
            "CX618", f"{bundle} is not a bundle: {path.name}: {error.strerror or error}", "name the directory of one"
        ) from error
    except StrictError as error:
        raise UserError("CX618", f"{path}: {error}", f"`cosmos-export bundle verify {bundle}` says more") from error


def has_component(manifest: Manifest, name: str) -> bool:
    """Whether the bundle has the codec ``name``."""
    return name in manifest.streams or name in manifest.graphs


# -- modes ------------------------------------------------------------------------------------------------------------

_VIDEO_MODES = ("t2i", "t2v", "i2v", "v2v")
_ACTION_MODES = ("policy", "forward-dynamics", "inverse-dynamics")
_SOURCES: Mapping[str, tuple[str, ...]] = {
    "t2i": (),
    "t2v": (),
    "i2v": ("image",),
    "v2v": ("video",),
    "policy": ("image", "video"),
    "forward-dynamics": ("image", "video"),
    "inverse-dynamics": ("video",),
}
"""Files a mode starts from: one of them."""

_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "actions": ("forward-dynamics",),
    "frames": _VIDEO_MODES,
    "height": _VIDEO_MODES,
    "width": _VIDEO_MODES,
    "metadata": _VIDEO_MODES,
    "sound": ("t2v", "i2v", "v2v"),
    "keep": ("v2v",),
    "embodiment": _ACTION_MODES,
    "viewpoint": _ACTION_MODES,
    "chunk": _ACTION_MODES,
    "tier": _ACTION_MODES,
    "action_width": _ACTION_MODES,
    "action_stats": _ACTION_MODES,
    "action_normalization": _ACTION_MODES,
}
_INSTEAD = {
    "frames": "an action has --chunk and one frame more",
    "height": "the canvas of an action follows from its picture and --tier",
    "width": "the canvas of an action follows from its picture and --tier",
    "metadata": "the caption of an action says everything itself",
    "actions": "actions are given in forward dynamics and found in the other modes",
}
_GENERATED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_VIDEO_MODES, ("vision",)),
    "policy": ("vision", "action"),
    "forward-dynamics": ("vision",),
    "inverse-dynamics": ("action",),
}


def _record(manifest: Manifest) -> RequestRecord:
    if manifest.request is None or manifest.loop is None:
        raise UnsupportedError(
            "CX605", "this bundle does not say how it is run", "build it again with this version of cosmos-export"
        )
    return manifest.request


def _mode(asked: Asked, manifest: Manifest, record: RequestRecord) -> Mode:
    """The mode that is asked for, or the one that the files and the bundle speak of."""
    if asked.mode is not None:
        if asked.mode not in MODES:
            raise UserError("CX604", f"mode {shown(asked.mode)}; known: {', '.join(MODES)}")
        return asked.mode
    if asked.actions is not None:
        return "forward-dynamics"
    if record.sampling.policy is not None or asked.embodiment is not None:
        return "policy"
    if asked.video is not None:
        return "v2v"
    if asked.image is not None:
        return "i2v"
    only_images = all(profile.dims["frames"].max == 1 for profile in manifest.profiles)
    return "t2i" if asked.frames == 1 or (asked.frames is None and only_images) else "t2v"


def _require_options(asked: Asked, mode: Mode) -> None:
    """Every option that is given means something in ``mode``, and what it starts from is given once."""
    for name, modes in _ONLY_FOR.items():
        if getattr(asked, name) not in (None, False) and mode not in modes:
            raise UserError(
                "CX604",
                f"{_flag(name)} is not for mode {mode}; it is for {', '.join(modes)}",
                _INSTEAD.get(name, "") if mode in _ACTION_MODES or name == "actions" else "",
            )
    if asked.action_normalization is not None and asked.action_stats is None:
        raise UserError("CX604", "--action-normalization without --action-stats", "it says how to read that file")
    allowed = _SOURCES[mode]
    given = [name for name in ("image", "video") if getattr(asked, name) is not None]
    wanted = " or ".join(map(_flag, allowed))
    for name in given:
        if name not in allowed:
            raise UserError("CX604", f"{_flag(name)} is not for mode {mode}", f"it takes {wanted or 'text only'}")
    if len(given) > 1:
        raise UserError("CX604", f"{' and '.join(map(_flag, given))} are given", "one of them is enough")
    if allowed and not given:
        raise UserError("CX604", f"mode {mode} starts from {wanted}")
    if mode == "forward-dynamics" and asked.actions is None:
        raise UserError("CX604", "mode forward-dynamics needs --actions", "a .json or .safetensors file of rows")


def _flag(name: str) -> str:
    return {"metadata": "--[no-]metadata"}.get(name, f"--{name.replace('_', '-')}")


def _require_capabilities(manifest: Manifest, record: RequestRecord, mode: Mode, sound: bool) -> None:
    """The checkpoint, the graphs and the codecs of the bundle can do this."""
    wanted = {*_GENERATED[mode], *(["sound"] if sound else []), *(["action"] if mode in _ACTION_MODES else [])}
    what = f"{mode}{' with sound' if sound else ''}"
    modalities, outputs = (manifest.options.get(name) for name in ("modalities", "outputs"))
    for modality in sorted(wanted):
        if modality not in _names(modalities):
            if manifest.model.geometry.get(f"{modality}_dim", ...) is None:
                _lacks(manifest, what, f"its model generates no {modality}", "another checkpoint does")
            _lacks(manifest, what, f"it was built without {modality}", f"build it with --modalities …,{modality}")
    for modality in (*_GENERATED[mode], *(["sound"] if sound else [])):
        if f"{modality}_velocity" not in _names(outputs):
            _lacks(
                manifest,
                what,
                f"it does not compute {modality}_velocity",
                f"build it with --outputs …,{modality}_velocity",
            )
    if _SOURCES[mode] and not has_component(manifest, ENCODER):
        _lacks(manifest, what, "it has no encoder for pictures", "build it with its components")


def _lacks(manifest: Manifest, what: str, why: str, hint: str) -> NoReturn:
    raise UnsupportedError("CX605", f"this bundle of {manifest.model.id} cannot do {what}: {why}", hint)


def _names(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _require_numbers(asked: Asked) -> None:
    if not 0 <= asked.seed <= MAX_SEED:
        raise UserError("CX615", f"seed {asked.seed}; allowed: 0 to {MAX_SEED}")
    if asked.keep not in (None, "first", "last"):
        raise UserError("CX604", f"--keep {shown(asked.keep)}; allowed: first, last")
    if asked.fps is not None and not (math.isfinite(asked.fps) and 0 < asked.fps <= MAX_FPS):
        raise UserError("CX615", f"{asked.fps} frames a second; allowed: above 0, to {MAX_FPS:.0f}")


# -- schedule ---------------------------------------------------------------------------------------------------------


def checkpoint_sampling(record: RequestRecord) -> CheckpointSampling:
    """What the bundle's checkpoint says of its sampling."""
    sampling = record.sampling
    # Lists of a scheduler's configuration are tuples in a manifest.
    scheduler = {key: list(v) if isinstance(v, tuple) else v for key, v in sampling.scheduler.items()}
    return CheckpointSampling(scheduler, sampling.native, sampling.distilled_sigmas, sampling.edge, sampling.policy)


def _schedule(asked: Overrides, manifest: Manifest, record: RequestRecord, mode: Mode) -> Schedule:
    """The compiled schedule of a device loop; else the build's for its own mode, with what the request changes."""
    assert manifest.loop is not None
    recorded = _recorded(manifest)
    if manifest.loop.segments:
        if recorded is None:
            raise UnsupportedError(
                "CX605", "this bundle does not say what schedule is compiled into it", "build it again"
            )
        _require_compiled(asked, recorded)
        return recorded
    if recorded is not None and manifest.options.get("mode") == mode:
        if asked == Overrides():
            return recorded
        asked = _completed(asked, recorded)
    return resolve_schedule(checkpoint_sampling(record), mode, asked)


def _recorded(manifest: Manifest) -> Schedule | None:
    names = Schedule.__dataclass_fields__
    values = {name: manifest.options.get(f"schedule.{name}", ...) for name in names}
    return None if ... in values.values() else Schedule(**cast(dict[str, Any], values))


_SCHEDULE_OPTIONS = ("grid", "steps", "shift", "guidance", "guidance_interval")


def _require_compiled(asked: Overrides, compiled: Schedule) -> None:
    for name in _SCHEDULE_OPTIONS:
        value, found = getattr(asked, name), getattr(compiled, name)
        if value is not None and value != found:
            raise UserError(
                "CX606",
                f"{name.replace('_', ' ')} {value}; {found} is compiled into this bundle's loop",
                "leave the option out, or build with `--loop host`",
            )


def _completed(asked: Overrides, built: Schedule) -> Overrides:
    """``asked``, and for what it leaves open what the bundle was built with, as long as the two go together."""
    if built.sampler != "unipc":
        return asked
    same_grid = asked.grid in (None, built.grid)
    same_guidance = asked.guidance in (None, built.guidance) and asked.guidance_interval is None
    guided = asked.guidance if asked.guidance is not None else built.guidance
    interval = (built.guidance_interval or (0.0, 1000.0)) if guided != 1 and same_guidance else asked.guidance_interval
    return replace(
        asked,
        grid=asked.grid or built.grid,
        steps=built.steps if asked.steps is None else asked.steps,
        shift=built.shift if asked.shift is None and same_grid else asked.shift,
        guidance=guided,
        guidance_interval=interval,
    )


# -- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """A request but for its prompt and its noise."""

    mode: Mode
    scene: Scene
    dims: Mapping[str, int]
    """Every dimension of a profile but the prompt's length."""
    clean_frames: tuple[int, ...] = ()
    pixels: NDArray[np.float32] | None = None
    action: ActionPart | None = None
    embodiment: Embodiment | None = None
    scale: ActionScale | None = None
    notes: tuple[str, ...] = ()


def _video_scene(asked: Asked, manifest: Manifest, record: RequestRecord, mode: Mode) -> _Stage:
    """Sizes as given or from a profile, and the frames a clip starts with."""
    video = record.video
    given = {
        "height": _latents("height", asked.height, video.spatial),
        "width": _latents("width", asked.width, video.spatial),
        "frames": 1 if mode == "t2i" else _latent_frames(asked.frames, video.temporal),
    }
    if mode == "t2i" and asked.frames not in (None, 1):
        raise UserError("CX609", f"{asked.frames} frames; an image (mode t2i) is 1", "use mode t2v for a clip")
    least = {"t2i": 1, "v2v": KEPT_LATENTS + 1}.get(mode, 2)
    if given["frames"] is not None and given["frames"] < least:
        first = (least - 1) * video.temporal + 1
        raise UserError("CX609", f"{asked.frames} frames; mode {mode} generates from {first}", _image_hint(mode))
    known = {name: [value] for name, value in given.items() if value is not None}
    profile = _profile(manifest.profiles, known, record, least={"frames": least})
    dims = {name: value if value is not None else profile.dims[name].opt for name, value in given.items()}
    dims["frames"] = max(dims["frames"], least)
    fps = video.base_fps if asked.fps is None else float(asked.fps)
    scene = Scene(
        (dims["frames"] - 1) * video.temporal + 1, dims["height"] * video.spatial, dims["width"] * video.spatial, fps
    )
    dims |= {"sound_len": _sound_len(scene, record) if asked.sound else 0, "action_len": 0}
    _profile(manifest.profiles, {name: [value] for name, value in dims.items()}, record)  # before a file is read
    stage = _Stage(mode, scene, dims)
    if mode == "i2v" and asked.image is not None:
        image = canvas.cover(media.read_image(asked.image), scene.height, scene.width)
        return replace(stage, clean_frames=(0,), pixels=image[None, :, None])
    if mode == "v2v" and asked.video is not None:
        count = (KEPT_LATENTS - 1) * video.temporal + 1
        clip = media.read_clip(asked.video, count, last=asked.keep == "last")
        pixels = canvas.stretch(_lasting(clip.frames, count), scene.height, scene.width)
        clean = tuple(range(KEPT_LATENTS))
        return replace(stage, clean_frames=clean, pixels=pixels[None], notes=_rate_note(clip.fps, fps, asked.video))
    return stage


def _action_scene(asked: Asked, manifest: Manifest, record: RequestRecord, mode: Mode) -> _Stage:
    """An embodiment's actions, and the canvas that its picture or clip lies on."""
    assert record.action is not None
    robot = embodiments.embodiment(asked.embodiment, record.sampling.policy)
    video, fps = record.video, robot.fps if asked.fps is None else float(asked.fps)
    if robot.domain >= record.action.domains:
        raise UserError(
            "CX610", f"embodiment `{robot.name}` is domain {robot.domain}; the model has {record.action.domains}"
        )
    chunk = _chunk(asked.chunk, robot, manifest.profiles, video.temporal)
    given = None
    if asked.actions is not None:
        given = embodiments.read_actions(asked.actions)
    width = _action_width(asked, robot, given, record.action.dim)
    scale = None
    if asked.action_stats is not None:
        scale = embodiments.read_scale(asked.action_stats, width, asked.action_normalization)
    notes: list[str] = []
    if given is not None:
        if len(given) != chunk:
            verb = "the last is repeated" if len(given) < chunk else "the rest is left out"
            notes.append(f"{asked.actions} has {len(given)} actions for {chunk}: {verb}")
        given = _lasting(given if scale is None else scale.to_model(given), chunk)[:chunk]
    source = asked.video if asked.image is None else asked.image
    assert source is not None
    all_given = mode == "inverse-dynamics"
    frames, clip_fps = _source(asked, chunk + 1 if all_given else 1)
    plan = canvas.plan_action_canvas(frames.shape[1], frames.shape[2], asked.tier or robot.tier, video.spatial)
    if all_given:
        if len(frames) <= chunk:
            notes.append(f"{source} has {len(frames)} frames for {chunk + 1}: the last is repeated")
        frames = _lasting(frames, chunk + 1)
        notes += _rate_note(clip_fps, fps, source)
    latent_frames = chunk // video.temporal + 1
    dims = {
        "frames": latent_frames,
        "height": max(plan.content_height // video.spatial, 1),
        "width": max(plan.content_width // video.spatial, 1),
        "sound_len": 0,
        "action_len": chunk,
    }
    _profile(manifest.profiles, {name: [value] for name, value in dims.items()}, record)
    return _Stage(
        mode,
        Scene(chunk + 1, plan.height, plan.width, fps),
        dims,
        clean_frames=tuple(range(latent_frames)) if all_given else (0,),
        pixels=canvas.action_canvas(frames, plan)[None],
        action=ActionPart(chunk, robot.domain, width, given),
        embodiment=robot,
        scale=scale,
        notes=tuple(notes),
    )


def _source(asked: Asked, count: int) -> tuple[media.Frames, float | None]:
    if asked.image is not None:
        return media.read_image(asked.image)[None], None
    assert asked.video is not None
    clip = media.read_clip(asked.video, count)
    return clip.frames, clip.fps


def _chunk(asked: int | None, robot: Embodiment, profiles: Sequence[ProfileRecord], temporal: int) -> int:
    """Actions in the request: as asked, as the embodiment has them, or as a profile of the bundle does."""
    if asked is None:
        spans = [profile.dims["frames"] for profile in profiles]
        latents = robot.chunk // temporal + 1
        return robot.chunk if any(s.min <= latents <= s.max for s in spans) else (spans[0].opt - 1) * temporal
    if asked < 1 or asked % temporal:
        low = max(asked // temporal * temporal, temporal)
        raise UserError(
            "CX609", f"a chunk of {asked} actions is {asked + 1} frames; allowed are {temporal}·n + 1",
            f"--chunk {low} or {low + temporal}",
        )  # fmt: skip
    return asked


def _action_width(asked: Asked, robot: Embodiment, given: embodiments.Actions | None, most: int) -> int:
    width = asked.action_width or robot.width or (None if given is None else given.shape[1])
    if width is None:
        raise UserError("CX611", f"actions of `{robot.name}` have no fixed width", "say it with --action-width")
    if not 1 <= width <= most:
        raise UserError("CX611", f"actions of {width} columns; the model has 1 to {most}")
    if given is not None and given.shape[1] != width:
        raise UserError(
            "CX611", f"{asked.actions} has {given.shape[1]} columns; actions of `{robot.name}` have {width}",
            "is it the right --embodiment?",
        )  # fmt: skip
    return width


def _lasting(frames: NDArray[Any], count: int) -> NDArray[Any]:
    """``frames``, the last repeated until there are ``count``."""
    missing = max(count - len(frames), 0)
    return np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])


def _rate_note(found: float | None, fps: float, path: Path) -> tuple[str, ...]:
    if found is None or abs(found - fps) < 0.01 * fps:
        return ()
    return (f"{path} has {found:g} frames a second and is taken as {fps:g} (--fps)",)


def _latents(name: str, pixels: int | None, spatial: int) -> int | None:
    if pixels is None:
        return None
    if pixels < 1 or pixels % spatial:
        low = max(pixels // spatial, 1) * spatial
        raise UserError("CX608", f"{name} {pixels} is not a multiple of {spatial}", f"use {low} or {low + spatial}")
    return pixels // spatial


def _latent_frames(pixels: int | None, temporal: int) -> int | None:
    if pixels is None:
        return None
    if pixels < 1 or (pixels - 1) % temporal:
        low = max((pixels - 1) // temporal, 0) * temporal + 1
        raise UserError("CX609", f"{pixels} frames are not {temporal}·n + 1", f"use {low} or {low + temporal}")
    return (pixels - 1) // temporal + 1


def _image_hint(mode: Mode) -> str:
    return "one frame is mode t2i" if mode == "t2v" else ""


def _sound_len(scene: Scene, record: RequestRecord) -> int:
    assert record.sound is not None
    samples = int(scene.frames / scene.fps * record.sound.sampling_rate)
    return -(-samples // record.sound.hop)


# -- profiles ---------------------------------------------------------------------------------------------------------


def _profile(
    profiles: Sequence[ProfileRecord],
    dims: Mapping[str, int | Sequence[int]],
    record: RequestRecord,
    least: Mapping[str, int] | None = None,
) -> ProfileRecord:
    """The first profile in which every value of ``dims`` is allowed, and that reaches ``least``; or CX607."""
    values = {name: [value] if isinstance(value, int) else list(value) for name, value in dims.items()}
    reached = least or {}
    misfits: list[str] = []
    concerned: dict[str, int] = {}
    hint = ""
    for profile in profiles:
        wrong = [name for name, found in values.items() if not all(_within(profile.dims[name], v) for v in found)]
        wrong += [name for name, value in reached.items() if name not in wrong and profile.dims[name].max < value]
        if not wrong:
            return profile
        misfits.append(f"`{profile.name}` takes " + ", ".join(_allowed(n, profile.dims[n], record) for n in wrong))
        concerned |= {name: max(values.get(name, [reached.get(name, 0)])) for name in wrong}
        hint = hint or _hint(wrong[0], concerned[wrong[0]], profile.dims[wrong[0]])
    wanted = ", ".join(_said(name, str(_size(name, value, record))) for name, value in concerned.items())
    raise UserError("CX607", f"no profile of this bundle takes {wanted}: {'; '.join(misfits)}", hint)


def _within(span: DimRecord, value: int) -> bool:
    return span.min <= value <= span.max


_UNITS = {"und_len": "prompt tokens", "sound_len": "sound latents", "action_len": "actions"}


def _size(name: str, value: int, record: RequestRecord) -> int:
    """A dimension in the user's terms: pixels, pixel frames, or a count."""
    if name in _UNITS:
        return value
    return (value - 1) * record.video.temporal + 1 if name == "frames" else value * record.video.spatial


def _said(name: str, value: str) -> str:
    return f"{value} {_UNITS[name]}" if name in _UNITS else f"{name} {value}"


def _allowed(name: str, span: DimRecord, record: RequestRecord) -> str:
    low, high = (_size(name, value, record) for value in (span.min, span.max))
    return _said(name, str(low) if low == high else f"{low} to {high}")


def _hint(name: str, found: int, span: DimRecord) -> str:
    if name == "sound_len":
        if not found:
            return "this profile has sound: add --sound"
        return "fewer --frames" if span.max else "build a profile with sound, as 480p-121f+sound"
    if name == "action_len" and not found:
        return "this profile is for actions: --mode policy, forward-dynamics or inverse-dynamics"
    if name == "und_len":
        return f"shorten the prompt, or build with a longer range, as `480p,und_len=1:512:{2 * span.max}`"
    return "leave the size to the profile, or build one for this size"


# -- prompts and noise ------------------------------------------------------------------------------------------------


def _tokenized(
    asked: Asked, stage: _Stage, manifest: Manifest, record: RequestRecord, bundle: Path, *, guided: bool
) -> tuple[TokenIds, TokenIds | None]:
    """Ids of the prompt and, where it is read, of the negative prompt."""
    if record.prompt is None:
        raise UnsupportedError("CX605", "this bundle has no tokenizer", "build it from a checkpoint that has one")
    prompt, negative = read_prompt(asked.prompt), read_prompt(asked.negative or "", "negative prompt")
    texts = [prompt.text, negative.text]
    if stage.mode in _ACTION_MODES:
        if not prompt.caption:
            texts[0] = action_caption(prompt.text, stage.scene, asked.viewpoint or DEFAULT_VIEWPOINT)
        elif asked.viewpoint is not None:
            raise UserError("CX604", "--viewpoint with a JSON caption", "the caption says it in cinematography.framing")
    elif asked.metadata or (asked.metadata is None and not prompt.caption):
        texts = [with_metadata(text, stage.scene, negative=i == 1) for i, text in enumerate(texts)]
    with_system = record.prompt.use_system if asked.system is None else asked.system
    system = system_message(stage.scene) if with_system else None
    tokenizer = PromptTokenizer(record.prompt, _verified(bundle, record.prompt.tokenizer, manifest))
    return tokenizer(texts[0], system), tokenizer(texts[1], system) if guided else None


def _verified(bundle: Path, name: str, manifest: Manifest) -> Path:
    """The file ``name`` of ``bundle``, which is what the manifest says; the bundle as a whole is verified later."""
    path = bundle / name
    listed = next((record.sha256 for record in manifest.files if record.path == name), None)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            "CX603", f"cannot read {path}: {error.strerror or error}", "the bundle is incomplete"
        ) from error
    if found != listed:
        raise UserError(
            "CX603", f"{path} is not the file the manifest lists", f"`cosmos-export bundle verify {bundle}` says more"
        )
    return path


def noise_shapes(request_dims: Mapping[str, int], record: RequestRecord, mode: Mode) -> dict[str, tuple[int, ...]]:
    """Shape of the initial noise of each modality that a request of ``mode`` generates."""
    frames, height, width = (request_dims[name] for name in ("frames", "height", "width"))
    shapes: dict[str, tuple[int, ...]] = {"vision": (1, record.video.channels, frames, height, width)}
    if record.sound is not None:
        shapes["sound"] = (record.sound.channels, request_dims["sound_len"])
    if record.action is not None:
        shapes["action"] = (request_dims["action_len"], record.action.dim)
    generated = {*_GENERATED[mode], *(["sound"] if request_dims["sound_len"] else [])}
    return {name: shape for name, shape in shapes.items() if name in generated}


def _read_noise(path: Path, stage: _Stage, schedule: Schedule, record: RequestRecord) -> dict[str, NDArray[np.float32]]:
    """float32 arrays of ``path`` by name, each of the shape the request has and finite; or CX617."""
    expected = noise_shapes(stage.dims, record, stage.mode)
    if schedule.sampler == "distilled-sde":
        expected |= {f"{name}_steps": (schedule.steps, *shape) for name, shape in expected.items()}
    try:
        tensors = read_header(path).tensors
    except UserError as error:
        raise UserError("CX617", f"noise: {error.message}", "it is a .safetensors file") from error
    noise: dict[str, NDArray[np.float32]] = {}
    for name, entry in tensors.items():
        known = ", ".join(f"{n} {list(s)}" for n, s in expected.items())
        if expected.get(name) != entry.shape or entry.dtype not in ("F64", "F32", "F16", "BF16"):
            found = f"`{name}` {entry.dtype} {list(entry.shape)}"
            raise UserError("CX617", f"noise in {path}: {found}; this request takes {known}", "floating-point numbers")
        noise[name] = np.asarray(entry.array(), dtype=np.float32)
        if not np.isfinite(noise[name]).all():
            raise UserError("CX617", f"noise in {path}: `{name}` holds NaN or infinite values")
    if not noise:
        raise UserError("CX617", f"noise in {path}: no tensor in it")
    return noise
