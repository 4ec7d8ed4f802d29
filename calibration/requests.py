"""Items of data as requests in the model's own terms: the front end of `run`, with whole clips in place of frames.

Everything that can be wrong with the data is found here, before a weight is read: clips are opened and counted, prompts
are tokenized and measured against the shape profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle import ProfileRecord, RequestRecord
from cosmos_export.bundle.embodiment import PLAIN_VIEWS, Embodiment, Views, require_width
from cosmos_export.calibration.items import ClipPart, Item
from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.embodiments import embodiment
from cosmos_export.runtime import read_media
from cosmos_export.runtime.conversion import Conversion
from cosmos_export.runtime.embodiments import units_warning
from cosmos_export.runtime.fitting import fit_profile
from cosmos_export.runtime.prompts import DEFAULT_VIEWPOINT, Prompt, Scene, request_texts, system_message
from cosmos_export.runtime.request import ActionPart, Request
from cosmos_export.runtime.step_inputs import sound_latents
from cosmos_export.runtime.tokenize import PromptTokenizer
from cosmos_export.runtime.views import compose
from cosmos_export.sampling import DEFAULT_MODE, MODES, CheckpointSampling, Mode, Overrides, resolve_schedule
from cosmos_export.sampling.action_canvas import ACTION_BINS, ActionCanvas, plan_action_canvas
from cosmos_export.sampling.modes import IMAGE_MODE, Clue, PromptForm, modes_shown_by

Latents = Literal["encoded", "borrowed", "recorded", "rollout", "noise"]
"""Where clean latents come from: the item's own clip, another item's, a file, the model itself; ``noise``: nowhere."""

_RATE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Setting:
    """Settings that all requests of a calibration share."""

    record: RequestRecord
    profile: ProfileRecord
    sampling: CheckpointSampling
    overrides: Overrides
    modalities: tuple[str, ...]
    height: int
    width: int
    """Pixels of videos and images."""
    frames: int
    negative: Prompt
    latents: Literal["auto", "rollout", "noise"] = "auto"
    hears: bool = False
    """The checkpoint turns sound into latents."""
    policy: Embodiment | None = None
    """The embodiment of a policy checkpoint."""


@dataclass(frozen=True)
class CalibrationRequest:
    """One request, and where its clean latents come from."""

    name: str
    source: int
    request: Request
    latents: Latents
    clip: ClipPart | None = None
    cameras: tuple[ClipPart, ...] = ()
    """Clips of further cameras, composed with ``clip`` as ``views`` say."""
    views: Views = PLAIN_VIEWS
    image: Path | None = None
    canvas: ActionCanvas | None = None
    file: Path | None = None
    given: NDArray[np.float32] | None = field(default=None, repr=False)
    """Actions [rows, width] in the model's units, where the request itself does not hold them."""
    notes: tuple[str, ...] = ()
    """Properties of its clip or picture that are read otherwise than they are shown."""


def make_requests(
    sources: Sequence[Sequence[Item]], setting: Setting, tokenizer: PromptTokenizer, use_system: bool
) -> list[CalibrationRequest]:
    """A request for each item, and for each of the three modes that actions can be read in.

    CX343: a clip at another rate than is said; CX344: a clip too short, or latents of another model; CX346: a prompt
    without a clip, and nothing that makes latents for it; CX607: a prompt or a clip outside the profile; CX614: media.
    """
    items = [(number, item) for number, source in enumerate(sources) for item in source]
    lenders = [item for _, item in items if item.clip is not None and item.actions is None]
    works: list[CalibrationRequest] = []
    for index, (number, item) in enumerate(items):
        for mode in _modes(item, index, setting):
            lender = lenders[index % len(lenders)] if lenders else None
            works.append(_work(item, MODES[mode], number, lender, setting, tokenizer, use_system))
    return works


def _modes(item: Item, index: int, setting: Setting) -> tuple[str, ...]:
    if item.mode is not None:
        return (item.mode,)
    if item.actions is not None:
        return modes_shown_by(Clue.ACTIONS)
    if item.clip is not None or item.image is not None:
        turns = modes_shown_by(Clue.PICTURE if item.clip is None else Clue.CLIP)
        return (turns[index % len(turns)],)
    if setting.profile.dims["frames"].max == 1:
        return (IMAGE_MODE,)
    if item.latents is not None and _recorded(item, setting)["vision"].shape[2] == 1:
        return (IMAGE_MODE,)
    return (DEFAULT_MODE,)


