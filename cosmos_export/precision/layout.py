"""The tensors of a scheme's weights in a quantized checkpoint, in the published ModelOpt layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Rounding = Literal["exact", "modelopt"]
"""``exact``: once, from the quotient in float32. ``modelopt``: first to the weight's own type, as NVIDIA's files."""

_ROWS = 1024
"""Rows in work at a time: what is computed in float32 stays small whatever the width."""


@dataclass(frozen=True)
class LinearInputs:
    """The calibration of a linear's input."""

    amax: float | None
    pre_scale: torch.Tensor | None = None
    """float32 [K]: the input is multiplied by it, the weight divided."""


Stored = Mapping[str, tuple[str, tuple[int, ...]]]
"""Last part of a tensor's name → type in the words of safetensors, and shape."""


@dataclass(frozen=True)
class Layout:
    """A linear [N, K] in a checkpoint: its tensors are named by their last part, ``weight``, ``weight_scale`` …"""

    algorithm: str
    """``quant_algo`` of ``hf_quant_config.json``."""
    types: str
    """``quant_type`` of diffusers: weights, activations."""
    numbers: Mapping[str, Any]
    """``num_bits``, ``type`` and ``group_size`` of the configuration."""
    tensors: Callable[[int, int], Stored]
    """The tensors of a linear [N, K], without its pre-scale."""
    encode: Callable[[torch.Tensor, LinearInputs, Rounding], dict[str, torch.Tensor]]
    """The tensors of a weight [N, K], without its pre-scale."""
    decode: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    """float32 [N, K]: what the tensors stand for, before the pre-scale."""
    error: float
    """Relative error of Gaussian weights that were encoded and decoded."""
    roundings: tuple[Rounding, ...] = ("exact",)
    step_policy: bool = False
    """Whether the published revision states steps with 16-bit activations."""
    column_multiple: int = 1
    row_multiple: int = 1

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of ``shape`` [N, K] cannot be stored so; None where it can."""
        rows, columns = shape
        if columns % self.column_multiple:
            return f"{columns} input channels are not a multiple of {self.column_multiple}"
        if rows % self.row_multiple:
            multiple = f"not a multiple of {self.row_multiple}"
            return f"{rows} output channels are {'odd' if self.row_multiple == 2 else multiple}"
        return None


def pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """``weight`` a block of rows at a time."""
    return (weight[start : start + _ROWS] for start in range(0, weight.shape[0], _ROWS))


def smoothed(weight: torch.Tensor, pre_scale: torch.Tensor | None) -> torch.Tensor:
    """``weight`` divided by the pre-scale of its input, and rounded to its own type as ModelOpt does."""
    if pre_scale is None:
        return weight
    return (weight * (1 / pre_scale)).to(weight.dtype)
