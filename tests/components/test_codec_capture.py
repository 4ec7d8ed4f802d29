"""The captured codecs are the published ones, bit for bit, and their streams are the whole clips.

chained        ≡  vae.decode / vae.encode of the whole clip      bitwise, fp32 and bf16
of the prefix  ≡  prefix of the whole                            bitwise
one frame      ≡  first latent of the padded clip                bitwise (i2v, policy)
five frames    ≡  first two latents of the padded clip           bitwise (v2v)
folded weights ≡  the weights the module computes                bitwise
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from codec_models import (
    WEIGHTS,
    Sound,
    Video,
    clip,
    decode,
    encode,
    interpret,
    latents,
    published_decode,
    published_encode,
)

from cosmos_export.capture.codec import capture_sound_decoder, capture_vae_decoder
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import run_graph
from cosmos_export.ir.spec import Transform
from cosmos_export.ir.text import print_program

pytestmark = pytest.mark.xdist_group("codecs")

Videos = Callable[[str], Video]
Sounds = Callable[[str], Sound]
SHAPES = [(1, 4, 4), (3, 6, 7), (5, 3, 5)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "growing": torch.bfloat16}
VIDEOS = ("float32", "growing")


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_frame_by_frame_is_decoding_the_clip(video: Videos, name: str, shape: tuple[int, int, int]) -> None:
    made = video(name)
    latent = latents(made.codec, *shape)
    pixels = decode(made.decoder, interpret(made.decoder), latent)
    assert torch.equal(pixels, published_decode(made.codec, latent, DTYPES[name]))
    assert pixels.shape == (1, 3, 4 * shape[0] - 3, 16 * shape[1], 16 * shape[2])
    assert pixels.std() > 0.01 and pixels.abs().max() <= 1


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_four_by_four_is_encoding_the_clip(video: Videos, name: str, shape: tuple[int, int, int]) -> None:
    made = video(name)
    pixels = clip(4 * shape[0] - 3, *shape[1:])
    latent = encode(made.encoder, interpret(made.encoder), pixels)
    assert torch.equal(latent, published_encode(made.codec, pixels, DTYPES[name]))
    assert latent.shape == (1, made.codec.config["z_dim"], *shape)


def test_decoding_a_prefix_is_the_prefix_of_decoding(video: Videos) -> None:
    made = video("growing")
    latent = latents(made.codec, 4, 4, 5)
    whole = decode(made.decoder, interpret(made.decoder), latent)
    for frames in (1, 2, 3):
        prefix = decode(made.decoder, interpret(made.decoder), latent[:, :, :frames])
        assert torch.equal(prefix, whole[:, :, : 4 * frames - 3])


@pytest.mark.parametrize("given", [1, 5], ids=["i2v-policy", "v2v"])
def test_given_frames_alone_are_the_padded_clip(video: Videos, given: int) -> None:
    """The pipeline repeats the last given frame to the length of the clip, encodes it all, and keeps these latents."""
    made = video("growing")
    pixels = clip(given, 5, 4)
    padded = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, 17 - given, -1, -1)], dim=2)
    kept = published_encode(made.codec, padded, torch.bfloat16)[:, :, : (given + 3) // 4]
    assert torch.equal(encode(made.encoder, interpret(made.encoder), pixels), kept)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 2, 31])
def test_sound_is_the_published_sound(sound: Sounds, name: str, length: int) -> None:
    made, dtype = sound(name), DTYPES[name]
    latent = torch.randn(made.codec.config["vocoder_input_dim"], length, generator=torch.Generator().manual_seed(1))
    waveform = run_graph(made.decoder.graphs["sound_decoder"], {"sound_latent": latent}, WEIGHTS)["waveform"]
    with torch.no_grad():
        expected = made.codec.sound(dtype).decode(latent.to(dtype))
    assert torch.equal(waveform, expected.float())
    assert waveform.shape == (2, 1920 * length)
    # The demo's waveform is not all clipped: a test on ±1 alone would see nothing.
    assert waveform.std() > 0.02 and waveform.abs().mean() < 0.9


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_folded_weights_are_those_the_module_computes(sound: Sounds, name: str) -> None:
    made, dtype = sound(name), DTYPES[name]
    model = made.codec.sound(dtype)
    folded = {
        binding.keys[1].removesuffix(".weight_v"): WEIGHTS(binding)
        for node in made.decoder.graphs["sound_decoder"].weights.values()
        if (binding := node.meta["weight"]).transform is Transform.WEIGHT_NORM
    }
    assert len(folded) == 2 + 5 * 7
    for path, weight in folded.items():
        module = model.get_submodule(path)
        expected = torch._weight_norm(module.weight_v, module.weight_g, 0)
        assert weight.dtype == torch.float32 and torch.equal(weight.to(dtype), expected), path


def test_a_stream_is_a_loop_over_its_caches(video: Videos) -> None:
    made = video("growing")
    for program, cached in ((made.decoder, 24), (made.encoder, 16)):
        first, following = program.graphs.values()
        assert list(following.inputs)[1:] == [edge.input for edge in program.edges]
        assert program.loop.carried == {edge.input: edge.output for edge in program.edges}
        assert len(program.edges) == cached
        for edge in program.edges:
            specs = {str(spec_of(n)) for n in (first.outputs[edge.output], following.outputs[edge.output])}
            assert specs == {str(spec_of(following.inputs[edge.input]))}
        assert set(program.dims) == {"height", "width"}, "nothing of a stream grows with the clip"


def test_every_tensor_is_read_or_said_not_to_be(video: Videos, sound: Sounds) -> None:
    for codec, program in (
        (video("float32").codec, video("float32").decoder),
        (video("float32").codec, video("float32").encoder),
        (sound("float32").codec, sound("float32").decoder),
    ):
        assert program.bound_keys() | program.unused_keys.keys() == codec.sources.keys()
        assert not program.bound_keys() & program.unused_keys.keys()
        assert all("encoder." in k or "quant_conv." in k or "decoder." in k for k in program.unused_keys)
    assert not any(k.startswith("decoder.") for k in video("float32").decoder.unused_keys)


def test_capture_is_deterministic(sound: Sounds) -> None:
    made = sound("float32")
    again = capture_sound_decoder(made.codec.config, made.codec.sources)
    assert print_program(again) == print_program(made.decoder)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_pixels_that_do_not_divide_are_refused(video: Videos) -> None:
    made = video("float32")
    with pytest.raises(ValueError, match="`pixels` has size 90 on axis 3, expected a multiple of 16"):
        interpret(made.encoder)("vae_encoder_first", {"pixels": torch.zeros(1, 3, 1, 90, 96)})


def test_frames_that_are_not_four_are_refused(video: Videos) -> None:
    made = video("float32")
    with pytest.raises(ValueError, match="`pixels` has size 3 on axis 2, expected 4"):
        encode(made.encoder, interpret(made.encoder), clip(4, 4, 4))


def test_caches_of_another_size_are_refused(video: Videos) -> None:
    made = video("float32")
    run = interpret(made.decoder)
    state = run("vae_decoder_first", {"latent": latents(made.codec, 1, 4, 4)})
    caches = {edge.input: state[edge.output] for edge in made.decoder.edges}
    with pytest.raises(ValueError, match="cache_conv_in"):
        run("vae_decoder_next", {"latent": latents(made.codec, 1, 5, 4), **caches})


def _refusal(config: dict[str, Any], sources: dict[str, Any]) -> str:
    with pytest.raises((UserError, UnsupportedError)) as caught:
        capture_vae_decoder(config, sources)
    assert caught.value.hint
    return str(caught.value)


def test_a_checkpoint_that_does_not_fit_is_refused(codecs: Callable[[str, str], Any]) -> None:
    codec = codecs("float32", "vae")
    part = {k: v for k, v in codec.sources.items() if k != "decoder.conv_in.weight"}
    assert "vae/ lacks 1 tensors" in _refusal(codec.config, part)
    wider = codec.config | {"decoder_base_dim": 16}
    assert _refusal(wider, codec.sources).startswith("CX214: vae/: `decoder.")
