"""Sizes, frames and actions of a request: as given, or from a profile, the embodiment and what the files hold.

What is given is put on its canvas as the published pipeline does it, and no more of it than the clean latents need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle import Manifest, ProfileRecord, RequestRecord
from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.diagnostics import UserError
from cosmos_export.options import GenerateOptions, Picture
from cosmos_export.runtime import canvas, embodiments, read_media
from cosmos_export.runtime.conversion import UNCHANGED, Conversion, read_state
from cosmos_export.runtime.embodiments import Beyond, units_warning
from cosmos_export.runtime.fitting import fit_profile
from cosmos_export.runtime.prompts import Scene
from cosmos_export.runtime.request import ActionPart
from cosmos_export.runtime.step_inputs import sound_latents
from cosmos_export.runtime.views import bilinear, compose
from cosmos_export.sampling import DEFAULT_MODE, Mode
from cosmos_export.sampling.action_canvas import plan_action_canvas
from cosmos_export.sampling.modes import IMAGE_MODE


@dataclass(frozen=True)
class Stage:
    """A request without its prompt and its noise."""

    mode: Mode
    scene: Scene
    dims: Mapping[str, int]
    """Every dimension of a profile but the prompt's length."""
    clean_frames: tuple[int, ...] = ()
    pixels: NDArray[np.float32] | None = None
    action: ActionPart | None = None
    embodiment: Embodiment | None = None
    conversion: Conversion = UNCHANGED
    state: NDArray[np.float32] | None = None
    beyond: Beyond | None = None
    notes: tuple[str, ...] = ()


def video_stage(asked: GenerateOptions, manifest: Manifest, record: RequestRecord, mode: Mode) -> Stage:
    """Sizes as given or from a profile, and the frames a clip starts with."""
    video = record.video
    given = {
        "height": _latents("height", asked.height, video.spatial),
        "width": _latents("width", asked.width, video.spatial),
        "frames": 1 if mode.single else _latent_frames(asked.frames, video.temporal),
    }
    if mode.single and asked.frames not in (None, 1):
        raise UserError(
            "CX609", f"{asked.frames} frames; an image (mode {mode}) is 1", f"use mode {DEFAULT_MODE} for a clip"
        )
    least = mode.least_frames
    if given["frames"] is not None and given["frames"] < least:
        first = (least - 1) * video.temporal + 1
        raise UserError("CX609", f"{asked.frames} frames; mode {mode} generates from {first}", _image_hint(mode))
    known = {name: [value] for name, value in given.items() if value is not None}
    profile = _sizes_from(asked, manifest, record, known, {"frames": least})
    dims = {name: value if value is not None else profile.dims[name].opt for name, value in given.items()}
    dims["frames"] = max(dims["frames"], least)
    fps = video.base_fps if asked.fps is None else float(asked.fps)
    scene = Scene(
        (dims["frames"] - 1) * video.temporal + 1, dims["height"] * video.spatial, dims["width"] * video.spatial, fps
    )
    dims |= {"sound_len": sound_latents(scene.frames, scene.fps, record) if asked.sound else 0, "action_len": 0}
    fit_profile(manifest.profiles, dims, record)  # before a file is read
    stage = Stage(mode, scene, dims)
    clean = mode.given_frames(dims["frames"])
    if not clean:
        return stage
    clip = _given_clip(asked, mode, (clean - 1) * video.temporal + 1, scene)
    notes = (*clip.notes, *(_rate_note(clip.fps, fps, asked.video) if asked.video is not None else ()))
    return replace(stage, clean_frames=tuple(range(clean)), pixels=clip.frames[None], notes=notes)


def _given_clip(asked: GenerateOptions, mode: Mode, count: int, scene: Scene) -> read_media.Clip:
    """The first or last ``count`` frames of the request's file on its canvas: float32 [3, count, height, width]."""
    keep = canvas.keeping(mode.fit, scene.height, scene.width)
    if asked.image is not None:
        picture = read_media.read_picture(_one(asked.image))
        clip = replace(picture, frames=keep(picture.frames))
    else:
        assert asked.video is not None
        clip = read_media.read_clip(asked.video, count, last=asked.keep == "last", each=keep)
    notes, found = clip.notes, len(clip.frames)
    if asked.video is not None and found < count:
        what = "is a still picture" if found == 1 else f"has {found} frames"
        notes = (*notes, f"{asked.video} {what}; {mode} continues {count} frames: the last one is repeated")
    frames = canvas.placed(_lasting(clip.frames, count), mode.fit, scene.height, scene.width)
    return replace(clip, frames=frames, notes=notes)


