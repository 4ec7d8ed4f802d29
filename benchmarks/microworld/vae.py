"""Trains the video autoencoder of the micro world.

    python -m benchmarks.microworld.vae FOLDER [--steps N]

Most steps see squares of 32 pixels around the shape, which costs a quarter of a whole picture; the others see whole
pictures and whole clips, because errors of the feature caches grow from chunk to chunk. The middle's attention stays at
zero: it would see 4 positions in training, 16 in a picture and 256 in the canvas of an action, and differ in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.microworld import state, world

CONFIG: dict[str, Any] = {
    "base_dim": 8, "decoder_base_dim": 12, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
    "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0, "is_residual": True,
    "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
}  # fmt: skip
SHAPE_WEIGHT = 4.0
"""How much more a pixel of the shape counts than one of the ground."""
NOISE = 0.1
"""Deviation of what is added to latents before decoding: the transformer's are never exact. None is added at first:
noise keeps an untrained encoder from ever beginning to say anything."""
SHORT_SHARE = 0.2
"""The share of steps that see 5 frames; the noise rises over as many more."""
ENCODER_SHARE = 0.45
"""The share of steps after which the encoder is frozen."""


def make(seed: int = 0) -> Any:
    """An untrained autoencoder whose middle attention adds nothing."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    channels = CONFIG["z_dim"]
    vae = AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    for part in (vae.encoder, vae.decoder):
        for attention in part.mid_block.attentions:
            for weight in attention.parameters():
                weight.requires_grad_(False)
            torch.nn.init.zeros_(attention.proj.weight)
            torch.nn.init.zeros_(attention.proj.bias)
    return vae


def batch(step: int, steps: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixels [N, 3, frames, size, size] in ±1 of a step and the weight of each pixel [N, 1, frames, size, size]."""
    random, _ = state.randomness(seed, step)
    whole = step >= steps * ENCODER_SHARE and step % 4 == 3
    frames = 5 if step < steps * SHORT_SHARE else 9
    size, frames, count = (world.SIZE, world.FRAMES, 2) if whole else (32, frames, 8)
    pixels, weights = [], []
    for _ in range(count):
        clip = world.sample(random, "scene" if random.random() < 0.6 else "push", held_out=False)
        centres = clip.centres[int(random.integers(0, world.FRAMES - frames + 1)) :][:frames]
        offset = np.zeros(2)
        if not whole:  # the shape is inside in most frames; squares may reach beyond the picture, where there is ground
            ends = centres.max(0) - (size - world.LOW), centres.min(0) - world.LOW
            offset = np.floor(random.uniform(np.minimum(*ends), np.maximum(*ends)))
        covered = world.coverage(clip.what.shape, centres - offset, size, size)
        pixels.append(np.moveaxis(world.paint(clip.what.colour, covered), -1, 0).astype(np.float32) / 127.5 - 1)
        weights.append((1 + (SHAPE_WEIGHT - 1) * (covered > 0)).astype(np.float32)[None])
    return np.stack(pixels), np.stack(weights)


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The means of the posterior, [N, 16, frames, height/16, width/16]."""
    means: torch.Tensor = vae._encode(pixels).chunk(2, dim=1)[0]
    return means


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pixels as the decoder gives them, without the final clamp, which has no gradient."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    pixels: torch.Tensor = unpatchify(torch.cat(frames, 2), patch_size=vae.config.patch_size)
    return pixels


def losses(vae: Any, step: int, steps: int, seed: int) -> tuple[torch.Tensor, Mapping[str, float]]:
    """The loss of a step and what to log."""
    arrays = batch(step, steps, seed)
    pixels, weights = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
    _, random = state.randomness(seed, step)
    frozen = step >= steps * ENCODER_SHARE
    with torch.set_grad_enabled(not frozen):
        latents = encode(vae, pixels)
    noise = NOISE * min(1.0, max(0.0, step / (steps * SHORT_SHARE) - 1))
    error = decode(vae, latents + noise * torch.randn(latents.shape, generator=random)) - pixels
    loss = (weights * (0.3 * error.abs() + 2 * error**2)).mean() / weights.mean() + 1e-4 * (latents**2).mean()
    shape = weights.expand_as(error) > 1
    with torch.no_grad():
        figures = {
            "loss": float(loss),
            "psnr": _psnr(error),
            "psnr_shape": _psnr(error[shape]),
            "latents": float(latents.std()),
        }
    return loss, figures


def _psnr(error: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (error**2).mean()))


def statistics(vae: Any, seed: int, clips: int = 200) -> tuple[list[float], list[float]]:
    """Mean and deviation of each latent channel over whole clips."""
    random = np.random.default_rng(seed + 1)
    found = []
    with torch.no_grad():
        for index in range(clips):
            clip = world.sample(random, "push" if index % 3 == 0 else "scene", held_out=False)
            found.append(encode(vae, frames_to_tensor(world.render(clip))))
    values = torch.cat(found).transpose(0, 1).flatten(1)
    return [round(float(v), 5) for v in values.mean(1)], [round(float(v), 5) for v in values.std(1)]


def frames_to_tensor(frames: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels [1, 3, frames, height, width] in ±1 of frames [frames, height, width, 3]."""
    return torch.from_numpy(np.moveaxis(frames, -1, 0).astype(np.float32) / 127.5 - 1)[None]


def train(folder: Path, steps: int, seed: int = 0) -> Any:
    """Trains, or continues, and writes the averaged weights in the published form to ``folder``/vae."""
    vae = make(seed)
    weights = {name: weight for name, weight in vae.named_parameters() if weight.requires_grad}
    training = state.Training(
        folder / "vae-state", weights, state.adamw(weights, 3e-3), state.Schedule(steps, 3e-3, decay=0.7)
    )
    training.resume()
    training.run(lambda step: losses(vae, step, steps, seed))
    vae.load_state_dict(training.averaged, strict=False)
    mean, deviation = statistics(vae, seed)
    vae.register_to_config(latents_mean=mean, latents_std=deviation)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    return vae


if __name__ == "__main__":
    state.command(train, __doc__, steps=3000)
