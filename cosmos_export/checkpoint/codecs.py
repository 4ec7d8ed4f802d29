"""The codecs beside the transformer: which folder of a checkpoint each is made from, and which of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.safetensors_header import TensorEntry

_QUANT = ("quant_conv.", "post_quant_conv.")
"""Convolutions that belong to both halves of the video autoencoder."""


@dataclass(frozen=True)
class CodecPart:
    """The parts of the checkpoint that a codec is made from."""

    folder: str
    tensors: tuple[str, ...]
    """Its tensors begin with one of these; the others of the folder are another codec's."""
    width: tuple[str, str]
    """A key of its configuration and the transformer's that must be equal: channels of the latents."""
    modality: str = "vision"


CODECS: Mapping[str, CodecPart] = MappingProxyType(
    {
        "vae-decoder": CodecPart("vae", ("decoder.", *_QUANT), ("z_dim", "latent_channel")),
        "vae-encoder": CodecPart("vae", ("encoder.", *_QUANT), ("z_dim", "latent_channel")),
        "sound-decoder": CodecPart("sound_tokenizer", ("decoder.",), ("vocoder_input_dim", "sound_dim"), "sound"),
    }
)


def codec_tensors(checkpoint: Checkpoint, name: str) -> dict[str, TensorEntry]:
    """The tensors that codec ``name`` computes with."""
    part = CODECS[name]
    tensors = checkpoint.component_tensors[part.folder]
    return {key: entry for key, entry in tensors.items() if key.startswith(part.tensors)}