def _work(
    item: Item,
    mode: Mode,
    source: int,
    lender: Item | None,
    setting: Setting,
    tokenizer: PromptTokenizer,
    use_system: bool,
) -> CalibrationRequest:
    schedule = resolve_schedule(setting.sampling, mode.name, _overrides(setting.overrides, mode))
    base = Request(mode.name, _NO_IDS, None, schedule, 1, 1, 1, setting.record.video.base_fps)
    work = CalibrationRequest(f"{item.name} ({mode})", source, base, "encoded")
    if mode.acts:
        work, scene = _action(item, work, setting)
    elif item.latents is not None:
        work, scene = _from_file(item, work, setting)
    else:
        work, scene = _video(item, work, lender, setting)
    request = work.request
    texts = request_texts(
        item.prompt,
        item.negative or setting.negative,
        scene,
        action=work.views.viewpoint or DEFAULT_VIEWPOINT if mode.prompt is PromptForm.TASK else None,
    )
    system = system_message(scene) if use_system else None
    guided = any(schedule.guided)
    ids, negative = tokenizer(texts[0], system), tokenizer(texts[1], system) if guided else None
    lengths = [len(ids)] + ([len(negative)] if negative is not None else [])
    frames = (request.frames - 1) // setting.record.video.temporal + 1
    sound = sound_latents(request.frames, request.fps, setting.record) if request.sound else 0
    dims: dict[str, int | Sequence[int]] = {
        "und_len": lengths, "frames": frames, "height": request.height, "width": request.width, "sound_len": sound,
        "action_len": request.action.rows if request.action else 0,
    }  # fmt: skip
    try:
        fit_profile([setting.profile], dims, setting.record, refusal=f"{item.name}: the profile does not take")
    except UserError as error:
        raise UserError(
            error.code, error.message, "leave the item out, or --profile with the range you will run"
        ) from error
    return replace(work, request=replace(request, input_ids=ids, negative_ids=negative))


_NO_IDS = np.zeros(0, np.int64)


def _overrides(asked: Overrides, mode: Mode) -> Overrides:
    """An interval is for requests that are guided; an action usually is not."""
    return replace(asked, guidance_interval=None) if mode.acts and asked.guidance is None else asked


# -- videos and images ------------------------------------------------------------------------------------------------


