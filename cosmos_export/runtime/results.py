"""From results to files: what each file needs is checked before any work, and every file says where it comes from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cosmos_export import files
from cosmos_export.bundle import Manifest
from cosmos_export.diagnostics import FindingError, InternalError, UnsupportedError, UserError, shown
from cosmos_export.progress import Progress, Silent
from cosmos_export.runtime import media
from cosmos_export.runtime.frontend import Prepared
from cosmos_export.runtime.generate_options import DECODER, SOUND_DECODER, has_component
from cosmos_export.runtime.limits import Limits, Review, review
from cosmos_export.runtime.media import Audio, Mark
from cosmos_export.sampling import MODES
from cosmos_export.sampling.modes import IMAGE_MODE

Array = NDArray[Any]


class Generated(Protocol):
    """The result of a generator. Video, sound and actions are made when they are called for."""

    @property
    def latents(self) -> Mapping[str, Array]:
        """``vision``, ``sound``, ``action``: what was sampled."""

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds of each stage so far."""

    def video(self) -> Iterator[Array]:
        """The frames in order, in chunks: uint8 [n, H, W, 3], or float [1, 3, n, H, W] in [−1, 1]."""

    def sound(self) -> Array:
        """float [channels, samples] in [−1, 1]."""

    def actions(self) -> Array:
        """float [rows, width] in the model's units."""


@dataclass(frozen=True)
class Outputs:
    """Files to write, by what goes into them."""

    video: tuple[Path, ...] = ()
    image: tuple[Path, ...] = ()
    sound: tuple[Path, ...] = ()
    actions: tuple[Path, ...] = ()
    """``.json`` or ``.safetensors``."""
    latents: Path | None = None
    frames: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        extra = tuple(path for path in (self.latents, self.frames) if path is not None)
        return (*self.video, *self.image, *self.sound, *self.actions, *extra)


@dataclass
class Written:
    """Files that were written, and the seconds it took."""

    files: list[Path] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    review: Review | None = None
    """The review of the actions; None where none are written."""

    def clock(self, stage: str, started: float) -> None:
        """Add the time since ``started`` to ``stage``."""
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - started


_KINDS: Mapping[str, str] = {
    ".mp4": "video", ".png": "image", ".wav": "sound", ".json": "actions", ".safetensors": "actions",
}  # fmt: skip


def plan_outputs(
    paths: Sequence[Path],
    prepared: Prepared,
    manifest: Manifest,
    *,
    latents: Path | None = None,
    frames: Path | None = None,
    force: bool = False,
) -> Outputs:
    """The result that goes into each of ``paths``, by the end of its name.

    UserError CX662 for a name without meaning, a result that the request does not have, a file that is there (without
    ``force``) or a directory that is not; UnsupportedError CX605 where the bundle cannot decode.
    """
    chosen: dict[str, tuple[Path, ...]] = {}
    for path in paths:
        kind = _KINDS.get(path.suffix.lower())
        if kind is None:
            raise UserError("CX662", f"{path}: unknown kind of output", f"names end in {', '.join(_KINDS)}")
        chosen[kind] = (*chosen.get(kind, ()), path)
    for extra, suffix in ((latents, ".safetensors"), (frames, ".npy")):
        if extra is not None and extra.suffix.lower() != suffix:
            raise UserError("CX662", f"{extra}: this file's name ends in {suffix}")
    if len(chosen.get("video", ())) > 1:
        raise UserError("CX662", f"{' and '.join(map(str, chosen['video']))}: a clip is written once", "copy the file")
    outputs = Outputs(**chosen, latents=latents, frames=frames)
    _require_results(outputs, prepared, manifest)
    _require_places(outputs.all, force)
    return outputs


