"""FP8 weights with a scale per row, and activations in the model's own type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmos_export.ir.formats import E4M3, Format
from cosmos_export.precision.scheme import Scheme
from cosmos_export.precision.schemes.fp8 import STEPS, scale_of, widen

if TYPE_CHECKING:
    import torch


def _scales(rows: torch.Tensor, _: torch.Tensor, __: int, ___: torch.dtype) -> torch.Tensor:
    return scale_of(rows.abs().amax(-1))


def _numbers(rows: torch.Tensor, _: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from cosmos_export.ir import packing

    return packing.to_fp8(rows, scales.unsqueeze(-1))


SCHEME = Scheme(
    name="fp8-rows",
    weights="E4M3, one scale per row",
    activations="16 bit",
    product="widened in the product's kernel",
    computes="bf16",
    weight=Format("fp8-rows", values=E4M3, value_bits=8, numbers=_numbers, widen=widen, row_scales=_scales),
    engine="fp8-weight",
    builder_share=2.04,
    linear_error=0.0265,
    steps=STEPS,
    requires="fp8-w8a16",
)
