"""Inputs to compare on: one denoising step each, between them all modes, masks and awkward sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cosmos_export.runtime import positions
from cosmos_export.sampling import DEFAULT_MODE, MODES, Mode
from cosmos_export.sampling.modes import Clean


@dataclass(frozen=True)
class Case:
    """Sizes and conditioning of one step. ``clean_*`` are indices without noise; ``all`` means every one."""

    name: str
    prompt: int
    frames: int
    height: int
    width: int
    clean_frames: Sequence[int] | str = ()
    sound: int = 0
    actions: int = 0
    clean_actions: Sequence[int] | str = ()
    fps: float = 24.0
    timestep: float = 437.0
    domain: int | None = None
    """Embodiment domain of its actions; None: one among the model's."""
    columns: int | None = None
    """Columns of an action that are generated, the rest being padding; None: all of them."""
    first_action: int = 1
    """Temporal index of the first action row in frames: 0 where it is the robot's state."""

    @property
    def mode(self) -> Mode:
        """The mode that the case is of; the default one where it is of none."""
        return next((mode for mode in MODES.values() if mode.title == self.name), MODES[DEFAULT_MODE])

    @property
    def outputs(self) -> tuple[str, ...]:
        """Velocities this case has rows of."""
        rows = {"vision": self.frames, "sound": self.sound, "action": self.actions}
        return tuple(f"{name}_velocity" for name, count in rows.items() if count)

    def inputs(self, config: Mapping[str, Any], modalities: Sequence[str], seed: int = 0) -> dict[str, torch.Tensor]:
        """Tensors of the step in float32 (ids int64), seeded noise for latents. ``action_columns`` where there are
        such."""
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        base, fps = float(config["base_fps"]), self.fps if config["enable_fps_modulation"] else None
        patch = config["latent_patch_size"]
        rows, columns = (-(-size // patch) for size in (self.height, self.width))
        result = {
            "input_ids": torch.randint(0, config["vocab_size"], (self.prompt,), generator=generator),
            "vision_latent": noise(1, config["latent_channel"], self.frames, self.height, self.width),
            "vision_mask": _mask(self.frames, self.clean_frames),
            "frame_positions": _tensor(positions.frame_positions(self.frames, fps, base)),
            "row_positions": _tensor(positions.grid_positions(rows)),
            "column_positions": _tensor(positions.grid_positions(columns)),
            "timestep": torch.tensor([self.timestep]),
        }
        if "sound" in modalities:
            rate = None if fps is None else config["sound_latent_fps"]
            result |= {
                "sound_latent": noise(config["sound_dim"], self.sound),
                "sound_positions": _tensor(positions.sound_positions(self.sound, rate, base)),
            }
        if "action" in modalities:
            domain = config["num_embodiment_domains"] // 4 if self.domain is None else self.domain
            rows = positions.action_positions(self.actions, fps, base, first=self.first_action)
            result |= {
                "action_latent": noise(self.actions, config["action_dim"]),
                "action_mask": _mask(self.actions, self.clean_actions),
                "action_positions": _tensor(rows),
                "action_domain": torch.tensor([domain]),
            }
            if self.columns is not None:
                result["action_columns"] = (torch.arange(config["action_dim"]) < self.columns).float()
                result["action_latent"] *= result["action_columns"]
        return result


def _mask(count: int, clean: Sequence[int] | str) -> torch.Tensor:
    mask = torch.ones(count)
    if clean == "all":
        mask.zero_()
    else:
        for index in clean:
            mask[int(index)] = 0.0
    return mask


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _case(mode: Mode) -> Case:
    sample = mode.sample
    return Case(
        mode.title, sample.prompt, sample.frames, sample.height, sample.width, _clean(mode.clean_frames), sample.sound,
        sample.actions, _clean(mode.clean_actions or 0), sample.fps,
    )  # fmt: skip


def _clean(rows: Clean) -> Sequence[int] | str:
    return rows if rows == "all" else tuple(range(rows))


CASES = tuple(map(_case, MODES.values()))
"""One per mode, from its sample: at most a few hundred rows."""
