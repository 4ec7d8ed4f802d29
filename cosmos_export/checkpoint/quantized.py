"""The quantized linears of an FP8 checkpoint: bytes to be bound as they are, and the numbers they are read with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cosmos_export.checkpoint.layout import QUANTIZED_DTYPE
from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.safetensors_header import TensorEntry
from cosmos_export.diagnostics import UserError


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear whose weight is FP8 E4M3: w = weight_scale · q, and x is rounded to FP8 as x / input_scale."""

    name: str
    """Without ``.weight``."""
    weight: TensorEntry
    weight_scale: float
    input_scale: float | None
    """None in a weight-only checkpoint."""


def quantized_linears(checkpoint: Checkpoint) -> dict[str, QuantizedLinear]:
    """Scales by name, in the order of the model; empty for a checkpoint that is not quantized. Reads the scales only.

    CX124: a scale is not a finite number above 0.
    """
    found: dict[str, QuantizedLinear] = {}
    for name, want in checkpoint.expected.items():
        entry = checkpoint.tensors[name]
        if want.linear and entry.dtype == QUANTIZED_DTYPE:
            linear = name.removesuffix(".weight")
            scale = _scale(checkpoint, f"{linear}.weight_scale")
            assert scale is not None  # the reader has seen to it
            found[linear] = QuantizedLinear(linear, entry, scale, _scale(checkpoint, f"{linear}.input_scale"))
    return found


def _scale(checkpoint: Checkpoint, name: str) -> float | None:
    entry = checkpoint.tensors.get(name)
    if entry is None:
        return None
    value = float(entry.array().reshape(()))
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            "CX124", f"{name} in {entry.file.name} is {value}; a scale is a finite number above 0", "download it again"
        )
    return value
