"""From what a user asks to what the generator runs: `prepare` makes a `Request` of `GenerateOptions`, or refuses it.

Everything that can be wrong is found here, before an engine is loaded: first what needs no file (mode, options,
schedule, sizes), then what is in the files, at last the length of the prompt. What the model sees follows the published
pipeline (diffusers, ``Cosmos3OmniPipeline``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle import BundleFiles, PromptRecord, RequestRecord
from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.in_memory import InMemory
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime.conversion import UNCHANGED, Conversion
from cosmos_export.runtime.embodiments import Beyond
from cosmos_export.runtime.fitting import fit_profile
from cosmos_export.runtime.generate_options import (
    mode_of,
    request_record,
    require_capabilities,
    require_numbers,
    require_options,
    sounds,
)
from cosmos_export.runtime.prompts import DEFAULT_VIEWPOINT, read_prompt, request_texts, system_message, text_prompt
from cosmos_export.runtime.request import Request
from cosmos_export.runtime.request_file import with_request
from cosmos_export.runtime.scenes import Stage, action_stage, video_stage
from cosmos_export.runtime.scheduling import request_schedule
from cosmos_export.runtime.tokenize import PromptTokenizer, TokenIds
from cosmos_export.sampling import Mode, Schedule
from cosmos_export.sampling.modes import PromptForm

__all__ = ["Prepared", "noise_shapes", "prepare"]


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
    conversion: Conversion = UNCHANGED
    """How actions of the model become those of the robot."""
    state: NDArray[np.float32] | None = None
    """[width]: where the robot is, in its own numbers; None where the request does not say."""
    beyond: Beyond | None = None
    """Given actions outside their statistics; None where there are not both."""
    notes: tuple[str, ...] = ()
    """Warnings about settings that a user may not have meant."""


def prepare(asked: GenerateOptions, files: BundleFiles, tokenizer: PromptTokenizer | None = None) -> Prepared:
    """The request that ``asked`` is for a bundle. Of its files the tokenizer is read, and is what the manifest lists;
    ``tokenizer`` is the one that was read before.

    UserError with what was found and what is allowed: CX600, CX602, CX603 prompts, CX604 options that do not go
    together, CX606 a schedule that is not the compiled one, CX607 outside all profiles, CX608 size, CX609 frames,
    CX610–CX613 actions, CX614 media, CX615 rates and seed, CX616 a negative prompt nobody reads, CX617 noise; CX46x
    sampling.
    UnsupportedError CX605: the bundle lacks what the mode needs.
    """
    manifest = files.manifest
    record = request_record(manifest)
    given = asked
    asked, read = with_request(asked)
    mode = mode_of(asked, manifest, record)
    if not asked.sound and sounds(manifest, mode):
        asked, read = replace(asked, sound=True), (*read, "sound is generated: every profile of this bundle has it")
    require_options(asked, mode)
    require_capabilities(manifest, record, mode, asked.sound)
    require_numbers(asked)
    schedule = request_schedule(asked.sampling, manifest, record, mode.name)
    if asked.negative is not None and given.negative is None and not any(schedule.guided):
        asked, read = replace(asked, negative=None), (*read, "its negative prompt is not read: no step is guided")
    if asked.negative is not None and not any(schedule.guided):
        raise UserError(
            "CX616", "a negative prompt where no step is guided", "leave --negative out, or set --guidance above 1"
        )
    builder = action_stage if mode.acts else video_stage
    stage = builder(asked, manifest, record, mode)
    noise = _read_noise(asked.noise, stage, schedule, record) if asked.noise else {}
    ids, negative_ids, said = _tokenized(asked, stage, record, files, tokenizer, guided=any(schedule.guided))
    lengths = [len(ids)] if negative_ids is None else [len(ids), len(negative_ids)]
    profile = fit_profile(manifest.profiles, {**stage.dims, "und_len": lengths}, record)
    request = Request(
        mode=mode.name,
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
    return Prepared(
        request=request,
        profile=profile.name,
        size=size,
        sound_len=stage.dims["sound_len"],
        embodiment=stage.embodiment,
        conversion=stage.conversion,
        state=stage.state,
        beyond=stage.beyond,
        notes=(*read, *stage.notes, *said),
    )


def read_tokenizer(record: PromptRecord, files: BundleFiles) -> PromptTokenizer:
    """The tokenizer of a bundle. CX603: it is none; FindingError CX711: it is not what the manifest lists."""
    return PromptTokenizer(record, files.read(record.tokenizer, "tokenizer"))


# -- prompts and noise ------------------------------------------------------------------------------------------------


def _tokenized(
    asked: GenerateOptions,
    stage: Stage,
    record: RequestRecord,
    files: BundleFiles,
    tokenizer: PromptTokenizer | None,
    *,
    guided: bool,
) -> tuple[TokenIds, TokenIds | None, tuple[str, ...]]:
    """Ids of the prompt and, where it is read, of the negative prompt; and notes on them."""
    if record.prompt is None:
        raise UnsupportedError("CX605", "this bundle has no tokenizer", "build it from a checkpoint that has one")
    given = asked.prompt
    prompt = text_prompt(given.value) if isinstance(given, InMemory) else read_prompt(given)
    denied = asked.negative or ""
    negative = (
        text_prompt(denied.value, "negative prompt")
        if isinstance(denied, InMemory)
        else read_prompt(denied, "negative prompt")
    )
    task = stage.mode.prompt is PromptForm.TASK
    if task and prompt.caption and asked.viewpoint is not None:
        raise UserError("CX604", "--viewpoint with a JSON caption", "the caption says it in cinematography.framing")
    robot = stage.embodiment
    usual = DEFAULT_VIEWPOINT if robot is None else robot.views.viewpoint or DEFAULT_VIEWPOINT
    action = (asked.viewpoint or usual) if task else None
    texts = request_texts(prompt, negative, stage.scene, action=action, metadata=asked.metadata)
    with_system = record.prompt.use_system if asked.system is None else asked.system
    system = system_message(stage.scene) if with_system else None
    tokenizer = tokenizer or read_tokenizer(record.prompt, files)
    ids = [tokenizer(text, system, literal=asked.literal) for text in (texts if guided else texts[:1])]
    control = () if asked.literal else tokenizer.control_tokens(f"{prompt.text}\n{negative.text}")
    names = ", ".join(control[:8])
    note = f"{names} in a prompt: read as control tokens of the model, as published; --literal reads them as text"
    return ids[0], ids[1] if guided else None, (note,) if control else ()


def noise_shapes(request_dims: Mapping[str, int], record: RequestRecord, mode: Mode) -> dict[str, tuple[int, ...]]:
    """Shape of the initial noise of each modality that a request of ``mode`` generates."""
    frames, height, width = (request_dims[name] for name in ("frames", "height", "width"))
    shapes: dict[str, tuple[int, ...]] = {"vision": (1, record.video.channels, frames, height, width)}
    if record.sound is not None:
        shapes["sound"] = (record.sound.channels, request_dims["sound_len"])
    if record.action is not None:
        shapes["action"] = (request_dims["action_len"], record.action.dim)
    generated = {*mode.generated, *(["sound"] if request_dims["sound_len"] else [])}
    return {name: shape for name, shape in shapes.items() if name in generated}


def _read_noise(
    given: Path | InMemory[Mapping[str, NDArray[Any]]], stage: Stage, schedule: Schedule, record: RequestRecord
) -> dict[str, NDArray[np.float32]]:
    """float32 arrays of ``given`` by name, each of the shape the request has and finite; or CX617."""
    expected = noise_shapes(stage.dims, record, stage.mode)
    if schedule.sampler == "distilled-sde":
        expected |= {f"{name}_steps": (schedule.steps, *shape) for name, shape in expected.items()}
    known = ", ".join(f"{n} {list(s)}" for n, s in expected.items())
    noise: dict[str, NDArray[np.float32]] = {}
    for name, shape, kind, read in _noise_tensors(given):
        if expected.get(name) != shape or kind not in ("F64", "F32", "F16", "BF16"):
            found = f"`{name}` {kind} {list(shape)}"
            raise UserError("CX617", f"noise in {given}: {found}; this request takes {known}", "floating-point numbers")
        noise[name] = np.asarray(read(), dtype=np.float32)
        if not np.isfinite(noise[name]).all():
            raise UserError("CX617", f"noise in {given}: `{name}` holds NaN or infinite values")
    if not noise:
        raise UserError("CX617", f"noise in {given}: no tensor in it")
    return noise


def _noise_tensors(
    given: Path | InMemory[Mapping[str, NDArray[Any]]],
) -> Iterator[tuple[str, tuple[int, ...], str, Callable[[], NDArray[Any]]]]:
    """Name, shape, type and reader of each tensor."""
    if isinstance(given, InMemory):
        for name, array in given.value.items():
            kind = f"F{8 * array.dtype.itemsize}" if array.dtype.kind == "f" else str(array.dtype)
            yield name, array.shape, kind, partial(np.asarray, array)
        return
    try:
        tensors = read_header(given).tensors
    except UserError as error:
        raise UserError("CX617", f"noise: {error.message}", "it is a .safetensors file") from error
    for name, entry in tensors.items():
        yield name, entry.shape, entry.dtype, entry.array