def write_results(
    outputs: Outputs,
    generated: Generated,
    prepared: Prepared,
    manifest: Manifest,
    mark: Mark,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> Written:
    """Write ``outputs``. FindingError CX663 where a result is not finite, CX631 where ``limits`` reject the actions:
    nothing is written then."""
    written = Written()
    for name, latent in generated.latents.items():
        _require_finite(latent, f"{name} latents")
    sound = _sound(outputs, generated, prepared, written)
    actions = actions_of(generated, prepared) if outputs.actions else None
    if actions is not None:
        written.review = review(actions, limits, fps=prepared.request.fps, state=prepared.state)
        actions = written.review.require()
    origin = {"mode": prepared.request.mode, "seed": str(prepared.request.seed)}
    if outputs.latents is not None:
        _timed(written, outputs.latents, lambda p: media.write_safetensors(p, generated.latents, mark, **origin))
    if actions is not None:
        for path in outputs.actions:
            _timed(written, path, lambda p: _write_actions(p, actions, prepared, mark, written.review))
    rate = manifest.request.sound.sampling_rate if manifest.request and manifest.request.sound else 0
    if sound is not None:
        for path in outputs.sound:
            _timed(written, path, lambda p: media.write_wav(p, sound, rate, mark))
    if outputs.video or outputs.image or outputs.frames:
        audio = None if sound is None else Audio(sound, rate)
        _write_frames(outputs, generated, prepared, audio, mark, written, progress or Silent())
    return written


# -- what is possible -------------------------------------------------------------------------------------------------


def _require_results(outputs: Outputs, prepared: Prepared, manifest: Manifest) -> None:
    request = prepared.request
    if not outputs.all:
        raise UserError("CX662", "no output", "name one with -o, as `-o out.mp4`")
    mode = MODES[request.mode]
    pictures = "vision" in mode.generated
    present = {
        "video": pictures and request.frames > 1,
        "image": pictures and request.frames == 1,
        "sound": request.sound,
        "actions": "action" in mode.generated,
    }
    made = " and ".join(kind for kind, there in present.items() if there) or "nothing but pictures"
    for kind, there in present.items():
        for path in getattr(outputs, kind):
            if not there:
                raise UserError("CX662", f"{path}: mode {mode} makes {made}, no {kind}", _result_hint(kind, made))
    if outputs.frames is not None and not pictures:
        raise UserError("CX662", f"{outputs.frames}: mode {mode} makes {made}, no pictures")
    for wanted, name in (
        (outputs.video or outputs.image or outputs.frames, DECODER),
        (request.sound and (outputs.video or outputs.sound), SOUND_DECODER),
    ):
        if wanted and not has_component(manifest, name):
            what = "pictures" if name == DECODER else "sound"
            raise UnsupportedError(
                "CX605", f"this bundle has no decoder for {what}", "--save-latents keeps what was sampled"
            )


def _result_hint(kind: str, made: str) -> str:
    if kind == "sound":
        return "add --sound"
    if kind == "image":
        return f"for a picture: --mode {IMAGE_MODE}"
    suffixes = [suffix for suffix, meant in _KINDS.items() if meant in made.split(" and ")]
    return f"names that end in {', '.join(suffixes)}" if suffixes else ""


def _require_places(paths: Sequence[Path], force: bool) -> None:
    resolved = [_resolved(path) for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError("CX662", f"{path} is named twice")
        if not place.parent.is_dir():
            raise UserError("CX662", f"{path}: no directory {place.parent}", "create it first")
        if not os.access(place.parent, os.W_OK):
            raise UserError("CX662", f"{path}: no permission to write in {place.parent}")
        if place.exists() and not (force and place.is_file()):
            raise UserError("CX662", f"{path} exists", "choose another name" + ("" if force else ", or add --force"))


def _resolved(path: Path) -> Path:
    """Where ``path`` leads to, through links, which has a name that can be written to."""
    problem = files.output_problem(path)
    if problem is None:
        place = path.resolve()
        problem = files.output_problem(place)
    if problem is not None:
        raise UserError("CX662", f"{shown(str(path))} cannot be written: {problem}", "choose another name")
    return place


# -- writing ----------------------------------------------------------------------------------------------------------


def _sound(outputs: Outputs, generated: Generated, prepared: Prepared, written: Written) -> Array | None:
    """The waveform where a file takes it; the last latent may last longer than the pictures."""
    if not (prepared.request.sound and (outputs.video or outputs.sound)):
        return None
    started = time.perf_counter()
    sound = generated.sound()
    written.clock("decode sound", started)
    return _require_finite(sound, "sound")


def actions_of(generated: Generated, prepared: Prepared) -> Array | None:
    """float32 [rows, width], in the numbers of the robot; None where the mode makes none. FindingError CX663: they are
    not finite."""
    if "action" not in MODES[prepared.request.mode].generated:
        return None
    model = _require_finite(generated.actions(), "actions").astype(np.float32)
    return prepared.conversion.to_robot(model)


def _write_actions(path: Path, actions: Array, prepared: Prepared, mark: Mark, reviewed: Review | None) -> None:
    robot = prepared.embodiment
    assert robot is not None
    facts = {
        "mode": prepared.request.mode,
        "embodiment": robot.name,
        "domain": robot.domain,
        "fps": prepared.request.fps,
        "units": prepared.conversion.units,
        "normalization": "none" if prepared.conversion.scale is None else prepared.conversion.scale.method,
        "seed": prepared.request.seed,
        "limits": "none" if reviewed is None or reviewed.limits is None else reviewed.limits,
    }
    if path.suffix.lower() == ".json":
        media.write_json(path, {**facts, "actions": actions.astype(float).tolist()}, mark)
    else:
        media.write_safetensors(path, {"actions": actions}, mark, **{k: str(v) for k, v in facts.items()})


def _write_frames(
    outputs: Outputs,
    generated: Generated,
    prepared: Prepared,
    audio: Audio | None,
    mark: Mark,
    written: Written,
    progress: Progress,
) -> None:
    """One pass over the frames, into all files that take them; a chunk of them is in memory at a time."""
    frames, started = prepared.request.frames, time.perf_counter()
    decoding = 0.0

    def decoded() -> Iterator[Array]:
        nonlocal decoding
        chunks, done = generated.video(), 0
        progress.begin("frames", frames)
        while True:
            before = time.perf_counter()
            chunk = next(chunks, None)
            decoding += time.perf_counter() - before
            if chunk is None:
                break
            done += media.frame_count(chunk)
            progress.update("frames", done)
            yield chunk
        progress.end("frames")
        if done != frames:
            raise InternalError("CX664", f"{done} frames were decoded of {frames}")

    stream = decoded()
    if outputs.frames is not None:
        stream = _saving(outputs.frames, stream, frames)
    if outputs.video:
        media.write_mp4(outputs.video[0], map(media.as_bytes, stream), prepared.request.fps, mark, audio)
    elif outputs.image:
        (image,) = (media.as_bytes(chunk)[0] for chunk in stream)
        for path in outputs.image:
            media.write_png(path, image, mark)
    else:
        for _ in stream:
            pass
    written.files += [*outputs.video, *outputs.image, *([outputs.frames] if outputs.frames else [])]
    written.timings["decode video"] = decoding
    written.clock("write files", started + decoding)


def _saving(path: Path, chunks: Iterator[Array], frames: int) -> Iterator[Array]:
    """``chunks`` as they come, and in float32 [frames, H, W, 3] in [0, 1] into ``path`` at the same time."""
    with media.replacing(path) as partial:
        saved: Any = None
        done = 0
        for chunk in chunks:
            unit = media.as_unit(chunk)
            if saved is None:
                shape = (frames, *unit.shape[1:])
                saved = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            saved[done : done + len(unit)] = unit
            done += len(unit)
            yield chunk
        if saved is not None:
            saved.flush()


def _timed(written: Written, path: Path, write: Callable[[Path], None]) -> None:
    started = time.perf_counter()
    write(path)
    written.clock("write files", started)
    written.files.append(path)


def _require_finite(values: Array, what: str) -> Array:
    if not np.isfinite(values).all():
        raise FindingError(
            "CX663", f"the {what} hold NaN or infinite values", "`cosmos-export bundle verify`, then report it"
        )
    return values
