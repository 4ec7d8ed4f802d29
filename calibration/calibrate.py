"""A calibration from requests to a scale table: clean latents, inputs of every pass, and the way through the layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cosmos_export.bundle import RequestRecord
from cosmos_export.calibration.algorithms import Algorithm
from cosmos_export.calibration.coverage import Coverage, ForwardPass, coverage_of_modes
from cosmos_export.calibration.encode import Encoder, SoundEncoder
from cosmos_export.calibration.layers import Entrance, LayerSource
from cosmos_export.calibration.noised_inputs import Latents, noised, step_inputs
from cosmos_export.calibration.observers import Observer
from cosmos_export.calibration.requests import CalibrationRequest, read_frames, read_latents
from cosmos_export.calibration.rollout import Rollout
from cosmos_export.calibration.sources import Source
from cosmos_export.calibration.stream import LayerResult, Workspace, run_layers, zero_ranges
from cosmos_export.calibration.table import ScaleTable
from cosmos_export.calibration.weights import torch_dtype
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.output import require_space
from cosmos_export.diagnostics import FindingError
from cosmos_export.precision.stored_recipe import recipe_text
from cosmos_export.progress import Progress, Silent
from cosmos_export.release import VERSION
from cosmos_export.runtime import canvas, read_media
from cosmos_export.runtime.embodiments import ActionScale
from cosmos_export.runtime.request import Request
from cosmos_export.runtime.step_inputs import sound_latents
from cosmos_export.sampling import MODES
from cosmos_export.stamps import Inputs

_SEARCH_ROWS = 256
"""Rows of each tensor that the search sees, over all passes."""
_TASK = "make inputs"
_PLANNED = ("mode", "frames", "height", "width", "fps", "sound")
"""Fields of a request that a plan names; the rest follows from the data or from these."""


@dataclass(frozen=True)
class CalibrationJob:
    """Everything a calibration depends on."""

    checkpoint: Checkpoint
    identity: str
    record: RequestRecord
    sources: tuple[Source, ...]
    works: tuple[CalibrationRequest, ...]
    samples: tuple[ForwardPass, ...]
    coverage: Coverage
    observer: Observer
    algorithm: Algorithm
    seed: int = 0
    components: str = ""
    """Digest of the files of the other components: encoders, tokenizer, configurations."""

    @property
    def inputs(self) -> tuple[Inputs, ...]:
        """All that is read from files during the calibration."""
        return self.checkpoint.inputs, *(source.inputs for source in self.sources)

    def plan(self) -> dict[str, Any]:
        """Settings that must be equal for an interrupted calibration to go on."""
        return {
            "checkpoint": self.identity,
            "components": self.components,
            "sources": [source.digest for source in self.sources],
            "works": [
                [
                    w.name,
                    w.latents,
                    [getattr(w.request, name) for name in _PLANNED],
                    w.request.input_ids.tolist(),
                    None if w.given is None else hashlib.sha256(w.given.tobytes()).hexdigest(),
                ]
                for w in self.works
            ],
            "schedules": [asdict(w.request.schedule) for w in self.works],
            "samples": [[s.work, s.step, s.branch] for s in self.samples],
            "observer": asdict(self.observer),
            "algorithm": self.algorithm.settings,
            "seed": self.seed,
            "versions": {"cosmos-export": VERSION, "torch": torch.__version__},
        }


def calibrate(job: CalibrationJob, workspace: Workspace, progress: Progress | None = None) -> ScaleTable:
    """The scale table of ``job``. What ``workspace`` holds of an earlier run of the same job is not done again.

    CX321: an activation is not finite; CX323: a tensor was never anything but zero.
    """
    report = progress or Silent()
    _enter_all(job, workspace, report)
    results = run_layers(
        LayerSource(job.checkpoint),
        workspace,
        [f"{job.works[s.work].name}, step {s.step} ({s.branch})" for s in job.samples],
        job.observer,
        search=job.algorithm.search(),
        rows=-(-_SEARCH_ROWS // len(job.samples)),
        progress=report,
    )
    for name in zero_ranges(results):
        raise FindingError(
            "CX323", f"{name} was 0 in every pass, so it has no range", "is the checkpoint complete? add --data"
        )
    return ScaleTable(
        amax={f"layers.{i}.{name}": value for i, result in enumerate(results) for name, value in result.ranges.items()},
        pre_scales={
            f"layers.{i}.{n}": value for i, result in enumerate(results) for n, value in result.pre_scales.items()
        },
        low_rank={f"layers.{i}.{n}": pair for i, result in enumerate(results) for n, pair in result.low_rank.items()},
        checkpoint=job.identity,
        lineage=lineage(job),
        recipe=_recipe(job, results),
    )


def _recipe(job: CalibrationJob, results: Sequence[LayerResult]) -> str:
    """The schemes that a search chose, as a recipe; empty where it chose none."""
    schemes = {f"layers.{i}.{name}": scheme for i, one in enumerate(results) for name, scheme in one.schemes.items()}
    if not schemes:
        return ""
    bits = job.algorithm.settings["bits"]
    summary = f"The schemes that ModelOpt's AutoQuantize chose, layer by layer, with {bits:g} bits an average weight."
    return recipe_text(job.checkpoint, schemes, f"Chosen within {bits:g} bits a weight", summary)


def lineage(job: CalibrationJob) -> dict[str, Any]:
    """Lineage of the table; it has no paths, and is the same for the same data."""
    return {
        "tool": {"name": "cosmos-export", "version": VERSION},
        "observer": job.observer.settings,
        "algorithm": job.algorithm.settings,
        "seed": job.seed,
        "passes": len(job.samples),
        "tokens": sum(_rows(job.works[s.work], job.record) for s in job.samples),
        "coverage": job.coverage,
        "modes": coverage_of_modes(job.works, job.samples),
        "schedules": sorted({_schedule(work) for work in job.works}),
        "sources": [_source(job, number, source) for number, source in enumerate(job.sources)],
        **({"ignored_adapters": len(job.checkpoint.adapters)} if job.checkpoint.adapters else {}),
    }


def _source(job: CalibrationJob, number: int, source: Source) -> dict[str, Any]:
    works = [work for work in job.works if work.source == number]
    return {
        "name": source.name,
        "kind": source.kind,
        "sha256": source.digest,
        "count": len(source.items),
        "licence": source.licence,
        "origin": source.origin,
        "modes": _counted([work.request.mode for work in works]),
        "latents": _counted([work.latents for work in works]),
        **({} if source.scale is None else {"statistics": _statistics(source.scale)}),
        "notes": [*source.notes, *_shortened(dict.fromkeys(note for work in works for note in work.notes))],
    }


def _statistics(scale: ActionScale) -> dict[str, Any]:
    """The numbers that bring a column of the data to the model's: (number − offset) / scale."""
    return {"method": scale.method, "offset": scale.offset.tolist(), "scale": scale.scale.tolist()}


