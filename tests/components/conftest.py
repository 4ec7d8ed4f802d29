"""Each codec is written and captured once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from codec_models import GROWING, Codec, Sound, Video, demo_codec, write_codec
from diffusers import AutoencoderKLWan

from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler.cache import default_graphs_folder
from cosmos_export.compiler.captures import capture_codec
from cosmos_export.ir.program import Program
from cosmos_export.ir.verifier import verify


def captured(name: str, codec: Codec) -> Program:
    return capture_codec(name, codec.config, codec.sources, default_graphs_folder())


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
        made = Video(codec, captured("vae-decoder", codec), captured("vae-encoder", codec))
        verify(made.decoder)
        verify(made.encoder)
        return made

    return make


@pytest.fixture(scope="session")
def sound(codecs: Callable[[str, str], Codec]) -> Callable[[str], Sound]:
    @cache
    def make(name: str) -> Sound:
        codec = codecs(name, "sound_tokenizer")
        made = Sound(codec, captured("sound-decoder", codec))
        verify(made.decoder)
        return made

    return make
