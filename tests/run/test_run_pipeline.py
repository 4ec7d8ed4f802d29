"""Requests against the published pipeline on the demo checkpoint: what it encodes, keeps clean and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_samples
import torch
from diffusers import Cosmos3OmniPipeline
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
from PIL import Image
from run_samples import MARK, ROBOT, manifest

from cosmos_export.bundle import BundleFiles
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime import media, read_media
from cosmos_export.runtime.frontend import prepare
from cosmos_export.runtime.request import Request


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = write_demo_checkpoint(tmp_path_factory.mktemp("demo") / "omni", dtype="float32")
    return Cosmos3OmniPipeline.from_pretrained(root)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = run_samples.tokenizer(tmp_path_factory.mktemp("files"))
    media.write_png(root / "image.png", run_samples.picture(64, 96)[0], MARK)
    media.write_png(root / "robot.png", run_samples.picture(150, 330)[0], MARK)
    media.write_mp4(root / "clip.mp4", [run_samples.picture(64, 96, 12)], 24.0, MARK)
    media.write_mp4(root / "robot.mp4", [run_samples.picture(150, 330, 17)], 10.0, MARK)
    return root


@torch.no_grad()
def prepared(pipeline: Any, **arguments: Any) -> tuple[Any, ...]:
    """Latents, sound and action of the pipeline, and its masks."""
    result: tuple[Any, ...] = pipeline.prepare_latents(device="cpu", dtype=torch.float32, **arguments)
    return result


@torch.no_grad()
def agree(pipeline: Any, request: Request, sound_len: int, expected: tuple[Any, ...]) -> None:
    """The same shapes, the same clean frames, and from the request's pixels the same clean latents."""
    latents, sound, action, fps, _, mask, _, action_mask, domain, _, raw_dim, _ = expected
    channels = latents.shape[1]
    assert latents.shape == (1, channels, (request.frames - 1) // 4 + 1, request.height, request.width)
    assert fps == request.fps
    assert tuple(torch.nonzero(mask[:, 0, 0]).flatten().tolist()) == request.clean_frames
    assert (None if sound is None else sound.shape[1]) == (sound_len or None)
    if request.pixels is not None:
        encoded = pipeline._encode_video(torch.from_numpy(request.pixels))[..., : request.height, : request.width]
        np.testing.assert_allclose(encoded, latents[:, :, list(request.clean_frames)], atol=1e-5)
    if request.action is not None:
        assert (action.shape[0], int(domain), raw_dim) == (
            request.action.rows, request.action.domain, request.action.raw_dim,
        )  # fmt: skip
        assert bool(action_mask.all()) == (request.action.given is not None)
        if request.action.given is not None:
            np.testing.assert_array_equal(action[:, :raw_dim], request.action.given)


def pictures(path: Path) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in read_media.read_clip(path, 1000).frames]


def test_text(pipeline: Any, files: Path) -> None:
    found = prepare(GenerateOptions("x", frames=21, fps=30.0, sound=True), BundleFiles(files, manifest()))
    expected = prepared(pipeline, num_frames=21, height=48, width=80, fps=30.0, enable_sound=True)
    agree(pipeline, found.request, found.sound_len, expected)


def test_image(pipeline: Any, files: Path) -> None:
    found = prepare(GenerateOptions("x", image=files / "image.png"), BundleFiles(files, manifest()))
    with Image.open(files / "image.png") as image:
        expected = prepared(pipeline, image=image, num_frames=9, height=48, width=80)
    agree(pipeline, found.request, 0, expected)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_clip(pipeline: Any, files: Path, keep: Any) -> None:
    found = prepare(GenerateOptions("x", video=files / "clip.mp4", keep=keep), BundleFiles(files, manifest()))
    clip = pictures(files / "clip.mp4")
    expected = prepared(pipeline, video=clip, condition_video_keep=keep, num_frames=9, height=48, width=80)
    agree(pipeline, found.request, 0, expected)


@pytest.mark.parametrize("mode", ["policy", "forward-dynamics", "inverse-dynamics"])
def test_action(pipeline: Any, files: Path, mode: str) -> None:
    source: dict[str, Any] = {"image": files / "robot.png"}
    condition: dict[str, Any] = {}
    if mode == "inverse-dynamics":
        source, condition = {"video": files / "robot.mp4"}, {"video": pictures(files / "robot.mp4")}
    else:
        condition = {"image": Image.open(files / "robot.png")}
    if mode == "forward-dynamics":
        rows = np.linspace(-1, 1, 90).reshape(9, 10).astype(np.float32)
        media.write_json(files / "rows.json", {"actions": rows.tolist()}, MARK)
        source["actions"] = files / "rows.json"
        condition["raw_actions"] = torch.from_numpy(rows)
    action = CosmosActionCondition(mode.replace("-", "_"), 16, "umi", resolution_tier=256, **condition)
    found = prepare(
        GenerateOptions("x", mode=mode, embodiment="umi", tier=256, **source),
        BundleFiles(files, manifest({"robot": ROBOT})),
    )
    agree(pipeline, found.request, 0, prepared(pipeline, action=action, fps=10.0))
