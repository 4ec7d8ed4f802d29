"""The published model's forward, made exportable.

`torch.export` takes tensors and follows symbolic sizes; the stock forward takes lists of items and index tensors whose
lengths it reads as Python ints. The adapter calls that same forward with one item of each modality and replaces the
seven helpers below on the instance it is given. `docs/capture.md` lists each with its reason; tests hold each equal to
the stock forward. No layer, norm, attention, projection or position embedding is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class RowMask:
    """0/1 weights of the rows of one item, where the stock forward expects the indices of its noisy rows.

    Its length is 1 because the stock forward sizes per-item embodiment ids by it, and an item has one embodiment.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights

    def __len__(self) -> int:
        return 1


def _add_time_to_noisy_rows(
    self: Any,
    packed_tokens: torch.Tensor,
    packed_timestep_embeds: torch.Tensor,
    noisy_frame_indexes: list[RowMask],
    token_shapes: list[tuple[int, int, int]],
) -> torch.Tensor:
    """``tokens + mask · embedding``; stock: scatter_add at data-dependent rows."""
    frames, height, width = token_shapes[0]
    mask = noisy_frame_indexes[0].weights.reshape(frames, 1).expand(frames, height * width)
    return packed_tokens + mask.reshape(frames * height * width, 1) * packed_timestep_embeds


def _patchify(self: Any, tokens_vision: list[torch.Tensor]) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Patches of p·p·C, zero-padded right and bottom; stock: pads under a Python condition on the height's parity."""
    patch = self.config.latent_patch_size
    latent = tokens_vision[0].squeeze(0)
    channels, frames, height, width = latent.shape
    rows, columns = (height + patch - 1) // patch, (width + patch - 1) // patch
    latent = F.pad(latent, (0, columns * patch - width, 0, rows * patch - height))
    latent = latent.reshape(channels, frames, rows, patch, columns, patch).permute(1, 2, 4, 3, 5, 0)
    return latent.reshape(frames * rows * columns, patch * patch * channels), [(frames, height, width)]


def _unpatchify(
    self: Any,
    packed_mse_preds: torch.Tensor,
    token_shapes_vision: list[tuple[int, int, int]],
    noisy_frame_indexes_vision: list[RowMask],
    original_latent_shapes: list[tuple[int, int, int]],
) -> list[torch.Tensor]:
    """Latent layout again, clean frames zeroed by the mask; stock: writes the noisy frames into zeros."""
    patch, channels = self.config.latent_patch_size, self.config.latent_channel
    frames, rows, columns = token_shapes_vision[0]
    _, height, width = original_latent_shapes[0]
    latent = packed_mse_preds.reshape(frames, rows, columns, patch, patch, channels).permute(5, 0, 1, 3, 2, 4)
    latent = latent.reshape(channels, frames, rows * patch, columns * patch)[:, :, :height, :width]
    mask = noisy_frame_indexes_vision[0].weights.reshape(1, frames, 1, 1)
    return [(latent * mask).unsqueeze(0)]


def _unpack_sound(
    self: Any, packed_preds: torch.Tensor, token_shapes_sound: Any, noisy_frame_indexes_sound: list[RowMask]
) -> list[torch.Tensor]:
    """[rows, C] → [C, rows]; every sound row is noisy. Stock: `len()` of an index tensor fixes the length."""
    return [packed_preds.permute(1, 0)]


