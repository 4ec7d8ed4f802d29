"""INT4 weights in groups of columns, symmetric, with activations in the model's own type.

AWQ and SVDQuant are for it: pre-scales of channels, and a part of low rank beside the packed weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cosmos_export.ir.formats import Call, Format, Value
from cosmos_export.precision.layout import Layout, LinearInputs, Rounding, Stored, pieces, smoothed
from cosmos_export.precision.scheme import Scheme, StepLimits

if TYPE_CHECKING:
    import torch

_GROUPS = (128, 64, 32)
"""The largest that divides the row into two or more (with one, TensorRT-RTX 1.7 widens the whole weight in every
call)."""
_GROUP = _GROUPS[0]
"""Size of groups in checkpoints, whatever the width."""


def _scales(rows: torch.Tensor, _: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    from cosmos_export.ir import packing

    return packing.int4_scale(rows, group, dtype)


def _numbers(rows: torch.Tensor, _: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from cosmos_export.ir import packing

    return packing.to_int4(rows, scales, rows.shape[1] // scales.shape[1])


def _widen(call: Call, parts: Sequence[Value], _: torch.dtype) -> Value:
    from cosmos_export.ir import ops

    values, scales = parts
    return call(ops.DEQUANTIZE_GROUPS, values, scales)


def _tensors(rows: int, columns: int) -> Stored:
    return {"weight": ("U8", (rows // 2, columns)), "weight_scale": ("F32", (rows, columns // _GROUP))}


def _encode(weight: torch.Tensor, inputs: LinearInputs, _: Rounding) -> dict[str, torch.Tensor]:
    import torch

    from cosmos_export.ir import packing

    packed, scales = [], []
    for rows in pieces(weight):
        smooth = smoothed(rows, inputs.pre_scale).float()
        scale = packing.int4_scale(smooth, _GROUP, torch.float32)
        # Two rows share a byte here, where an engine has two columns in it.
        packed.append(packing.nibbles(packing.to_int4(smooth, scale, _GROUP).T).T.contiguous())
        scales.append(scale)
    return {"weight": torch.cat(packed), "weight_scale": torch.cat(scales)}


def _decode(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch

    weight = tensors["weight"]
    signed = weight.view(torch.int8)
    levels = torch.stack([signed << 4 >> 4, signed >> 4], 1).reshape(-1, weight.shape[1])
    return levels.float() * tensors["weight_scale"].repeat_interleave(_GROUP, 1)


SCHEME = Scheme(
    name="int4",
    weights="groups of 128 (64, 32), symmetric; with a part of low rank beside it where the scale table has one",
    activations="16 bit",
    product="widened in the product's kernel",
    computes="bf16",
    weight=Format(
        "int4", values="int4", value_bits=4, numbers=_numbers, widen=_widen, row_scales=_scales, groups=_GROUPS
    ),
    engine="int4-weight",
    builder_share=2.53,
    linear_error=0.117,
    steps=StepLimits(0.08, 0.08, 0.996),
    layout=Layout(
        algorithm="W4A16_AWQ",
        types="INT4",
        numbers={"num_bits": 4, "type": "int", "group_size": _GROUP},
        tensors=_tensors,
        encode=_encode,
        decode=_decode,
        error=0.117,
        column_multiple=_GROUP,
        row_multiple=2,
    ),
    algorithms=("awq", "modelopt-awq", "modelopt-svdquant", "modelopt-auto"),
    pre_scaled=True,
    modelopt="INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
)
