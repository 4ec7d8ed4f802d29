"""Codecs to test with: the demo checkpoint's, and one of growing width; and streams run by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer

from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.random_weights import produce
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, write_json, write_shards
from cosmos_export.checkpoint.shards import read_shards
from cosmos_export.ir.interpreter import read_weights, run_graph
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightSource
from cosmos_export.targets.onnx.weights import read_source

torch.set_num_threads(1)
WEIGHTS = read_weights(read_source)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
STEM = "diffusion_pytorch_model"
Tensors = Mapping[str, torch.Tensor]
Run = Callable[[str, Tensors], Tensors]

# The published proportions (widths grow inwards, shortcuts change width), small.
GROWING: dict[str, Any] = {
    "base_dim": 4, "decoder_base_dim": 6, "z_dim": 3, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True, True], "dropout": 0.0, "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
    "latents_mean": [0.3, -0.2, 0.1], "latents_std": [0.7, 1.1, 2.3],
}  # fmt: skip
PUBLISHED = GROWING | {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "num_res_blocks": 2,
    "latents_mean": [0.01 * i for i in range(48)], "latents_std": [1 + 0.01 * i for i in range(48)],
}  # fmt: skip


@dataclass(frozen=True)
class Codec:
    """A component folder: its configuration and where its tensors lie."""

    folder: Path
    config: dict[str, Any]
    sources: dict[str, WeightSource]

    def video(self, dtype: torch.dtype) -> AutoencoderKLWan:
        return AutoencoderKLWan.from_pretrained(self.folder, torch_dtype=dtype).eval()

    def sound(self, dtype: torch.dtype) -> Cosmos3AVAEAudioTokenizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return Cosmos3AVAEAudioTokenizer.from_pretrained(self.folder, torch_dtype=dtype).eval()


@dataclass(frozen=True)
class Video:
    codec: Codec
    decoder: Program
    encoder: Program


@dataclass(frozen=True)
class Sound:
    codec: Codec
    decoder: Program


def read_codec(folder: Path) -> Codec:
    entries = read_shards(folder, STEM).tensors()
    sources = {e.name: WeightSource(e.name, e.file, e.offset, DTYPES[e.dtype], tuple(e.shape)) for e in entries}
    return Codec(folder, json.loads((folder / "config.json").read_text()), sources)


def demo_codec(checkpoint: Path, component: str) -> Codec:
    """The component as a build finds it: through the checkpoint reader."""
    opened = open_checkpoint(checkpoint)
    codec = read_codec(checkpoint / component)
    assert codec.sources.keys() == opened.component_tensors[component].keys()
    return codec


def write_codec(folder: Path, model_class: Any, config: Mapping[str, Any], dtype: str, part: str = "") -> Codec:
    """Random weights, streamed, of the tensors whose name begins with ``part``, or all."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = model_class(**config)
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    folder.mkdir()
    write_json(folder / "config.json", json.loads(model.to_json_string()))
    specs = [
        TensorHeader(name, dtype, shape)
        for name, shape in names.items()
        if name.startswith((part, "quant_conv", "post_quant_conv"))
    ]
    write_shards(folder, STEM, specs, produce(0), 10**11)
    return read_codec(folder)


def pipeline_statistics(config: Mapping[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse deviation of the latents as the published pipeline makes them."""
    mean = torch.tensor(config["latents_mean"], dtype=dtype)
    inverse = 1.0 / torch.tensor(config["latents_std"], dtype=dtype)
    return mean.view(1, -1, 1, 1, 1), inverse.view(1, -1, 1, 1, 1)


def published_decode(codec: Codec, latent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The pipeline's own lines: normalised latents of a whole clip to pixels."""
    mean, inverse = pipeline_statistics(codec.config, dtype)
    with torch.no_grad():
        decoded: torch.Tensor = codec.video(dtype).decode(latent.to(dtype) / inverse + mean).sample
    return decoded.to(latent.dtype)


def published_encode(codec: Codec, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The pipeline's own lines: pixels of a whole clip to normalised latents."""
    mean, inverse = pipeline_statistics(codec.config, dtype)
    with torch.no_grad():
        mode = codec.video(dtype).encode(pixels.to(dtype)).latent_dist.mode()
        normalised: torch.Tensor = (mode - mean) * inverse
    return normalised.to(pixels.dtype)


def interpret(program: Program, compute: torch.dtype | None = None) -> Run:
    return lambda name, inputs: run_graph(program.graphs[name], inputs, WEIGHTS, compute=compute)


def run_stream(program: Program, run: Run, value: str, chunks: Sequence[torch.Tensor], result: str) -> torch.Tensor:
    """The first graph on the first chunk, the next one on every further chunk with the caches of the call before."""
    first, following = program.graphs
    outputs: list[torch.Tensor] = []
    state: Tensors = {}
    for chunk in chunks:
        caches = {edge.input: state[edge.output] for edge in program.edges} if outputs else {}
        state = run(following if outputs else first, {value: chunk, **caches})
        outputs.append(state[result])
    return torch.cat(outputs, dim=2)


def decode(program: Program, run: Run, latent: torch.Tensor) -> torch.Tensor:
    return run_stream(program, run, "latent", latent.split(1, dim=2), "pixels")


def encode(program: Program, run: Run, pixels: torch.Tensor) -> torch.Tensor:
    rest = pixels[:, :, 1:].split(4, dim=2) if pixels.shape[2] > 1 else ()
    return run_stream(program, run, "pixels", [pixels[:, :, :1], *rest], "latent")


def latents(codec: Codec, frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames + height)
    return torch.randn(1, codec.config["z_dim"], frames, height, width, generator=generator)


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    """Pixels for a latent grid of ``height`` × ``width``."""
    generator = torch.Generator().manual_seed(frames + height)
    return torch.rand(1, 3, frames, 16 * height, 16 * width, generator=generator) * 2 - 1
