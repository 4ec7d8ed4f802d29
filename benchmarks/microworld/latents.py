"""Encodes the clips that the transformer learns from, once.

    python -m benchmarks.microworld.latents FOLDER [--scenes N] [--pushes N]

Reads ``FOLDER``/vae and writes ``FOLDER``/latents.safetensors: normalized latents, and the seed that their clips follow
from. Frames of a push are encoded in the corner of a larger canvas, as the pipeline does, and cropped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from benchmarks.microworld import vae as codec
from benchmarks.microworld import world

PART = 250
"""Clips of a part, after which an interrupted run continues."""
CANVAS = 96
"""Pixels of the canvas of a push here. The pipeline's has 256; ground further away changes nothing that can be seen."""


def on_canvas(frames: NDArray[np.uint8], canvas: int) -> NDArray[np.uint8]:
    """Frames in the corner of a larger square whose rest repeats their edges."""
    extra = canvas - frames.shape[1]
    return np.pad(frames, ((0, 0), (0, extra), (0, extra), (0, 0)), mode="edge")


def encode(vae: Any, frames: NDArray[np.uint8], canvas: int = world.SIZE) -> torch.Tensor:
    """Normalized latents [16, 5, 4, 4] of frames."""
    size = world.SIZE // 16
    pixels = codec.frames_to_tensor(on_canvas(frames, canvas))
    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    with torch.no_grad():
        latents = codec.encode(vae, pixels)[0, ..., :size, :size].float()
    return (latents - mean) / deviation


def clips(scenes: int, pushes: int, seed: int) -> list[world.Clip]:
    """The clips of training, in the order of the file."""
    random = np.random.default_rng([seed, 1])
    return [world.sample(random, "scene", False) for _ in range(scenes)] + [
        world.sample(random, "push", False) for _ in range(pushes)
    ]


def write(folder: Path, scenes: int, pushes: int, seed: int = 0) -> None:
    """Encodes the clips of training with ``folder``/vae. Parts that a run before this one finished are kept."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder / "vae").float()
    chosen, parts = clips(scenes, pushes, seed), folder / "latents"
    parts.mkdir(exist_ok=True)
    files = [parts / f"{scenes}-{pushes}-{seed}-{begin}.safetensors" for begin in range(0, len(chosen), PART)]
    for begin, file in zip(range(0, len(chosen), PART), files, strict=True):
        if file.is_file():
            continue
        found = [
            encode(vae, world.render(clip), world.SIZE if clip.actions is None else CANVAS).to(torch.float16)
            for clip in chosen[begin : begin + PART]
        ]
        temporary = file.with_suffix(".tmp")
        save_file({"latents": torch.stack(found)}, temporary)
        temporary.replace(file)
        print(f"{begin + len(found)} of {len(chosen)} clips", flush=True)
    latents = torch.cat([load_file(file)["latents"] for file in files])
    save_file({"latents": latents, "count": torch.tensor([scenes, pushes, seed])}, folder / "latents.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--pushes", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write(arguments.folder, arguments.scenes, arguments.pushes, arguments.seed)


if __name__ == "__main__":
    main()
