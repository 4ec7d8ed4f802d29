"""Weights in FP8, INT4 and NVFP4, in the bytes of the published ModelOpt layout.

Scales are those of ModelOpt 0.47, bit for bit. FP8 bytes are rounded once, from the exact quotient in float32. ModelOpt
rounds twice: to the weight's own bfloat16, then to FP8, which changes 2 to 4 % of the bytes and adds 1 % to the error;
``fp8_rounding="modelopt"`` does it too, so that its files can be made again. All functions take one weight [N, K]. The
arithmetic is `cosmos_export.ir.packing`'s, the compiler's own; here is how it is laid out in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cosmos_export.diagnostics import UserError
from cosmos_export.ir import packing

Format = Literal["fp8", "int4", "nvfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)
Rounding = Literal["exact", "modelopt"]

INT4_GROUP = 128
"""Input channels that share a scale in INT4."""
FP4_BLOCK = packing.NVFP4_BLOCK
"""Input channels that share a scale in NVFP4."""
_ROWS = 1024
"""Rows in work at a time: what is computed in float32 stays small whatever the width."""

Tensors = dict[str, torch.Tensor]
"""By the last part of the name: ``weight``, ``weight_scale`` …"""


@dataclass(frozen=True)
class Inputs:
    """What calibration says of a linear's input."""

    amax: float | None
    pre_scale: torch.Tensor | None = None
    """float32 [K]: the input is multiplied by it, the weight divided."""


def require_shape(weight_shape: tuple[int, ...], kind: Format) -> str | None:
    """Why a weight [N, K] cannot be ``kind``; None where it can."""
    rows, columns = weight_shape
    if kind == "int4" and columns % INT4_GROUP:
        return f"{columns} input channels are not a multiple of {INT4_GROUP}"
    if kind == "int4" and rows % 2:
        return f"{rows} output channels are odd"
    if kind == "nvfp4" and columns % FP4_BLOCK:
        return f"{columns} input channels are not a multiple of {FP4_BLOCK}"
    return None


def quantized_weight(
    kind: Format, weight: torch.Tensor, inputs: Inputs, rounding: Rounding = "exact", base: torch.dtype | None = None
) -> Tensors:
    """``weight`` and its scales as tensors of the published layout. ``base``: the type that pre-scales are stored in.

    CX331: the weight holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise UserError("CX331", "the weight holds NaN or infinite values", "the checkpoint is damaged")
    return _QUANTIZERS[kind](weight, inputs, rounding, base or weight.dtype)


def _fp8(weight: torch.Tensor, inputs: Inputs, rounding: Rounding, base: torch.dtype) -> Tensors:
    scale = packing.fp8_scale(weight.abs().max())
    once = torch.ones(())
    parts = []
    for rows in _pieces(weight):
        if rounding == "modelopt":
            parts.append(packing.to_fp8((rows.float() / scale).to(weight.dtype), once))
        else:
            parts.append(packing.to_fp8(rows, scale))
    tensors = {"weight": torch.cat(parts), "weight_scale": scale}
    if inputs.amax is not None:
        tensors["input_scale"] = packing.fp8_scale(torch.tensor(inputs.amax))
    return tensors


def _int4(weight: torch.Tensor, inputs: Inputs, rounding: Rounding, base: torch.dtype) -> Tensors:
    tensors: Tensors = {}
    if inputs.pre_scale is not None:
        tensors["pre_quant_scale"] = inputs.pre_scale.to(base)
    packed, scales = [], []
    for rows in _pieces(weight):
        smooth = smoothed(rows, inputs.pre_scale).float()
        scale = packing.int4_scale(smooth, INT4_GROUP, torch.float32)
        # Two rows share a byte here, where an engine has two columns in it.
        packed.append(packing.nibbles(packing.to_int4(smooth, scale, INT4_GROUP).T).T.contiguous())
        scales.append(scale)
    return tensors | {"weight": torch.cat(packed), "weight_scale": torch.cat(scales)}


def _nvfp4(weight: torch.Tensor, inputs: Inputs, rounding: Rounding, base: torch.dtype) -> Tensors:
    whole = packing.nvfp4_scale(weight.abs().max())
    packed, scales = [], []
    for rows in _pieces(weight):
        scale = packing.nvfp4_block_scale(rows, whole)
        # A zero has no sign in ModelOpt's files; what is rounded to zero has.
        packed.append(packing.nibbles(packing.e2m1_codes(packing.to_e2m1(rows.float() + 0.0, scale, whole))))
        scales.append(scale)
    tensors = {"weight": torch.cat(packed), "weight_scale": torch.cat(scales), "weight_scale_2": whole}
    if inputs.amax is not None:
        tensors["input_scale"] = packing.nvfp4_scale(torch.tensor(inputs.amax))
    return tensors


_QUANTIZERS: Mapping[Format, Callable[[torch.Tensor, Inputs, Rounding, torch.dtype], Tensors]] = {
    "fp8": _fp8,
    "int4": _int4,
    "nvfp4": _nvfp4,
}


def smoothed(weight: torch.Tensor, pre_scale: torch.Tensor | None) -> torch.Tensor:
    """``weight`` divided by the pre-scale of its input, and rounded to its own type as ModelOpt does."""
    if pre_scale is None:
        return weight
    return (weight * (1 / pre_scale)).to(weight.dtype)


# -- back -------------------------------------------------------------------------------------------------------------


def dequantized(kind: Format, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 [N, K]: what a weight of the layout stands for, before its pre-scale."""
    weight = tensors["weight"]
    if kind == "fp8":
        return weight.float() * tensors["weight_scale"]
    if kind == "int4":
        signed = weight.view(torch.int8)
        levels = torch.stack([signed << 4 >> 4, signed >> 4], 1).reshape(-1, weight.shape[1])
        return levels.float() * tensors["weight_scale"].repeat_interleave(INT4_GROUP, 1)
    codes = torch.stack([weight & 15, weight >> 4], -1).reshape(weight.shape[0], -1)
    values = torch.tensor(packing.E2M1_VALUES)[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    scale = tensors["weight_scale"].float() * tensors["weight_scale_2"]
    return values * scale.repeat_interleave(FP4_BLOCK, 1)


def _pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    return (weight[start : start + _ROWS] for start in range(0, weight.shape[0], _ROWS))
