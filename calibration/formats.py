"""A weight in the tensors of a quantized checkpoint: the bytes of the published ModelOpt layout.

Scales are those of ModelOpt 0.47, bit for bit. How each scheme lays out a weight is the scheme's (`Layout`); the
arithmetic is `cosmos_export.ir.packing`'s, the compiler's own.
"""

from __future__ import annotations

import torch

from cosmos_export.diagnostics import UserError
from cosmos_export.precision.layout import Layout, LinearInputs, Rounding
from cosmos_export.precision.schemes import SCHEMES, stored_schemes

FORMATS: tuple[str, ...] = tuple(scheme.name for scheme in stored_schemes())
"""Schemes in which a checkpoint can be written."""

Tensors = dict[str, torch.Tensor]
"""By the last part of the name: ``weight``, ``weight_scale`` …"""


def layout_of(kind: str) -> Layout:
    """How checkpoints store a weight in the scheme ``kind``, one of `FORMATS`."""
    found = SCHEMES[kind].layout
    assert found is not None, f"no checkpoint is written in {kind}"
    return found


def quantized_weight(
    kind: str,
    weight: torch.Tensor,
    inputs: LinearInputs,
    rounding: Rounding = "exact",
    base: torch.dtype | None = None,
) -> Tensors:
    """``weight`` [N, K] and its scales as tensors of the published layout. ``base``: the type that pre-scales are
    stored in.

    CX331: the weight holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise UserError("CX331", "the weight holds NaN or infinite values", "the checkpoint is damaged")
    tensors = layout_of(kind).encode(weight, inputs, rounding)
    if inputs.pre_scale is not None and SCHEMES[kind].pre_scaled:
        tensors["pre_quant_scale"] = inputs.pre_scale.to(base or weight.dtype)
    return tensors
