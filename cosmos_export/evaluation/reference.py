"""The published implementation as the reference: diffusers' transformer, called as diffusers' pipeline calls it."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class Reference:
    """The stock transformer of a checkpoint in one precision.

    ``values`` are its parameters where diffusers does not read the files itself: of an FP8 checkpoint, and of the first
    layers of one. Nothing else is in memory then.
    """

    def __init__(
        self, transformer_folder: Path, dtype: torch.dtype, values: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        from diffusers import Cosmos3OmniTransformer
        from diffusers.utils import logging

        # Its remarks on configuration keys that it does not know: the checkpoint reader has judged each of them.
        logging.set_verbosity_error()
        self.dtype = dtype
        if values is None:
            self.transformer = Cosmos3OmniTransformer.from_pretrained(
                transformer_folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, disable_mmap=True
            ).eval()
            return
        config = Cosmos3OmniTransformer.load_config(transformer_folder, local_files_only=True)
        config = {k: v for k, v in config.items() if k != "quantization_config"}
        with torch.device("meta"):  # no values that would be replaced at once
            model = Cosmos3OmniTransformer.from_config(config)
        bare = {"num_hidden_layers": 0, "vocab_size": 1, "num_embodiment_domains": 1}
        for name, buffer in Cosmos3OmniTransformer.from_config({**config, **bare}).named_buffers():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
        kept = tuple(model._keep_in_fp32_modules or ())
        typed = {
            name: value.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
            for name, value in values.items()
        }
        model.load_state_dict(typed, strict=True, assign=True)
        self.transformer = model.eval()

    @classmethod
    def of(cls, transformer: torch.nn.Module, dtype: torch.dtype) -> Reference:
        """The stock ``transformer`` as it is, which computes in ``dtype``, on its own device."""
        self = cls.__new__(cls)
        self.transformer, self.dtype = transformer.eval(), dtype
        return self

    def step(self, inputs: Mapping[str, torch.Tensor], fps: float) -> dict[str, torch.Tensor]:
        """Velocities of one step for the inputs of `Case.inputs`; modalities without rows are left out."""
        return self.velocities(self.arguments(inputs, fps))

    def arguments(self, inputs: Mapping[str, torch.Tensor], fps: float) -> dict[str, Any]:
        """The arguments with which the pipeline calls the transformer, on the transformer's device.

        Packing, indices and rotary positions come from the pipeline's own helpers; nothing of this project's.
        """
        from diffusers import Cosmos3OmniPipeline

        device = next(self.transformer.parameters()).device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        host: Any = SimpleNamespace(transformer=self.transformer, vae_scale_factor_temporal=4)
        pipeline: Any = Cosmos3OmniPipeline
        ids = inputs["input_ids"].tolist()
        text = pipeline._prepare_text_segment(host, ids, device)
        start, length = text["vision_start_temporal_offset"], text["und_len"]
        latent = inputs["vision_latent"].to(self.dtype)
        clean = (inputs["vision_mask"] == 0).nonzero().flatten().tolist()
        vision = pipeline._prepare_vision_segment(
            host, latent, False, start, fps, length, device, condition_frame_indexes=clean
        )
        timestep = inputs["timestep"]
        current = length + vision["num_vision_tokens"]
        positions = [text["text_mrope_ids"], vision["vision_mrope_ids"]]
        arguments = {k: v for k, v in vision.items() if k.startswith("vision_") and k != "vision_mrope_ids"}
        arguments |= {
            "vision_tokens": [latent],
            "vision_timesteps": timestep.expand(vision["num_noisy_vision_tokens"]),
        }
        sound = inputs.get("sound_latent")
        if sound is not None and sound.shape[1]:
            rate = self.transformer.config.sound_latent_fps
            segment = pipeline._prepare_sound_segment(host, sound, start, rate, current, device)
            positions.append(segment["sound_mrope_ids"])
            arguments |= {k: v for k, v in segment.items() if k not in ("sound_mrope_ids", "sound_len")}
            arguments |= {"sound_tokens": [sound.to(self.dtype)], "sound_timesteps": timestep.expand(sound.shape[1])}
            current += sound.shape[1]
        action = inputs.get("action_latent")
        if action is not None and action.shape[0]:
            clean = (inputs["action_mask"] == 0).nonzero().flatten().tolist()
            segment = pipeline._prepare_action_segment(host, action, clean, start, fps, current, device)
            positions.append(segment["action_mrope_ids"])
            left_out = ("action_mrope_ids", "action_len", "num_noisy_action_tokens")
            arguments |= {k: v for k, v in segment.items() if k not in left_out}
            arguments |= {
                "action_tokens": [action.to(self.dtype)],
                "action_timesteps": timestep.expand(segment["num_noisy_action_tokens"]),
                "action_domain_ids": [inputs["action_domain"]],
            }
            current += action.shape[0]
        return {
            "input_ids": text["input_ids"],
            "text_indexes": text["text_indexes"],
            "und_len": length,
            "position_ids": torch.cat(positions, dim=1),
            "sequence_length": current,
            "return_dict": False,
            **arguments,
        }

    def velocities(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """One run of the transformer on `arguments`."""
        with torch.no_grad():
            results = self.transformer(**arguments)
        names = ("vision_velocity", "sound_velocity", "action_velocity")
        return {name: value[0] for name, value in zip(names, results, strict=True) if value is not None}


def relative_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Largest ‖found − expected‖ / ‖expected‖ over the outputs.

    Infinite where an output is missing, of another shape or not finite, and where a zero output is not found zero.
    """
    return max((_relative_error(found.get(name), reference) for name, reference in expected.items()), default=inf)


def cosine(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Smallest cosine between an output and its reference; −1 where one is missing, of another shape or not finite."""
    return min((_cosine(found.get(name), reference) for name, reference in expected.items()), default=-1.0)


def _cosine(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    if found is None or found.shape != expected.shape:
        return -1.0
    a, b = found.double().flatten(), expected.double().flatten()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale > 0.0 and isfinite(scale) else -1.0


def _relative_error(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    if found is None or found.shape != expected.shape:
        return inf
    difference = (found.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    if difference == 0.0:
        return 0.0
    # Not `max` or a comparison alone: both pass over NaN.
    return difference / scale if scale > 0.0 and isfinite(difference) else inf