def _pack_action(
    self: Any, tokens_action: list[torch.Tensor], token_shapes_action: Any, domain_ids_action: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as they are with the item's one embodiment; stock: one id per row, and so one whole matrix per row."""
    return tokens_action[0], domain_ids_action[0]


def _unpack_action(
    self: Any, packed_preds: torch.Tensor, token_shapes_action: Any, noisy_frame_indexes_action: list[RowMask]
) -> list[torch.Tensor]:
    """Clean rows zeroed by the mask; stock: `len()` of an index tensor fixes the length."""
    return [packed_preds * noisy_frame_indexes_action[0].weights.reshape(-1, 1)]


def _domain_linear(self: Any, x: torch.Tensor, domain_id: torch.Tensor) -> torch.Tensor:
    """``x @ weight[domain] + bias[domain]``; stock: checks the ids' values. Here callers check them."""
    weight = self.fc(domain_id).reshape(self.input_size, self.output_size)
    bias = self.bias(domain_id).reshape(1, self.output_size)
    result: torch.Tensor = torch.matmul(x, weight) + bias
    return result


class JointStep(nn.Module):
    """One denoising step of both towers as a function of tensors.

    Inputs (S prompt tokens, T latent frames, h × w latent grid, G = ⌈h/2⌉ × ⌈w/2⌉ patches per frame):

    ``input_ids`` int64 [S] · ``vision_latent`` [1, C, T, h, w] · ``vision_mask`` [T], 1 on noisy frames ·
    ``frame_positions`` [T], ``row_positions`` [⌈h/2⌉], ``column_positions`` [⌈w/2⌉] float32, rotary coordinates of the
    patches relative to the start of generation · ``timestep`` float32 [1] · with sound: ``sound_latent`` [C_s, T_s],
    ``sound_positions`` [T_s] · with action: ``action_latent`` [T_a, D], ``action_mask`` [T_a], ``action_positions``
    [T_a], ``action_domain`` int64 [1].

    Returns velocities in the layout of the latents; zero where the mask is 0.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.config: Any = transformer.config
        replacements: dict[str, Callable[..., Any]] = {
            "_apply_timestep_embeds_to_noisy_tokens": _add_time_to_noisy_rows,
            "_patchify_and_pack_latents": _patchify,
            "_unpatchify_and_unpack_latents": _unpatchify,
            "_unpack_sound_latents": _unpack_sound,
            "_pack_action_latents": _pack_action,
            "_unpack_action_latents": _unpack_action,
        }
        for name, replacement in replacements.items():
            setattr(transformer, name, MethodType(replacement, transformer))
        for head in ("action_proj_in", "action_proj_out"):
            module = getattr(transformer, head, None)
            if module is not None:
                module.forward = MethodType(_domain_linear, module)

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        vision_latent: torch.Tensor,
        vision_mask: torch.Tensor,
        frame_positions: torch.Tensor,
        row_positions: torch.Tensor,
        column_positions: torch.Tensor,
        timestep: torch.Tensor,
        sound_latent: torch.Tensor | None = None,
        sound_positions: torch.Tensor | None = None,
        action_latent: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        action_positions: torch.Tensor | None = None,
        action_domain: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        patch = self.config.latent_patch_size
        text = input_ids.shape[0]
        frames, height, width = vision_latent.shape[2:]
        rows, columns = (height + patch - 1) // patch, (width + patch - 1) // patch
        vision = frames * rows * columns
        # The published rule: generation starts a fixed margin after the prompt on the temporal axis.
        start = text + self.config.unified_3d_mrope_temporal_modality_margin

        grid = (frames, rows, columns)
        positions = [
            torch.arange(text, dtype=torch.float32).unsqueeze(0).expand(3, text),
            torch.cat(
                [
                    (frame_positions + start).reshape(frames, 1, 1).expand(grid).reshape(1, vision),
                    row_positions.reshape(1, rows, 1).expand(grid).reshape(1, vision),
                    column_positions.reshape(1, 1, columns).expand(grid).reshape(1, vision),
                ]
            ),
        ]
        total = text + vision
        arguments: dict[str, Any] = {
            "vision_tokens": [vision_latent],
            "vision_token_shapes": [grid],
            "vision_sequence_indexes": torch.arange(text, total),
            "vision_mse_loss_indexes": torch.arange(text, total),
            "vision_timesteps": timestep,
            "vision_noisy_frame_indexes": [RowMask(vision_mask)],
        }

        def on_time_axis(along: torch.Tensor) -> torch.Tensor:
            length = along.shape[0]
            return torch.cat([(along + start).reshape(1, length), torch.zeros(2, length)])

        if sound_latent is not None and sound_positions is not None:
            first, length = total, sound_latent.shape[1]
            total = first + length
            positions.append(on_time_axis(sound_positions))
            arguments |= {
                "sound_tokens": [sound_latent],
                "sound_token_shapes": [(length, 1, 1)],
                "sound_sequence_indexes": torch.arange(first, total),
                "sound_mse_loss_indexes": torch.arange(first, total),
                "sound_timesteps": timestep,
                "sound_noisy_frame_indexes": [RowMask(torch.ones(length, dtype=sound_latent.dtype))],
            }
        if action_latent is not None and action_mask is not None and action_positions is not None:
            first, length = total, action_latent.shape[0]
            total = first + length
            positions.append(on_time_axis(action_positions))
            arguments |= {
                "action_tokens": [action_latent],
                "action_token_shapes": [(length, 1, 1)],
                "action_sequence_indexes": torch.arange(first, total),
                "action_mse_loss_indexes": torch.arange(first, total),
                "action_timesteps": timestep,
                "action_noisy_frame_indexes": [RowMask(action_mask)],
                "action_domain_ids": [action_domain],
            }
        vision_velocity, sound_velocity, action_velocity = self.transformer(
            input_ids=input_ids,
            text_indexes=torch.arange(text),
            position_ids=torch.cat(positions, dim=1),
            und_len=text,
            sequence_length=total,
            return_dict=False,
            **arguments,
        )
        outputs = {"vision_velocity": vision_velocity[0]}
        if sound_velocity is not None:
            outputs["sound_velocity"] = sound_velocity[0]
        if action_velocity is not None:
            outputs["action_velocity"] = action_velocity[0]
        return outputs
