"""`DEQUANTIZE_BLOCKS` and `REQUANTIZE_BLOCKS`: numbers in NVFP4, E2M1 in blocks of 16 with a scale each."""

from __future__ import annotations

import torch

from cosmos_export.ir import packing
from cosmos_export.ir.ops.declare import Trait, new_operator, operation, require
from cosmos_export.ir.ops.fp8 import require_scale
from cosmos_export.ir.spec import E2M1, TensorSpec


def dequantize_blocks(
    x: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """NVFP4: E2M1 ``x`` [N, K] times the scale of its block, ``block_scale · scale`` rounded to ``dtype``."""
    blocks = (block_scale.to(torch.float32) * scale).to(dtype).unsqueeze(-1)
    return (packing.groups_of(x.to(dtype), packing.NVFP4_BLOCK) * blocks).flatten(-2)


DEQUANTIZE_BLOCKS = new_operator(dequantize_blocks)


@operation(DEQUANTIZE_BLOCKS, traits=(Trait.WIDENS, Trait.BLOCKS), rows=(0, 1), first=E2M1)
def _dequantize(x: TensorSpec, block_scale: TensorSpec, scale: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    require_scale(scale)
    blocks = TensorSpec(torch.float8_e4m3fn, (*x.shape[:-1], x.shape[-1] // packing.NVFP4_BLOCK))
    require(x.dtype == E2M1 and block_scale == blocks, f"dequantize of {x} by {block_scale}")
    return TensorSpec(dtype, x.shape)


def requantize_blocks(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Activations in NVFP4 and back: block scales follow from ``x``, ``scale`` float32 [] does not."""
    blocks = packing.nvfp4_block_scale(x, scale)
    values = packing.to_e2m1(x, blocks, scale)
    return dequantize_blocks(values, blocks, scale, x.dtype)


REQUANTIZE_BLOCKS = new_operator(requantize_blocks)


@operation(REQUANTIZE_BLOCKS, traits=(Trait.ROUNDS, Trait.BLOCKS), rows=(0,))
def _requantize(x: TensorSpec, scale: TensorSpec) -> TensorSpec:
    require_scale(scale)
    require(x.shape[-1] % packing.NVFP4_BLOCK == 0, f"{x} has no blocks of {packing.NVFP4_BLOCK}")
    return x
