"""Inputs of graphs from a request: masks, rotary coordinates and noise, as the published pipeline prepares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cosmos_export.bundle import RequestRecord
from cosmos_export.runtime import positions
from cosmos_export.runtime.request import Request
from cosmos_export.targets.sessions import Array


@dataclass(frozen=True)
class Sizes:
    """Shapes of the latents of a request."""

    vision: tuple[int, int, int, int, int]
    """[1, channels, frames, rows, columns]"""
    sound: tuple[int, int] | None
    """[channels, latents]; None where the model has no sound."""
    action: tuple[int, int] | None
    """[rows, width]; None where the model has no actions."""

    def items(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Modalities of the model with their shapes."""
        for name in ("vision", "sound", "action"):
            shape = getattr(self, name)
            if shape is not None:
                yield name, shape


def sizes(request: Request, record: RequestRecord) -> Sizes:
    """Latent shapes of ``request``; a modality that it does not have has no rows."""
    video = record.video
    frames = (request.frames - 1) // video.temporal + 1
    sound = action = None
    if record.sound is not None:
        sound = (record.sound.channels, sound_latents(request.frames, request.fps, record) if request.sound else 0)
    if record.action is not None:
        action = (request.action.rows if request.action else 0, record.action.dim)
    return Sizes((1, video.channels, frames, request.height, request.width), sound, action)


def sound_latents(frames: int, fps: float, record: RequestRecord) -> int:
    """Latents of the sound that lasts as long as ``frames``, the last one begun (diffusers, ``prepare_latents``)."""
    assert record.sound is not None
    samples = int(frames / fps * record.sound.sampling_rate)
    return -(-samples // record.sound.hop)


def request_inputs(request: Request, record: RequestRecord, shapes: Sizes) -> dict[str, Array]:
    """Every input of a graph that is the same in all steps and for both prompts, by name; float32, ids int64."""
    video = record.video
    base, modulated = video.base_fps, video.fps_modulation
    _, _, frames, height, width = shapes.vision
    rate = request.fps if modulated else None
    found = {
        "vision_mask": noisy_rows(frames, request.clean_frames),
        "frame_positions": positions.frame_positions(frames, rate, base, video.temporal),
        "row_positions": positions.grid_positions(-(-height // video.patch)),
        "column_positions": positions.grid_positions(-(-width // video.patch)),
    }
    if record.sound is not None and shapes.sound is not None:
        sound_rate = record.sound.latent_fps if modulated else None
        found["sound_positions"] = positions.sound_positions(shapes.sound[1], sound_rate, base)
    if shapes.action is not None:
        rows, dim = shapes.action
        part = request.action
        given, used, first, domain = (0, dim, 1, 0) if part is None else (
            part.given_rows, part.raw_dim, part.first_position, part.domain,
        )  # fmt: skip
        found |= {
            "action_mask": noisy_rows(rows, range(given)),
            "action_columns": (np.arange(dim) < used).astype(np.float32),
            "action_positions": positions.action_positions(rows, rate, base, video.temporal, first),
            "action_domain": np.array([domain], np.int64),
        }
    return found


def noisy_rows(count: int, clean: Sequence[int]) -> Array:
    """float32 [count]: 0 for the rows in ``clean``, 1 for those that are generated."""
    mask = np.ones(count, np.float32)
    mask[list(clean)] = 0.0
    return mask


def noisy(name: str, inputs: Mapping[str, Array]) -> Array | None:
    """0/1, broadcast over the latents of modality ``name``: what is generated of them; None: all."""
    if name == "vision":
        return inputs["vision_mask"].reshape(1, 1, -1, 1, 1)
    if name == "action":
        return inputs["action_mask"][:, None] * inputs["action_columns"]
    return None


class Noise:
    """The noise of a request: what it brings, and for the rest a generator of its seed.

    Drawn in the order vision, sound, action, then all modalities of each step of a stochastic sampler.
    """

    def __init__(self, request: Request, shapes: Sizes) -> None:
        self._given = request.noise
        self._random = np.random.Generator(np.random.Philox(request.seed))
        # All are drawn, also those that are given: one that is given does not change the others.
        self.initial = {
            name: self._given.get(name, drawn)
            for name, shape in shapes.items()
            for drawn in [self._random.standard_normal(shape, np.float32)]
        }

    def steps(self, count: int) -> dict[str, Array]:
        """float32 [count, …] for each modality: the noise of every step of a stochastic sampler."""
        return {
            name: self._given.get(f"{name}_steps", drawn)
            for name, first in self.initial.items()
            for drawn in [self._random.standard_normal((count, *first.shape), np.float32)]
        }


def initial_latents(
    request: Request, noise: Noise, inputs: Mapping[str, Array], encoded: Array | None
) -> dict[str, Array]:
    """float32 samples before the first step: noise, and in its place what is given.

    ``encoded`` [1, C, frames, h, w] are the latents of the clean frames, in order. Action columns behind those of the
    embodiment are zero.
    """
    samples = {name: np.array(value, np.float32) for name, value in noise.initial.items()}
    if encoded is not None:
        samples["vision"][:, :, list(request.clean_frames)] = encoded
    if "action" in samples:
        samples["action"] *= inputs["action_columns"]
        if request.action is not None and request.action.given is not None:
            samples["action"][: request.action.given_rows, : request.action.raw_dim] = request.action.given
    return samples
