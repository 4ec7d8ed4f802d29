"""Codecs of the published widths, random weights: they build, and memory is that of one latent frame at 720p.

The plan says what a call needs; there is no GPU here. Sizes in GB are of TensorRT-RTX 1.7.1, compute capability 12.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from codec_engines import build, write_onnx
from codec_models import PUBLISHED, write_codec
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer

from cosmos_export.capture.codec import capture_sound_decoder, capture_vae_decoder, capture_vae_encoder
from cosmos_export.diagnostics import ToolError

pytestmark = pytest.mark.slow
PROFILE_720P = "720p-189f+sound"
SOUND_720P = "frames=48,height=45,width=80,sound_len=197"


@pytest.fixture(autouse=True)
def builder() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def test_video_decoder(tmp_path: Path) -> None:
    codec = write_codec(tmp_path / "vae", AutoencoderKLWan, PUBLISHED, "BF16", "decoder")
    program = capture_vae_decoder(codec.config, codec.sources)
    paths = write_onnx(program, tmp_path / "onnx")
    # One head of 1,024: no fused kernel has it, and the builder says so instead of storing scores unasked.
    with pytest.raises(ToolError, match=r"CX421.*not supported by a dedicated kernel"):
        build(program, "vae_decoder_first", paths["vae_decoder_first"], PROFILE_720P, decomposable=False)
    report, plan = build(program, "vae_decoder_next", paths["vae_decoder_next"], PROFILE_720P)
    # Frames are not a dim of the graph, so no clip makes it more; the widened copies of norms are not stored.
    assert plan.activation_bytes < 5.2e9
    assert plan.stream_capturable and plan.allocations == 0 and not plan.dequantize
    assert report.size_bytes < 1.05 * (tmp_path / "onnx" / "codec.weights").stat().st_size


def test_video_encoder(tmp_path: Path) -> None:
    codec = write_codec(tmp_path / "vae", AutoencoderKLWan, PUBLISHED, "BF16", "encoder")
    program = capture_vae_encoder(codec.config, codec.sources)
    ceilings = {"vae_encoder_first": 0.6e9, "vae_encoder_next": 2.8e9}
    for name, path in write_onnx(program, tmp_path / "onnx").items():
        _, plan = build(program, name, path, PROFILE_720P)
        assert plan.activation_bytes < ceilings[name]


def test_sound_decoder(tmp_path: Path) -> None:
    codec = write_codec(tmp_path / "sound_tokenizer", Cosmos3AVAEAudioTokenizer, {}, "BF16", "decoder")
    program = capture_sound_decoder(codec.config, codec.sources)
    paths = write_onnx(program, tmp_path / "onnx")
    report, plan = build(program, "sound_decoder", paths["sound_decoder"], SOUND_720P)
    assert plan.activation_bytes < 1.0e9
    # The folded weights are stored in fp32 beside the model and in bf16 in the engine.
    assert report.size_bytes < 0.55 * (tmp_path / "onnx" / "codec.weights").stat().st_size
