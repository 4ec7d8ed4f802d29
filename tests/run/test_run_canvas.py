"""Resampling and canvases against torch, Pillow and the published pipeline."""

from __future__ import annotations

import math
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import (
    _ACTION_RESOLUTION_BINS,
    Cosmos3OmniPipeline,
    _preprocess_conditioning_image,
)
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cosmos_export.diagnostics import UserError
from cosmos_export.runtime import canvas
from cosmos_export.runtime.canvas import CUBIC, TRIANGLE
from cosmos_export.sampling.action_canvas import ACTION_BINS, plan_action_canvas

SIZES = [((37, 53), (37, 53)), ((37, 53), (16, 16)), ((37, 53), (90, 41)), ((16, 16), (33, 7)), ((5, 64), (64, 5))]


def clip(height: int, width: int, frames: int = 1, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def pictures(frames: Any) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


@pytest.mark.parametrize(("source", "size"), SIZES)
@pytest.mark.parametrize(("kernel", "mode"), [(TRIANGLE, "bilinear"), (CUBIC, "bicubic")])
def test_floating_point_is_torch(source: Any, size: Any, kernel: Any, mode: str) -> None:
    planes = np.random.default_rng(1).uniform(-1, 1, (2, 3, *source)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(planes), size=size, mode=mode, align_corners=False, antialias=True
    ).numpy()
    np.testing.assert_allclose(canvas.resample(planes, *size, kernel), expected, rtol=0, atol=1e-6)


# With each direction first, and with one only.
@pytest.mark.parametrize(("source", "size"), [*SIZES, ((50, 70), (48, 80)), ((74, 30), (36, 15)), ((77, 54), (7, 8))])
def test_resize_is_pillows(source: Any, size: Any) -> None:
    frames = clip(*source, frames=2)
    expected = np.stack([np.asarray(p.resize((size[1], size[0]), Image.Resampling.BILINEAR)) for p in pictures(frames)])
    np.testing.assert_array_equal(canvas.resize(frames, *size), expected)


@pytest.mark.parametrize(
    "source", [(48, 64), (51, 64), (64, 47), (31, 100), (200, 333), (941, 1672), (1, 500), (300, 2)]
)
def test_cover_is_the_pipelines_conditioning_image(source: tuple[int, int]) -> None:
    image = clip(*source)[0]
    expected = _preprocess_conditioning_image(Image.fromarray(image), height=48, width=80)[0].numpy()
    found = canvas.cover(image, 48, 80)
    np.testing.assert_array_equal(found, expected)


def test_stretch_is_the_pipelines_clip() -> None:
    frames = clip(50, 70, frames=3)
    processor = VideoProcessor(vae_scale_factor=16, resample="bilinear")
    expected = processor.preprocess_video(pictures(frames), height=48, width=80)[0].numpy()
    np.testing.assert_array_equal(canvas.stretch(frames, 48, 80), expected)


def test_bins_are_the_pipelines() -> None:
    published = {int(tier): tuple(bins.values()) for tier, bins in _ACTION_RESOLUTION_BINS.items()}
    assert published == ACTION_BINS


# Content that fills the canvas, is shrunk, stays small (reflected), stays tiny (edges repeated), and DROID's.
@pytest.mark.parametrize("source", [(192, 320), (300, 500), (150, 250), (40, 170), (64, 64), (540, 640)])
@pytest.mark.parametrize("tier", [256, 480])
def test_action_canvas_is_the_pipelines(source: tuple[int, int], tier: int) -> None:
    frames = clip(*source, frames=2)
    pipeline = SimpleNamespace(video_processor=VideoProcessor(vae_scale_factor=16, resample="bilinear"))
    expected, size, *_ = Cosmos3OmniPipeline._prepare_action_video_conditioning(
        pipeline, pictures(frames), tier, 2, "cpu", torch.float32
    )
    plan = plan_action_canvas(*source, tier)
    assert [plan.height, plan.width, plan.content_height, plan.content_width] == size.tolist()
    np.testing.assert_allclose(canvas.action_canvas(frames, plan), expected[0].numpy(), rtol=0, atol=1e-6)


def test_content_of_droid() -> None:
    plan = plan_action_canvas(540, 640, 480)
    assert (plan.height, plan.width) == (544, 736)
    assert (plan.content_height // 16, plan.content_width // 16) == (33, 40)


@pytest.mark.parametrize(("size", "tier"), [((8, 64), 480), ((64, 64), 512)])
def test_refusals(size: tuple[int, int], tier: int) -> None:
    with pytest.raises(UserError) as caught:
        plan_action_canvas(*size, tier)
    assert caught.value.code == "CX612"


def test_cover_needs_no_more_than_the_canvas() -> None:
    assert canvas.cover(clip(16, 16)[0], 48, 80).shape == (3, 48, 80)
    tracemalloc.start()
    try:
        for height, width in ((1, 60_000), (60_000, 1), (1, 1)):
            assert canvas.cover(clip(height, width)[0], 480, 832).shape == (3, 480, 832)
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()
    assert math.isclose(float(canvas.cover(np.full((9, 9, 3), 255, np.uint8), 16, 16).min()), 1.0)
