"""Rotary coordinates from the runtime are those of the published pipeline, for every rate and length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.runtime import positions

START = 15_077  # where generation starts on the temporal axis: prompt length + margin
LENGTHS = st.integers(1, 400)
RATES = st.one_of(st.none(), st.sampled_from([5.0, 10.0, 15.0, 16.0, 23.976, 24.0, 30.0, 60.0]), st.floats(0.5, 240.0))
BASES = st.sampled_from([24.0, 16.0])


def published(length: int, rows: int, columns: int, **options: object) -> torch.Tensor:
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_vae_tokens

    ids, _ = get_3d_mrope_ids_vae_tokens(length, rows, columns, START, **options)
    return ids.to(torch.float32)


def temporal(offsets: np.ndarray) -> torch.Tensor:
    """As the program computes it: in float32, the start added last."""
    assert offsets.dtype == np.float32
    return torch.from_numpy(offsets) + START


@settings(deadline=None)  # the first call imports diffusers
@given(LENGTHS, RATES, BASES)
def test_frames(count: int, fps: float | None, base: float) -> None:
    expected = published(count, 1, 1, fps=fps, base_fps=base)[0]
    assert torch.equal(temporal(positions.frame_positions(count, fps, base)), expected)


@settings(deadline=None)  # the first call imports diffusers
@given(LENGTHS, RATES, BASES)
def test_sound(count: int, fps: float | None, base: float) -> None:
    expected = published(count, 1, 1, fps=fps, base_fps=base, temporal_compression_factor=1)[0]
    assert torch.equal(temporal(positions.sound_positions(count, fps, base)), expected)


@settings(deadline=None)  # the first call imports diffusers
@given(LENGTHS, RATES, BASES, st.integers(0, 1))
def test_actions(count: int, fps: float | None, base: float, first: int) -> None:
    options = {"temporal_compression_factor": 1, "base_temporal_compression_factor": 4, "start_frame_offset": first}
    expected = published(count, 1, 1, fps=fps, base_fps=base, **options)[0]
    assert torch.equal(temporal(positions.action_positions(count, fps, base, first=first)), expected)


@settings(deadline=None)  # the first call imports diffusers
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_rows_and_columns(frames: int, rows: int, columns: int) -> None:
    _, height, width = published(frames, rows, columns, fps=24.0).reshape(3, frames, rows, columns)
    grid = (frames, rows, columns)
    own_rows, own_columns = (torch.from_numpy(positions.grid_positions(n)) for n in (rows, columns))
    assert torch.equal(own_rows.reshape(1, rows, 1).expand(grid), height)
    assert torch.equal(own_columns.reshape(1, 1, columns).expand(grid), width)


@pytest.mark.parametrize("count", [0, 1])
def test_no_rows_and_one_row(count: int) -> None:
    for function in (positions.frame_positions, positions.sound_positions):
        assert np.array_equal(function(count, 5.0), np.arange(count, dtype=np.float32))
    assert np.array_equal(positions.action_positions(count, 5.0), 1 + np.arange(count, dtype=np.float32))


def test_no_torch() -> None:
    """A runtime imports this; it must not bring torch with it."""
    import subprocess
    import sys

    code = "import sys, cosmos_export.runtime.positions; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
