"""Each codec is written and captured once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from codec_models import GROWING, Codec, Sound, Video, demo_codec, write_codec
from diffusers import AutoencoderKLWan

from cosmos_export.capture.codec import capture_sound_decoder, capture_vae_decoder, capture_vae_encoder
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.ir.verifier import verify


@pytest.fixture(scope="session")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Codec]:
    """``codecs(name, component)``: `float32` and `bfloat16` are demo checkpoints, `growing` is a bf16 video codec."""
    root = tmp_path_factory.mktemp("codecs")

    @cache
    def make(name: str, component: str) -> Codec:
        if name == "growing":
            return write_codec(root / name, AutoencoderKLWan, GROWING, "BF16")
        if not (root / name).exists():
            write_demo_checkpoint(root / name, dtype=name)
        return demo_codec(root / name, component)

    return make


@pytest.fixture(scope="session")
def video(codecs: Callable[[str, str], Codec]) -> Callable[[str], Video]:
    @cache
    def make(name: str) -> Video:
        codec = codecs(name, "vae")
        made = Video(
            codec, capture_vae_decoder(codec.config, codec.sources), capture_vae_encoder(codec.config, codec.sources)
        )
        verify(made.decoder)
        verify(made.encoder)
        return made

    return make


@pytest.fixture(scope="session")
def sound(codecs: Callable[[str, str], Codec]) -> Callable[[str], Sound]:
    @cache
    def make(name: str) -> Sound:
        codec = codecs(name, "sound_tokenizer")
        made = Sound(codec, capture_sound_decoder(codec.config, codec.sources))
        verify(made.decoder)
        return made

    return make
