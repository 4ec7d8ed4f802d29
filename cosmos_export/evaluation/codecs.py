"""The codecs of a bundle in ONNX Runtime against diffusers' own in fp32, on a clip and a sound of a few rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos_export.evaluation.models import OnnxModel, Value
from cosmos_export.evaluation.parity import RUNTIME_LIMIT, Measured
from cosmos_export.evaluation.reference import relative_error
from cosmos_export.ir.program import Program

_ROWS, _COLUMNS, _FRAMES = 4, 5, 3
"""Size of the latents that are compared: nine frames of 64 × 80 pixels."""
_SOUND = 7


@dataclass(frozen=True)
class _Example:
    """The chunks of one input, what the published codec makes of all of them, and where it stands among the outputs."""

    input: str
    chunks: Sequence[torch.Tensor]
    output: str
    expected: torch.Tensor
    what: str


def codec_parity(name: str, program: Program, component: Path, folder: Path, suffix: str) -> Measured:
    """The models ``folder/GRAPHsuffix`` of codec ``name`` against the module in the checkpoint folder ``component``."""
    example = _EXAMPLES[name](component)
    found = _run(program, example, folder, suffix)
    error = relative_error({example.output: found}, {example.output: example.expected})
    return Measured(
        f"{name} in ONNX Runtime", "relative L2, fp32", error, RUNTIME_LIMIT, "one input", example.what, subject=name
    )


def _run(program: Program, example: _Example, folder: Path, suffix: str) -> torch.Tensor:
    """The first graph on the first chunk, the last one on each further with what the call before it carried over."""
    results: list[torch.Tensor] = []
    state: Mapping[str, Value] = {}
    chunks = list(example.chunks)
    for name in program.graphs:
        model = OnnxModel(folder / f"{name}{suffix}")
        mine, chunks = (chunks[:1], chunks[1:]) if not results else (chunks, [])
        for chunk in mine:
            carried = {edge.input: state[edge.output] for edge in program.edges} if results else {}
            state = model({example.input: np.ascontiguousarray(chunk.numpy()), **carried})
            results.append(torch.from_numpy(state[example.output]))
        del model
    return torch.cat(results, dim=2) if len(results) > 1 else results[0]


# -- the published codecs ---------------------------------------------------------------------------------------------


def _stock(component: Path, class_name: str) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about a weight norm that diffusers uses
        model = getattr(diffusers, class_name).from_pretrained(
            component, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, disable_mmap=True
        )
    return model.eval()


def _statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents, for [B, C, T, H, W]."""
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")) for name in ("mean", "std"))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


@torch.no_grad()
def _decoded_clip(component: Path) -> _Example:
    """Three latent frames decoded together."""
    vae = _stock(component, "AutoencoderKLWan")
    latent = _noise(1, vae.config.z_dim, _FRAMES, _ROWS, _COLUMNS)
    mean, std = _statistics(vae)
    pixels = vae.decode(latent * std + mean).sample
    return _Example("latent", torch.split(latent, 1, dim=2), "pixels", pixels, f"{_FRAMES} latent frames")


@torch.no_grad()
def _encoded_clip(component: Path) -> _Example:
    """Nine frames, given to the published encoder as its pipeline does: the last repeated up to a longer clip."""
    vae = _stock(component, "AutoencoderKLWan")
    scale, frames = vae.config.scale_factor_spatial, 4 * _FRAMES - 3
    pixels = _noise(1, 3, frames, scale * _ROWS, scale * _COLUMNS).clamp(-1, 1)
    padded = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, 8, -1, -1)], dim=2)
    mean, std = _statistics(vae)
    latent = (vae.encode(padded).latent_dist.mode()[:, :, :_FRAMES] - mean) / std
    chunks = [pixels[:, :, :1], *torch.split(pixels[:, :, 1:], 4, dim=2)]
    return _Example("pixels", chunks, "latent", latent, f"{frames} frames")


@torch.no_grad()
def _decoded_sound(component: Path) -> _Example:
    codec = _stock(component, "Cosmos3AVAEAudioTokenizer")
    latent = _noise(codec.config.vocoder_input_dim, _SOUND)
    return _Example("sound_latent", [latent], "waveform", codec.decode(latent[None])[0], f"{_SOUND} latents")


_EXAMPLES: Mapping[str, Callable[[Path], _Example]] = {
    "vae-decoder": _decoded_clip,
    "vae-encoder": _encoded_clip,
    "sound-decoder": _decoded_sound,
}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
