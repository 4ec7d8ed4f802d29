"""The codecs in ONNX: equal to the published ones in ONNX Runtime, built for TensorRT-RTX in their own type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from codec_engines import build, onnx_run, write_onnx
from codec_models import Sound, Video, clip, decode, encode, latents, published_decode, published_encode

from cosmos_export.ir.program import Program

pytestmark = pytest.mark.xdist_group("codecs")

Videos = Callable[[str], Video]
Sounds = Callable[[str], Sound]
TOLERANCE = 1e-4
# Every dim fixed, and every dim free.
PROFILES = ["frames=1,height=5,width=6,sound_len=13", "frames=1,height=4:6:12,width=4:7:20,sound_len=1:13:200"]


@pytest.fixture(scope="module")
def written(video: Videos, sound: Sounds, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    cache: dict[Any, dict[str, Path]] = {}

    def make(program: Program, compute: torch.dtype | None = None) -> dict[str, Path]:
        key = (id(program), compute)
        if key not in cache:
            cache[key] = write_onnx(program, tmp_path_factory.mktemp("onnx"), compute)
        return cache[key]

    return make


@pytest.mark.parametrize("name", ["float32", "growing"])
@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 5, 7)])
def test_video_in_onnx_runtime(
    video: Videos, written: Callable[..., dict[str, Path]], name: str, shape: tuple[int, int, int]
) -> None:
    """bf16 checkpoints run in fp32 on a CPU: compared with the published module in fp32 on the same weights."""
    made = video(name)
    latent, pixels = latents(made.codec, *shape), clip(4 * shape[0] - 3, *shape[1:])
    decoded = decode(made.decoder, onnx_run(written(made.decoder, torch.float32)), latent)
    assert (decoded - published_decode(made.codec, latent, torch.float32)).abs().max() <= TOLERANCE
    encoded = encode(made.encoder, onnx_run(written(made.encoder, torch.float32)), pixels)
    assert (encoded - published_encode(made.codec, pixels, torch.float32)).abs().max() <= TOLERANCE


def test_a_prefix_in_onnx_runtime_is_exact(video: Videos, written: Callable[..., dict[str, Path]]) -> None:
    made = video("growing")
    run = onnx_run(written(made.decoder, torch.float32))
    latent = latents(made.codec, 3, 4, 6)
    assert torch.equal(decode(made.decoder, run, latent[:, :, :2]), decode(made.decoder, run, latent)[:, :, :5])


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 7, 50])
def test_sound_in_onnx_runtime(sound: Sounds, written: Callable[..., dict[str, Path]], name: str, length: int) -> None:
    made = sound(name)
    latent = torch.randn(made.codec.config["vocoder_input_dim"], length, generator=torch.Generator().manual_seed(2))
    run = onnx_run(written(made.decoder, torch.float32))
    with torch.no_grad():
        expected = made.codec.sound(torch.float32).decode(latent)
    assert (run("sound_decoder", {"sound_latent": latent})["waveform"] - expected).abs().max() <= TOLERANCE


def test_the_graphs_of_a_codec_share_one_weight_file(video: Videos, written: Callable[..., dict[str, Path]]) -> None:
    made = video("growing")
    paths = written(made.decoder, torch.float32)
    models = [onnx.load(str(path), load_external_data=False) for path in paths.values()]
    stored = [
        {t.name: tuple((e.key, e.value) for e in t.external_data) for t in m.graph.initializer if t.external_data}
        for m in models
    ]
    assert stored[0].items() <= stored[1].items()
    # What upsamples in time has no part in the first frame.
    assert all("time_conv" in name for name in stored[1].keys() - stored[0].keys())


def test_convolutions_pad_themselves(video: Videos, written: Callable[..., dict[str, Path]]) -> None:
    """A separate Pad is a copy of the activations. Caches that begin with zeros are the only padded values."""
    first, following = (
        onnx.load(str(path), load_external_data=False)
        for path in written(video("growing").decoder, torch.float32).values()
    )
    assert not any(node.op_type == "Pad" for node in following.graph.node)
    padded = {node.output[0] for node in first.graph.node if node.op_type == "Pad"}
    assert padded and not any(padded & set(node.input) for node in first.graph.node if node.op_type == "Conv")


@pytest.mark.parametrize(
    ("name", "sound_name"), [("float32", "float32"), ("growing", "bfloat16")], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("profile", PROFILES, ids=["static", "dynamic"])
def test_engines_build(
    video: Videos, sound: Sounds, written: Callable[..., dict[str, Path]], name: str, sound_name: str, profile: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = video(name)
    for program in (made.decoder, made.encoder, sound(sound_name).decoder):
        for graph, path in written(program).items():
            report, plan = build(program, graph, path, profile)
            assert [tensor.name for tensor in report.inputs] == list(program.graphs[graph].inputs)
            assert [tensor.name for tensor in report.outputs] == list(program.graphs[graph].outputs)
            assert plan.activation_bytes > 0 and plan.allocations == 0 and plan.stream_capturable
