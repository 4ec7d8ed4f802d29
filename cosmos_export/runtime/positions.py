"""Rotary coordinates of generated rows, relative to the start of generation (the program knows where that is).

The published rule (diffusers, ``get_3d_mrope_ids_vae_tokens``): the temporal axis runs in units of latent frames at the
model's base rate. All results are float32, in the order of operations of the pipeline.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def _scaled(count: int, rate: float, base_rate: float, first: int = 0) -> Array:
    steps = (np.arange(count, dtype=np.float32) + np.float32(first)) / np.float32(rate)
    return (steps * np.float32(base_rate)).astype(np.float32)


def frame_positions(frames: int, fps: float | None, base_fps: float = 24.0, compression: int = 4) -> Array:
    """[frames] temporal coordinates of latent frames. One frame, or no rate, counts in whole frames."""
    if fps is None or frames <= 1:
        return np.arange(frames, dtype=np.float32)
    return _scaled(frames, fps / compression, base_fps / compression)


def grid_positions(count: int) -> Array:
    """[count] coordinates of patch rows or columns."""
    return np.arange(count, dtype=np.float32)


def sound_positions(count: int, sound_fps: float | None, base_fps: float = 24.0) -> Array:
    """[count] temporal coordinates of sound latents."""
    if sound_fps is None or count <= 1:
        return np.arange(count, dtype=np.float32)
    return _scaled(count, sound_fps, base_fps)


def action_positions(
    count: int, fps: float | None, base_fps: float = 24.0, compression: int = 4, first: int = 1
) -> Array:
    """[count] temporal coordinates of action rows; ``first`` is 0 where row 0 is the state."""
    if fps is None or count <= 1:
        return np.arange(count, dtype=np.float32) + np.float32(first)
    return _scaled(count, fps, base_fps / compression, first)
