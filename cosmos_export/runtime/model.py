"""A bundle as an object: options in, results out, files on request. What `cosmos_export.open` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_export.bundle import BundleFiles, Manifest
from cosmos_export.diagnostics import UserError
from cosmos_export.options import GenerateOptions
from cosmos_export.progress import Progress, Silent
from cosmos_export.runtime import media
from cosmos_export.runtime.frontend import Prepared, prepare, read_tokenizer
from cosmos_export.runtime.generate_options import request_record
from cosmos_export.runtime.generator import Generator, Result
from cosmos_export.runtime.limits import Limits, Review, read_limits, review
from cosmos_export.runtime.results import Outputs, Written, actions_of, plan_outputs, write_results
from cosmos_export.runtime.tokenize import PromptTokenizer


@dataclass(frozen=True)
class Step:
    """Where a request is: step ``number`` of ``of`` is done. A loop on the device reports at the end of a segment."""

    number: int
    """Number of the step, from 1."""
    of: int
    timestep: float
    """Timestep of this step, in [0, 1000]."""


class LoadedModel:
    """A bundle that requests run on. `load` verifies every byte of it before any backend is given one."""

    def __init__(
        self, files: BundleFiles, *, backend: str | None = None, device: str | None = None, resident: bool = True
    ) -> None:
        """``backend`` and ``device``: as `load_bundle`. ``resident``: keep engines loaded between requests."""
        self.files = files
        self._backend, self._device, self._resident = backend, device, resident
        self._generator: Generator | None = None
        self._closed = False

    @property
    def path(self) -> Path:
        """The bundle's directory."""
        return self.files.path

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self.files.manifest

    @property
    def bundle_id(self) -> str:
        """SHA-256 of the manifest in hexadecimal digits."""
        return self.files.bundle_id

    def __repr__(self) -> str:
        state = "closed" if self._closed else "loaded" if self._generator is not None else "not loaded"
        target = self.manifest.target
        return f"Model({str(self.path)!r}, {self.manifest.model.id}, {self.manifest.recipe}, {target.name}, {state})"

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and device back. Results that were not decoded cannot be decoded afterwards."""
        self._closed = True
        if self._generator is not None:
            self._generator.close()

    def load(self, progress: Progress | None = None) -> Generator:
        """Verify the bundle and open its backend, once; the errors are those of `load_bundle`."""
        from cosmos_export.runtime import Generator, load_bundle

        self.require_open()
        if self._generator is None:
            loaded = load_bundle(self.files, backend=self._backend, device=self._device, progress=progress or Silent())
            self._generator = Generator(loaded, resident=self._resident)
        return self._generator

    def require_open(self) -> None:
        """UserError CX618 after `close`."""
        if self._closed:
            raise UserError(
                "CX618", f"the model of {self.path} is closed", "read results inside the `with` block that opens it"
            )

    def prepare(self, options: GenerateOptions) -> Prepared:
        """Check ``options`` against the bundle. Nothing is loaded. Errors: `cosmos_export.runtime.frontend.prepare`."""
        self.require_open()
        return prepare(options, self.files, self._tokenizer)

    @cached_property
    def _tokenizer(self) -> PromptTokenizer | None:
        """Read once for all requests."""
        record = request_record(self.manifest).prompt
        return None if record is None else read_tokenizer(record, self.files)

    def run(
        self,
        prepared: Prepared,
        on_step: Callable[[Step], object] | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Sample a prepared request. ``on_step`` is called after each step; what it raises ends the request."""
        generator = self.load(progress)
        watched = _Steps(progress or Silent(), prepared, on_step)
        return Generation(self, prepared, generator.generate(prepared.request, watched))