def _sizes_from(
    asked: GenerateOptions,
    manifest: Manifest,
    record: RequestRecord,
    known: Mapping[str, Sequence[int]],
    least: Mapping[str, int],
) -> ProfileRecord:
    """The profile whose sizes a video has where it says none: the first for what is asked, with sound or without."""
    meant = [
        profile
        for profile in manifest.profiles
        if (profile.dims["sound_len"].max > 0 if asked.sound else profile.dims["sound_len"].min == 0)
        and profile.dims["action_len"].min == 0
    ]
    try:
        return fit_profile(meant or manifest.profiles, known, record, least=least)
    except UserError:
        return fit_profile(manifest.profiles, known, record, least=least)  # its message speaks of all of them


def action_stage(asked: GenerateOptions, manifest: Manifest, record: RequestRecord, mode: Mode) -> Stage:
    """An embodiment's actions, and the canvas of its picture or clip."""
    assert record.action is not None
    robot = embodiments.robot_of(asked.embodiment, record)
    video, fps = record.video, robot.fps if asked.fps is None else float(asked.fps)
    chunk = _chunk(asked.chunk, robot, manifest.profiles, video.temporal)
    history = robot.history if mode.state else 0
    latent_frames = chunk // video.temporal + 1
    lengths = {"frames": latent_frames, "sound_len": 0, "action_len": chunk + history}
    fit_profile(manifest.profiles, lengths, record)  # before so many rows or frames are made
    raw = None
    if asked.actions is not None:
        file = embodiments.read_actions(asked.actions)
        file.require(robot, asked.action_stats is not None)
        raw = file.values
    width = _action_width(asked, robot, raw, record.action.dim)
    conversion = _conversion(asked, robot, width)
    notes: list[str] = []
    beyond = None
    state = _state(asked, robot, history, width)
    given = None if state is None else conversion.to_model(state)
    if mode.state and not history and record.policy is not None and record.policy.state is None:
        notes.append("the checkpoint does not say whether its policy is given the robot's state (use_state): none is")
    if raw is not None:
        used = raw[:chunk]
        found = conversion.beyond(used)
        beyond = None if found is None else replace(found, clamped=asked.action_clamp)
        notes += () if beyond is None else _beyond_note(beyond, asked.actions)
        given = _lasting(conversion.to_model(used, asked.action_clamp), chunk)
        if conversion.scale is None and robot.normalization is None and (doubt := units_warning(given, robot.poses)):
            notes.append(
                f"{asked.actions} is taken as the model's own numbers, but {doubt}: --action-stats scales them"
            )
        if len(raw) != chunk:
            verb = "the last is repeated" if len(raw) < chunk else "the rest is left out"
            notes.append(f"{asked.actions} has {len(raw)} actions for {chunk}: {verb}")
    clean = mode.given_frames(latent_frames)
    count = (clean - 1) * video.temporal + 1
    clip = _seen(asked, robot, count)
    frames = clip.frames
    notes += clip.notes
    tier, whole = robot.tier if asked.tier is None else asked.tier, bool(robot.views.size)
    plan = plan_action_canvas(frames.shape[1], frames.shape[2], tier, video.spatial, whole=whole)
    if count > 1:
        if len(frames) < count:
            notes.append(f"{asked.video} has {len(frames)} frames for {count}: the last is repeated")
        frames = _lasting(frames, count)
        notes += _rate_note(clip.fps, fps, asked.video)
    dims = {
        **lengths,
        "height": max(plan.content_height // video.spatial, 1),
        "width": max(plan.content_width // video.spatial, 1),
    }
    fit_profile(manifest.profiles, dims, record, hint=_size_hint(asked, robot))
    return Stage(
        mode,
        Scene(chunk + 1, plan.height, plan.width, fps),
        dims,
        clean_frames=tuple(range(clean)),
        pixels=canvas.action_canvas(frames, plan)[None],
        action=ActionPart(chunk + history, robot.domain, width, given, 1 - history),
        embodiment=robot,
        conversion=conversion,
        state=None if state is None else state[-1],
        beyond=beyond,
        notes=tuple(notes),
    )


def _conversion(asked: GenerateOptions, robot: Embodiment, width: int) -> Conversion:
    """Between the robot's numbers and the model's, for actions of ``width`` columns."""
    mirrored = robot.mirrored if width == robot.width else ()
    if asked.action_stats is None:
        return Conversion(mirrored)
    scale = embodiments.read_scale(asked.action_stats, width, asked.action_normalization)
    if asked.action_clamp and not scale.bounded:
        raise UserError("CX604", "--action-clamp with a mean and a deviation, which are no bounds", "leave it out")
    return Conversion(mirrored, scale)


def _state(asked: GenerateOptions, robot: Embodiment, history: int, width: int) -> embodiments.Actions | None:
    """The rows of the state in the robot's numbers, float32 [history, width]; None where a policy is given none."""
    if not history:
        if asked.state is not None:
            raise UserError("CX619", f"a policy for `{robot.name}` that is given no state", "leave --state out")
        return None
    if asked.state is None:
        parts = ", ".join(f"`{part.name}` ({part.columns})" for part in robot.parts)
        raise UserError(
            "CX619",
            f"this policy for `{robot.name}` is given the robot's state, and the request has none: its actions would "
            "be wrong",
            f"--state FILE.json with {f'{parts}, or with ' if parts else ''}{width} numbers",
        )
    rows = read_state(asked.state, robot, width)
    if len(rows) < history:
        raise UserError(
            "CX619", f"the state in {asked.state}: {len(rows)} rows; this policy is given {history}",
            "the last row is where the robot is now",
        )  # fmt: skip
    return rows[-history:]


def _seen(asked: GenerateOptions, robot: Embodiment, count: int) -> read_media.Clip:
    """The picture that the robot sees, in the size that its views have: several cameras in one, or one that is composed
    already."""
    views = robot.views
    if isinstance(asked.image, Mapping):
        clips = {name: read_media.read_picture(picture) for name, picture in asked.image.items()}
        pictures = {name: np.asarray(clip.frames[0]) for name, clip in clips.items()}
        notes = tuple(note for clip in clips.values() for note in clip.notes)
        return read_media.Clip(compose(views, pictures)[None], None, notes)
    clip = _source(asked, count)
    if not views.size or clip.frames.shape[1:3] == views.size:
        return clip
    height, width = views.size
    found = f"{clip.frames.shape[2]} × {clip.frames.shape[1]}"
    names = " ".join(f"--image {name}=FILE" for name in views.short or views.cameras)
    note = (
        f"{asked.image or asked.video} has {found} pixels and is brought to {width} × {height}, as one picture of all"
    )
    frames = np.stack([bilinear(frame, height, width) for frame in clip.frames])
    return replace(clip, frames=frames, notes=(*clip.notes, f"{note} cameras; {names} puts them together"))


def _size_hint(asked: GenerateOptions, robot: Embodiment) -> str:
    """A way out of a size that follows from a picture, where none was asked for."""
    if asked.tier is not None:
        return f"leave --tier out: `{robot.name}` has {robot.tier}"
    return "the size follows from the picture: give one of the size that the profile is for, or build one for this size"


def _source(asked: GenerateOptions, count: int) -> read_media.Clip:
    if asked.image is not None:
        return read_media.read_picture(_one(asked.image))
    assert asked.video is not None
    return read_media.read_clip(asked.video, count)


def _one(image: Picture | Mapping[str, Picture]) -> Picture:
    """The picture where there is one; several have been refused, or composed, before."""
    assert not isinstance(image, Mapping)
    return image


def _chunk(asked: int | None, robot: Embodiment, profiles: Sequence[ProfileRecord], temporal: int) -> int:
    """Actions in the request: as asked, as the embodiment has them, or as a profile of the bundle does."""
    if asked is None:
        spans = [profile.dims["frames"] for profile in profiles if profile.dims["action_len"].max]
        latents = robot.chunk // temporal + 1
        if not spans or any(span.min <= latents <= span.max for span in spans):
            return robot.chunk
        return max(spans[0].opt - 1, 1) * temporal
    if asked < 1 or asked % temporal:
        low = max(asked // temporal * temporal, temporal)
        raise UserError(
            "CX609", f"a chunk of {asked} actions is {asked + 1} frames; allowed are {temporal}·n + 1",
            f"--chunk {low} or {low + temporal}",
        )  # fmt: skip
    return asked


def _action_width(asked: GenerateOptions, robot: Embodiment, given: embodiments.Actions | None, most: int) -> int:
    width = robot.width if asked.action_width is None else asked.action_width
    if width is None and given is not None:
        width = given.shape[1]
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


def _beyond_note(beyond: Beyond, path: object) -> tuple[str, ...]:
    if not beyond.count:
        return ()
    done = "cut off" if beyond.clamped else "kept, as in training (--action-clamp cuts them off)"
    values = f"{beyond.count} of {beyond.of} values, up to {beyond.most:.3g} times the distance of a bound"
    return (f"{path}: {values}, are beyond the statistics and {done}",)


def _rate_note(found: float | None, fps: float, path: object) -> tuple[str, ...]:
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
    return "" if mode.sources else f"one frame is mode {IMAGE_MODE}"