def _shortened(notes: Iterable[str], most: int = 5) -> list[str]:
    """The first of ``notes``, and how many there are besides."""
    found = list(notes)
    return found if len(found) <= most else [*found[:most], f"{len(found) - most} more notes of that kind"]


def _counted(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}


def _schedule(work: CalibrationRequest) -> str:
    return work.request.schedule.text(work.request.mode)


def _rows(work: CalibrationRequest, record: RequestRecord) -> int:
    request, patch = work.request, record.video.patch
    frames = (request.frames - 1) // record.video.temporal + 1
    return frames * -(-request.height // patch) * -(-request.width // patch)


# -- inputs -----------------------------------------------------------------------------------------------------------


def _enter_all(job: CalibrationJob, workspace: Workspace, report: Progress) -> None:
    """Every sample that has not entered: its clean latents, noised to its step, through what is before the layers."""
    numbered = [(index, sample) for index, sample in enumerate(job.samples) if workspace.passed(index) is None]
    if not numbered:
        return
    report.begin(_TASK, len(job.samples))
    makers = _Makers(job)
    entrance = Entrance(job.checkpoint)
    done = len(job.samples) - len(numbered)
    for number, group in groupby(numbered, key=lambda pair: pair[1].work):
        work, mine = job.works[number], list(group)
        latents = makers.latents(work, sorted({sample.step for _, sample in mine}), job.seed + number)
        job.sources[work.source].inputs.require_unchanged("calibration")
        for index, sample in mine:
            at_step = latents(sample.step, job.seed + 1_000_003 * (index + 1))
            inputs = step_inputs(
                work.request, job.record, at_step, sample.step, uncond=sample.branch == "uncond", dtype=entrance.dtype
            )
            workspace.enter(index, entrance(inputs))
            done += 1
            report.update(_TASK, done)
    report.end(_TASK)


class _AtStep:
    """Latents of a request at its steps: noised from clean ones, or as a rollout passed through them."""

    def __init__(
        self, work: CalibrationRequest, record: RequestRecord, clean: Latents, passed: Mapping[int, Latents]
    ) -> None:
        self._work, self._record, self._clean, self._passed = work, record, clean, passed

    def __call__(self, step: int, seed: int) -> Latents:
        if step in self._passed:
            return self._passed[step]
        return noised(self._work.request, self._record, self._clean, step, seed)


class _Makers:
    """The models that make latents; each is loaded when it is first needed."""

    def __init__(self, job: CalibrationJob) -> None:
        self._job = job
        self._encoder: Encoder | None = None
        self._sound_encoder: SoundEncoder | None = None
        self._rollout: Rollout | None = None
        self._last: tuple[tuple[Any, ...], NDArray[np.float32]] | None = None
        """The latent that was encoded last, and what it is of: the three readings of an action follow each other."""

    def latents(self, work: CalibrationRequest, steps: Sequence[int], seed: int) -> _AtStep:
        """Latents of ``work`` at ``steps``."""
        record = self._job.record
        if work.latents == "rollout":
            return _AtStep(work, record, {}, self._rolled(replace(work.request, seed=seed), steps))
        if work.latents == "noise":
            return _AtStep(work, record, {}, {})
        if work.latents == "recorded":
            assert work.file is not None
            return _AtStep(work, record, read_latents(work.file, record, work.name), {})
        clean: dict[str, NDArray[np.float32]] = {"vision": self._encoded(work)}
        if work.request.sound:
            clean["sound"] = self._heard(work)
        if work.given is not None and record.action is not None:
            rows = np.zeros((len(work.given), record.action.dim), np.float32)
            rows[:, : work.given.shape[1]] = work.given
            clean["action"] = rows
        return _AtStep(work, record, clean, {})

    def _encoded(self, work: CalibrationRequest) -> NDArray[np.float32]:
        request = work.request
        size, fit = (request.frames, request.height, request.width), MODES[request.mode].fit
        key = (work.clip, *work.cameras, work.image, work.canvas, *size, fit)
        if self._last is None or self._last[0] != key:
            self._encoder = self._encoder or Encoder(self._job.checkpoint)
            self._last = key, self._encoder(pixels(work, self._job.record))
        # An action's canvas is padded; its latents are those of the content.
        return self._last[1][..., : request.height, : request.width]

    def _heard(self, work: CalibrationRequest) -> NDArray[np.float32]:
        """The latents of the sound of ``work``'s clip, over the time of its frames."""
        request, sound = work.request, self._job.record.sound
        assert sound is not None and work.clip is not None
        self._sound_encoder = self._sound_encoder or SoundEncoder(self._job.checkpoint)
        samples = sound_latents(request.frames, request.fps, self._job.record) * sound.hop
        start = work.clip.skip / request.fps
        return self._sound_encoder(read_media.read_sound(work.clip.path, start, samples, sound.sampling_rate))

    def _rolled(self, request: Request, steps: Sequence[int]) -> dict[int, Latents]:
        if self._rollout is None:
            dtype = torch_dtype(self._job.checkpoint.tensors["proj_in.weight"])
            self._rollout = Rollout(self._job.checkpoint.components["transformer"], dtype, self._job.record)
        return self._rollout(request, steps)


def pixels(work: CalibrationRequest, record: RequestRecord) -> canvas.Float:
    """float32 [3, frames, H, W] in [−1, 1]: the clip or picture of ``work`` on its canvas."""
    request, spatial, fit = work.request, record.video.spatial, MODES[work.request.mode].fit
    if work.canvas is not None:
        return canvas.action_canvas(read_frames(work, request.frames).frames, work.canvas)
    height, width = request.height * spatial, request.width * spatial
    each = canvas.keeping(fit, height, width)
    if work.image is not None:
        path, count, skip = work.image, 1, 0
    else:
        assert work.clip is not None
        path, count, skip = work.clip.path, request.frames, work.clip.skip
    frames = read_media.read_clip(path, count, skip=skip, each=each).frames
    return canvas.placed(frames, fit, height, width)


def workspace_folder(output: Path) -> Path:
    """Where the calibration for ``output`` keeps what it has done."""
    return output.with_name(f".{output.name}.calibrating")


def require_workspace_space(job: CalibrationJob, output: Path) -> None:
    """There is room for the hidden states of all samples beside ``output``; CX348."""
    geometry, states = job.checkpoint.geometry, 0
    for sample in job.samples:
        work = job.works[sample.work]
        rows = _rows(work, job.record) + len(work.request.input_ids)
        states += rows * (geometry.hidden_size + 2 * geometry.head_dim) * 4
    require_space(output, states, "CX348", "the calibration", "fewer --samples or --frames, or another disk")