class Generation:
    """The results of a request. Frames and sound are decoded when they are first asked for, while the model is open."""

    def __init__(self, model: LoadedModel, prepared: Prepared, result: Result) -> None:
        self._model, self._result = model, result
        self.prepared = prepared
        """The request, its profile and its notes."""

    def __repr__(self) -> str:
        request, (height, width) = self.prepared.request, self.prepared.size
        size = f"{request.frames} frames of {width} × {height} pixels"
        return f"Generation({request.mode}, {size}, seed {request.seed}, profile {self.prepared.profile!r})"

    @property
    def mode(self) -> str:
        return self.prepared.request.mode

    @property
    def seed(self) -> int:
        return self.prepared.request.seed

    @property
    def fps(self) -> float:
        """Frames per second of the video."""
        return self.prepared.request.fps

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about settings that the caller may not have meant, such as a clip of another frame rate."""
        return self.prepared.notes

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds of each stage so far."""
        return self._result.timings

    @property
    def latents(self) -> Mapping[str, NDArray[Any]]:
        """float32: ``vision`` [1, channels, T, h, w], ``sound`` [channels, T], ``action`` [rows, dim]."""
        return self._result.latents

    @cached_property
    def frames(self) -> NDArray[np.uint8]:
        """uint8 [frames, height, width, 3] RGB. UnsupportedError CX605: the bundle has no decoder."""
        self._model.require_open()
        return np.concatenate([media.as_bytes(chunk) for chunk in self._result.video()])

    @cached_property
    def sound(self) -> NDArray[Any] | None:
        """float32 [channels, samples] in [−1, 1], at `sampling_rate`; None where none was asked for."""
        if not self.prepared.request.sound:
            return None
        self._model.require_open()
        return self._result.sound()

    @property
    def sampling_rate(self) -> int | None:
        """Samples of `sound` per second; None where the bundle generates none."""
        sound = self._model.manifest.request.sound
        return None if sound is None else sound.sampling_rate

    @cached_property
    def actions(self) -> NDArray[np.float32] | None:
        """float32 [rows, width] as the robot takes them, in the data's units where statistics were given; None in modes
        without actions."""
        return actions_of(self._result, self.prepared)

    def review(
        self, limits: Limits | str | Path, state: Sequence[float] | None = None, age_s: float | None = None
    ) -> Review:
        """Hold `actions` to the limits of a robot, which may be the path of a ``limits.toml``, before they leave.

        ``state``: where the robot is, a number per column (None: as the request said); ``age_s``: seconds since that
        was seen. The review has ``verdict``, ``breaches`` and the ``actions`` that may leave. UserError CX630: no
        limits; CX632: those of other actions, or no actions here. It is no safety function of the robot.
        """
        found = limits if isinstance(limits, Limits) else read_limits(Path(limits))
        if self.actions is None:
            raise UserError("CX632", f"mode {self.mode} makes no actions", "policy and inverse-dynamics do")
        found.require(self.actions.shape[1], self.prepared.conversion.units)
        now = self.prepared.state if state is None else state
        return review(self.actions, found, fps=self.fps, state=now, age_s=age_s)

    def save(
        self,
        *paths: str | Path,
        latents: str | Path | None = None,
        frames: str | Path | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Written:
        """Write files by the ends of their names: .mp4, .png, .wav, .json or .safetensors (actions). Every file says
        in its metadata that it is AI-generated and by which bundle.

        ``latents``: a .safetensors file of what was sampled; ``frames``: an .npy file of float32 [frames, height,
        width, 3] in [0, 1]. ``force`` replaces existing files. CX662: a name without meaning for this request, or a
        place that cannot be written; CX663: results that are not finite.
        """
        outputs = plan_outputs(
            [Path(path) for path in paths], self.prepared, self._model.manifest,
            latents=None if latents is None else Path(latents), frames=None if frames is None else Path(frames),
            force=force,
        )  # fmt: skip
        return self.write(outputs, progress)

    def write(self, outputs: Outputs, progress: Progress | None = None, limits: Limits | None = None) -> Written:
        """Write ``outputs`` of `plan_outputs`, actions as ``limits`` let them pass. FindingError CX631: they reject."""
        self._model.require_open()
        mark = media.Mark(self._model.bundle_id)
        return write_results(outputs, self._result, self.prepared, self._model.manifest, mark, progress, limits)


class _Steps:
    """A `Progress` that tells ``on_step`` of every denoising step."""

    def __init__(self, inner: Progress, prepared: Prepared, on_step: Callable[[Step], object] | None) -> None:
        self._inner, self._on_step = inner, on_step
        self._timesteps = prepared.request.schedule.timesteps

    def begin(self, task: str, total: int | None = None) -> None:
        self._inner.begin(task, total)

    def update(self, task: str, completed: int) -> None:
        self._inner.update(task, completed)
        if task == "denoise" and self._on_step is not None and completed:
            of = len(self._timesteps)
            self._on_step(Step(completed, of, float(self._timesteps[completed - 1])))

    def end(self, task: str) -> None:
        self._inner.end(task)
