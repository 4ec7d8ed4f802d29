"""Makes the micro world's checkpoint from nothing, or continues where a run was stopped.

    python -m benchmarks.microworld.make FOLDER [--steps N] [--vae-steps N]

The parts in order, each seeded and each left out where FOLDER has its result: the video autoencoder, the latents of the
clips, the audio autoencoder, the transformer with the reasoner. The checkpoint is ``FOLDER``/checkpoint, with its card.
One thread: two threads would take more CPU time for the same, and give other weights.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from benchmarks.microworld import assemble, card, latents, sound, train, vae

VAE_STEPS, SOUND_STEPS, STEPS = 6000, 600, 20_000
SCENES, PUSHES = 4000, 3000


def make(folder: Path, steps: int, vae_steps: int, seed: int) -> Path:
    """Trains what is missing and writes the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").is_dir():
        vae.train(folder, vae_steps, seed)
    if not (folder / "latents.safetensors").is_file():
        latents.write(folder, SCENES, PUSHES, seed)
    if not (folder / "sound_tokenizer").is_dir():
        sound.train(folder, SOUND_STEPS, seed)
    train.train(folder, steps, seed)
    return write(folder, seed)


def write(folder: Path, seed: int) -> Path:
    """The checkpoint of what is trained so far."""
    output = folder / "checkpoint"
    if output.is_dir():
        shutil.rmtree(output)
    assemble.assemble(folder, output)
    card.write(folder, output, seed)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--so-far", action="store_true", help="train nothing: write the checkpoint of what there is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.so_far:
        print(write(arguments.folder, arguments.seed))
        return
    print(make(arguments.folder, arguments.steps, arguments.vae_steps, arguments.seed))


if __name__ == "__main__":
    main()
