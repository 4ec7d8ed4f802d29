"""Clean latents of clips, by the checkpoint's own autoencoders, which stay in memory for their encoders alone."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from cosmos_export.calibration.weights import read_tensor
from cosmos_export.capture.codec import empty_video_autoencoder
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.runtime.canvas import Float

_ENCODER = ("encoder.", "quant_conv.")
_SOUND_ENCODER = "encoder."


def hears(checkpoint: Checkpoint) -> bool:
    """Whether ``checkpoint`` has what turns sound into latents."""
    return any(name.startswith(_SOUND_ENCODER) for name in checkpoint.component_tensors.get("sound_tokenizer", ()))


class SoundEncoder:
    """Waveforms to latents in float32; the mode of the distribution, never a sample."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from diffusers import Cosmos3AVAEAudioTokenizer

        config = checkpoint.codec_configs["sound_tokenizer"]
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore", FutureWarning)
            tokenizer: Any = Cosmos3AVAEAudioTokenizer.from_config({**config, "encoder_enabled": True}).eval()
        tokenizer.decoder = None
        entries = checkpoint.component_tensors["sound_tokenizer"]
        state = {name: read_tensor(e).float() for name, e in entries.items() if name.startswith(_SOUND_ENCODER)}
        tokenizer.load_state_dict(state, assign=True, strict=True)
        self._tokenizer = tokenizer.requires_grad_(False)

    def __call__(self, waveform: Float) -> Float:
        """float32 [2, n·hop] in [−1, 1] to [C, n]."""
        with torch.no_grad():
            latent: Float = self._tokenizer.encode(torch.from_numpy(waveform)[None]).latent_dist.mode()[0].numpy()
        return latent


class Encoder:
    """Clips to normalised latents in float32; the mode of the distribution, never a sample."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if "vae" not in checkpoint.components:
            raise UnsupportedError(
                "CX345",
                f"{checkpoint.root} has no vae/, so clips cannot become latents",
                "calibrate on recorded latents (.safetensors), or complete the checkpoint",
            )
        vae: Any = empty_video_autoencoder(checkpoint.codec_configs["vae"])
        vae.decoder = vae.post_quant_conv = None
        entries = checkpoint.component_tensors["vae"]
        state = {name: read_tensor(e).float() for name, e in entries.items() if name.startswith(_ENCODER)}
        vae.load_state_dict(state, assign=True, strict=True)
        self._vae = vae.requires_grad_(False)
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean).view(shape)
        self._std = torch.tensor(vae.config.latents_std).view(shape)

    def __call__(self, pixels: Float) -> Float:
        """float32 [3, 1 + 4·n, H, W] in [−1, 1] to [1, C, 1 + n, H/16, W/16]."""
        with torch.no_grad():
            mode = self._vae.encode(torch.from_numpy(np.ascontiguousarray(pixels))[None]).latent_dist.mode()
            latent: Float = ((mode - self._mean) / self._std).numpy()
        return latent
