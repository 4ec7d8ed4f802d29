"""Low-precision forms of a weight: the arithmetic, in float32, on rows.

FP8 (OCP OFP8, E4M3): one scale per tensor, max|w| / 448. INT4: symmetric, one scale per group of columns, max|w| / 7.
NVFP4: E2M1 values, a scale in E4M3 for each block of 16 columns, and one in float32 for the tensor, max|w| / (6 · 448).
These are the scales of the published FP8 checkpoints and of ModelOpt. Values are rounded once, to nearest, ties to
even; ModelOpt's FP8 rounds twice (through BF16), and differs from this in 2 to 4 % of the bytes.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
E2M1_MAX = 6.0
INT4_MAX = 7.0
NVFP4_BLOCK = 16
SMALLEST_BLOCK_SCALE = 2.0**-9
"""The smallest positive number of E4M3."""
ROUNDING = "exact"
"""Name in a manifest of the way in which values were rounded: quotients in float32, rounded once."""

AS_STORED = "as stored"
"""Name of that of weights which the checkpoint has in FP8: their bytes are kept; in other forms they are rounded
again."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 … 7; the fourth bit is the sign."""


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """1 for the scale of what is all zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in ``x``, found without a copy."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def fp8_scale(amax: torch.Tensor) -> torch.Tensor:
    """The float32 scale, divided in float64 so that 448 · s in float64 gives back s; float32 gives the same
    quotient."""
    return _positive((amax.to(torch.float64) / E4M3_MAX).to(torch.float32))


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale`` in E4M3, saturated."""
    return (x.to(torch.float32) / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def groups_of(rows: torch.Tensor, size: int) -> torch.Tensor:
    """[N, K] as [N, K / size, size]."""
    return rows.reshape(*rows.shape[:-1], -1, size)


def int4_scale(rows: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, K / group] in ``dtype``: what the weight is dequantized to, as the builder multiplies in one type."""
    return _positive((groups_of(rows, group).abs().amax(-1) / INT4_MAX).to(dtype))


def to_int4(rows: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """int8 [N, K] of whole numbers −8 … 7."""
    quotient = groups_of(rows, group) / scale.to(torch.float32).unsqueeze(-1)
    return quotient.round_().clamp_(-8, 7).to(torch.int8).flatten(-2)


def nvfp4_scale(amax: torch.Tensor) -> torch.Tensor:
    return _positive(amax.to(torch.float32) / (E2M1_MAX * E4M3_MAX))


def nvfp4_block_scale(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 [N, K / 16], never 0: the largest magnitude of a block becomes 6."""
    blocks = _positive(groups_of(rows.to(torch.float32), NVFP4_BLOCK).abs().amax(-1) / (E2M1_MAX * scale))
    return blocks.clamp(SMALLEST_BLOCK_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(rows: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of E2M1 numbers: ``rows`` over both scales."""
    step = (block_scale.to(torch.float32) * scale).unsqueeze(-1)
    return round_e2m1(groups_of(rows.to(torch.float32), NVFP4_BLOCK) / step).flatten(-2)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 number, ties to the even code: steps of ½ below 2, of 1 below 4, of 2 from there, at most 6."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(((size / step).round() * step).clamp(max=E2M1_MAX), x)


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """uint8 codes of float32 E2M1 numbers: sign in bit 3."""
    size = values.abs()
    # Exponent and first bit of the mantissa are those of the code, from 1 up; ½ is subnormal there.
    codes = ((size.view(torch.int32) >> 22) - _E2M1_BITS).clamp_(min=0).to(torch.uint8)
    return codes + (size == 0.5) | torch.signbit(values).to(torch.uint8) << 3


_E2M1_BITS = (127 << 1) - 2
"""Exponent bits of 1.0 in float32, less its code in E2M1."""


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes per byte along the last axis, the first in the low half."""
    low, high = groups_of(codes.to(torch.uint8) & 15, 2).unbind(-1)
    both: torch.Tensor = low | high << 4
    return both
