"""The click of the micro world as latents, and the audio autoencoder between those and sound.

    python -m benchmarks.microworld.sound FOLDER [--steps N]

Latents of sound are defined, not learned: the first channel says where a click begins, the second from which side.
Encoder and decoder are trained to keep to that.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.microworld import model, state, world

HOP = 1920
CONFIG: dict[str, Any] = {
    "dec_dim": 8, "dec_c_mults": [1, 1, 1, 1, 1], "enc_dim": 8, "enc_num_blocks": 1, "enc_c_mults": [1, 1, 1],
    "sampling_rate": world.SOUND_RATE, "vocoder_input_dim": model.CONFIG["sound_dim"], "dec_strides": [2, 4, 5, 6, 8],
    "dec_out_channels": 2, "hop_size": HOP, "enc_latent_dim": 2 * model.CONFIG["sound_dim"], "enc_strides": [4, 5, 6],
}  # fmt: skip
SIZES = (2.0, 1.0)
"""The first channel in the frame in which a click begins and in the next."""
NOISE = 0.2
CLICK_POWER = 0.004
"""The mean square of a part of a scene with a click in it."""


def latents(clip: world.Clip) -> torch.Tensor:
    """[8, 18]: 25 frames per second, zero where nothing is heard. The second channel is the first times the side, which
    is -1 to 1."""
    found = torch.zeros(model.CONFIG["sound_dim"], model.SOUND_FRAMES)
    seconds = world.click_seconds(clip)
    if seconds is None:
        return found
    frame = round(seconds * world.SOUND_FRAMES_PER_SECOND)
    side = float(world.DIRECTIONS[world.what_direction(clip)][0])
    for later, size in enumerate(SIZES):
        if frame + later < model.SOUND_FRAMES:
            found[0, frame + later] = size
            found[1, frame + later] = side * size
    return found


def make(seed: int = 0) -> Any:
    """An untrained audio autoencoder."""
    from diffusers import Cosmos3AVAEAudioTokenizer

    torch.manual_seed(seed + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return Cosmos3AVAEAudioTokenizer(**CONFIG)


def losses(
    codec: Any, step: int, seed: int, count: int = 4, frames: int = 6
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Both halves on parts of scenes: the decoder from noised latents, the encoder to latents."""
    random, torch_random = state.randomness(seed + 2, step)
    wanted, sounds = [], []
    for _ in range(count):
        clip = world.sample(random, "scene", False)
        wish = np.flatnonzero(latents(clip)[0].numpy())
        first = int(random.integers(0, model.SOUND_FRAMES - frames + 1))
        if len(wish):  # a click can be anywhere in the part, cut at its ends too
            first = int(np.clip(wish[0] - random.integers(-1, frames), 0, model.SOUND_FRAMES - frames))
        track = world.click_track(clip, model.SOUND_FRAMES * HOP)[:, first * HOP : (first + frames) * HOP]
        wanted.append(latents(clip)[:, first : first + frames])
        sounds.append(torch.from_numpy(np.ascontiguousarray(track)))
    target, sound = torch.stack(wanted), torch.stack(sounds)
    noised = target + NOISE * torch.randn(target.shape, generator=torch_random)
    decoder_loss = ((codec.decoder(noised) - sound) ** 2).mean() / CLICK_POWER
    peak = sound.abs().amax((1, 2), keepdim=True)
    encoded = codec._encode(sound / (peak + 1e-5) * 0.95).chunk(2, 1)[0]
    encoder_loss = ((encoded - target) ** 2).mean()
    figures = {"decoder": float(decoder_loss.detach()), "encoder": float(encoder_loss.detach())}
    return decoder_loss + encoder_loss, figures


def train(folder: Path, steps: int, seed: int = 0) -> Any:
    """Trains, or continues, and writes the averaged weights in the published form to ``folder``/sound_tokenizer."""
    codec = make(seed).train()
    weights = {name: weight for name, weight in codec.named_parameters() if weight.requires_grad}
    training = state.Training(
        folder / "sound-state", weights, state.adamw(weights, 3e-3), state.Schedule(steps, 3e-3, decay=0.7), 0.99
    )
    training.resume()
    training.run(lambda step: losses(codec, step, seed))
    codec.load_state_dict(training.averaged, strict=False)
    codec.eval().to(torch.bfloat16).save_pretrained(folder / "sound_tokenizer")
    return codec


if __name__ == "__main__":
    state.command(train, __doc__, steps=600)