def _video(
    item: Item, work: CalibrationRequest, lender: Item | None, setting: Setting
) -> tuple[CalibrationRequest, Scene]:
    mode, video = MODES[work.request.mode], setting.record.video
    clip, image, latents = item.clip, item.image, work.latents
    fps = item.fps
    if clip is None and image is None:
        latents = _made(item, lender, setting)
        if latents == "borrowed":
            assert lender is not None
            clip = lender.clip
    frames = 1 if mode.single else item.frames or setting.frames
    notes: tuple[str, ...] = ()
    if clip is not None and not mode.single:
        found = read_media.read_clip(clip.path, min(frames, clip.count or frames), skip=clip.skip, each=_corner)
        notes = found.notes
        frames = (len(found.frames) - 1) // video.temporal * video.temporal + 1
        if latents == "encoded":
            fps = _rate(item, clip, found.fps, fps)
    elif clip is not None:
        notes = read_media.read_clip(clip.path, 1, skip=clip.skip).notes
    elif image is not None:
        notes = read_media.read_picture(image).notes
    least = (mode.least_frames - 1) * video.temporal + 1
    if frames < least:
        raise UserError(
            "CX344", f"{item.name}: {frames} frames; mode {mode} needs {least}", f"a longer clip, or mode={IMAGE_MODE}"
        )
    height, width = setting.height // video.spatial, setting.width // video.spatial
    sounding = "sound" in setting.modalities and not mode.single
    sound = sounding and (latents == "rollout" or (clip is not None and _heard(clip, setting)))
    request = replace(
        work.request,
        frames=frames,
        height=height,
        width=width,
        fps=fps or video.base_fps,
        clean_frames=_clean(mode, (frames - 1) // video.temporal + 1),
        sound=sound,
    )
    scene = Scene(frames, setting.height, setting.width, request.fps)
    return replace(work, request=request, latents=latents, clip=clip, image=image, notes=notes), scene


def _corner(frame: read_media.Frames) -> read_media.Frames:
    """Reduce a frame that is only counted to one pixel."""
    return frame[:, :1, :1].copy()


def _heard(clip: ClipPart, setting: Setting) -> bool:
    """Whether the sound of ``clip`` is part of what the model is shown."""
    wanted = setting.hears and setting.profile.dims["sound_len"].max > 0
    return wanted and read_media.has_sound(clip.path)


def _clean(mode: Mode, latent_frames: int) -> tuple[int, ...]:
    return tuple(range(mode.given_frames(latent_frames)))


def _made(item: Item, lender: Item | None, setting: Setting) -> Latents:
    """Where latents for a prompt without a picture come from."""
    if item.mode is not None and MODES[item.mode].sources:
        raise UserError("CX346", f"{item.name}: mode {item.mode} without a clip", "leave the mode out, or add a clip")
    if setting.latents == "rollout":
        return "rollout"
    if lender is not None:
        return "borrowed"
    if setting.latents == "noise":
        return "noise"
    raise UserError(
        "CX346",
        f"{item.name} is a prompt without a clip, and no source has clips to make latents from",
        "add --data with a folder of clips, or --latents rollout (the model makes its own; small models), or as a last "
        "resort --latents noise",
    )


def _rate(item: Item, clip: ClipPart, found: float | None, asked: float | None) -> float | None:
    """The rate of a clip; CX343 where the file and the data set, or the options, say different things."""
    said = clip.fps if clip.fps is not None else asked
    if found is not None and said is not None and abs(found - said) > _RATE_TOLERANCE * said:
        raise UserError(
            "CX343",
            f"{item.name}: {clip.path.name} has {found:g} frames a second; {said:g} are said",
            "the rate decides the model's positions: convert the clip, or correct fps",
        )
    return said if said is not None else found


# -- actions ----------------------------------------------------------------------------------------------------------


def _action(item: Item, work: CalibrationRequest, setting: Setting) -> tuple[CalibrationRequest, Scene]:
    """An embodiment's actions and the clip they go with, on the canvas of the published pipeline."""
    record, video = setting.record, setting.record.video
    if record.action is None:
        raise UserError("CX345", f"{item.name} has actions; this checkpoint generates none", "leave the source out")
    if item.actions is None or item.clip is None:
        what = "actions" if item.actions is None else "a clip"
        raise UserError(
            "CX346", f"{item.name}: mode {work.request.mode} without {what}", "…,video=CLIP.mp4 beside them"
        )
    mode = MODES[work.request.mode]
    robot = embodiment(item.embodiment, setting.policy)
    rows = min(len(item.actions), robot.chunk) // video.temporal * video.temporal
    if not rows:
        raise UserError("CX344", f"{item.name}: {len(item.actions)} actions; at least {video.temporal}")
    columns = item.actions.shape[1]
    if robot.domain >= record.action.domains:
        what = f"{item.name}: embodiment `{robot.name}` is domain {robot.domain}; the model has {record.action.domains}"
        raise UserError("CX610", what, "leave the source out")
    if columns > record.action.dim:
        raise UserError("CX611", f"{item.name}: actions of {columns} columns; the model has 1 to {record.action.dim}")
    require_width(item.name, robot, columns)
    shown = replace(work, clip=item.clip, cameras=item.cameras, views=robot.views)
    clip = read_frames(shown, rows + 1)
    if len(clip.frames) <= rows:
        raise UserError("CX344", f"{item.name}: {len(clip.frames)} frames for {rows} actions; one more than actions")
    said = item.fps if item.fps is not None else item.clip.fps
    fps = _rate(item, item.clip, clip.fps, said if said is not None else robot.fps) or robot.fps
    height, width = clip.frames.shape[1:3]
    plan = _plan(robot, height, width, setting)
    conversion = Conversion(robot.mirrored if columns == robot.width else ())
    given = conversion.to_model(item.actions[:rows])
    doubt = units_warning(given, robot.poses) if robot.normalization != "none" else ""
    notes = (*clip.notes, *((f"actions taken as the model's own numbers, but {doubt}",) if doubt else ()))
    state = _state(item, robot, conversion) if mode.state else None
    history = 0 if state is None else len(state)
    latent_frames = rows // video.temporal + 1
    known = given if mode.clean_actions == "all" else state
    part = ActionPart(rows + history, robot.domain, columns, known, 1 - history)
    request = replace(
        work.request,
        frames=rows + 1,
        height=max(plan.content_height // video.spatial, 1),
        width=max(plan.content_width // video.spatial, 1),
        fps=fps,
        clean_frames=_clean(mode, latent_frames),
        action=part,
    )
    scene = Scene(rows + 1, plan.height, plan.width, fps)
    rows_given = given if state is None else np.concatenate([state, given])
    return replace(shown, request=request, canvas=plan, given=rows_given, notes=notes), scene


def _state(item: Item, robot: Embodiment, conversion: Conversion) -> NDArray[np.float32] | None:
    """float32 [rows, width] of where ``robot`` is, as the model takes it; None where its policy is not given it."""
    if not robot.history:
        return None
    if item.state is None or len(item.state) != robot.history:
        raise UnsupportedError(
            "CX605",
            f"{item.name}: a policy for `{robot.name}` is given the robot's state as the first row of its actions, and "
            "this data has none: its ranges would be those of other inputs",
            "a LeRobot data set has it; or show the data with mode=forward-dynamics or mode=inverse-dynamics alone",
        )
    return conversion.to_model(item.state)


def read_frames(work: CalibrationRequest, count: int) -> read_media.Clip:
    """The first ``count`` frames of a robot's clip, in the one picture that its views make of several cameras."""
    assert work.clip is not None
    first, *others = (read_media.read_clip(part.path, count, skip=part.skip) for part in (work.clip, *work.cameras))
    views = work.views
    if not others and not views.size:
        return first
    names = (views.whole,) if not others else views.cameras
    clips = [first, *others]
    length = min(len(clip.frames) for clip in clips)
    frames = [
        compose(views, dict(zip(names, (np.asarray(clip.frames[i]) for clip in clips), strict=True)))
        for i in range(length)
    ]
    return replace(first, frames=np.stack(frames), notes=tuple(note for clip in clips for note in clip.notes))


def _plan(robot: Embodiment, height: int, width: int, setting: Setting) -> ActionCanvas:
    """The canvas of a robot's picture: in the largest tier up to its own whose canvases the profile takes; where
    that is too small for the profile, in the largest that fits this picture."""
    video, dims = setting.record.video, setting.profile.dims
    reach = min(dims["height"].max, dims["width"].max) * video.spatial
    tiers = [tier for tier in ACTION_BINS if tier <= robot.tier]
    usual = [tier for tier in tiers if min(max(one) for one in ACTION_BINS[tier]) <= reach]
    order = [max(usual, default=min(ACTION_BINS)), *sorted(tiers, reverse=True)]
    whole = (height, width) == robot.views.size
    plans = [plan_action_canvas(height, width, tier, video.spatial, whole=whole) for tier in order]

    def fits(plan: ActionCanvas) -> bool:
        sizes = {"height": plan.content_height, "width": plan.content_width}
        return all(dims[n].min <= max(size // video.spatial, 1) <= dims[n].max for n, size in sizes.items())

    return next((plan for plan in plans if fits(plan)), plans[0])


# -- recorded latents -------------------------------------------------------------------------------------------------


def _from_file(item: Item, work: CalibrationRequest, setting: Setting) -> tuple[CalibrationRequest, Scene]:
    latents = _recorded(item, setting)
    video = setting.record.video
    _, _, frames, height, width = latents["vision"].shape
    pixel_frames = (frames - 1) * video.temporal + 1
    fps = item.fps or video.base_fps
    sound = "sound" in latents
    if sound and setting.record.sound is not None:
        expected = sound_latents(pixel_frames, fps, setting.record)
        if latents["sound"].shape[1] != expected:
            _misfit(item, f"`sound` has {latents['sound'].shape[1]} latents; {pixel_frames} frames have {expected}")
    request = replace(
        work.request,
        frames=pixel_frames,
        height=height,
        width=width,
        fps=fps,
        sound=sound,
        clean_frames=_clean(MODES[work.request.mode], frames),
    )
    scene = Scene(pixel_frames, height * video.spatial, width * video.spatial, fps)
    return replace(work, request=request, latents="recorded", file=item.latents), scene


def _recorded(item: Item, setting: Setting) -> dict[str, NDArray[np.float32]]:
    assert item.latents is not None
    return read_latents(item.latents, setting.record, item.name)


def read_latents(path: Path, record: RequestRecord, name: str) -> dict[str, NDArray[np.float32]]:
    """float32 ``vision`` [1, C, T, h, w] and perhaps ``sound`` [C, T_s] of ``path``; CX344 for anything else."""
    try:
        tensors = read_header(path).tensors
    except UserError as error:
        raise UserError("CX344", f"{name}: {error.message}", "record them with `run --save-latents`") from error
    if "vision" not in tensors:
        _refuse_latents(name, f"tensors {', '.join(list(tensors)[:8]) or 'none'}; `vision` is missing")
    found: dict[str, NDArray[np.float32]] = {}
    for key in ("vision", "sound"):
        entry = tensors.get(key)
        if entry is None or (key == "sound" and record.sound is None):
            continue
        rank, channels = (5, record.video.channels) if key == "vision" else (2, record.sound and record.sound.channels)
        if entry.dtype not in ("F64", "F32", "F16", "BF16") or len(entry.shape) != rank or 0 in entry.shape:
            _refuse_latents(name, f"`{key}` is {entry.dtype} {list(entry.shape)}")
        if entry.shape[rank == 5] != channels:
            _refuse_latents(name, f"`{key}` has {entry.shape[rank == 5]} channels; the model has {channels}")
        found[key] = np.asarray(entry.array(), dtype=np.float32)
        if not np.isfinite(found[key]).all():
            _refuse_latents(name, f"`{key}` holds NaN or infinite values")
    return found


def _refuse_latents(name: str, what: str) -> NoReturn:
    raise UserError("CX344", f"{name}: {what}", "record them with `run --save-latents`")


def _misfit(item: Item, what: str, hint: str = "is fps= what they were made at?") -> NoReturn:
    raise UserError("CX344", f"{item.name}: {what}", hint)
