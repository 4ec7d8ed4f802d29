"""NVFP4 weights and activations: E2M1 in blocks of 16, with a scale per block and one per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cosmos_export.ir.formats import Call, Format, Value
from cosmos_export.precision.layout import Layout, LinearInputs, Rounding, Stored, pieces
from cosmos_export.precision.scheme import Activation, Scheme, StepLimits

if TYPE_CHECKING:
    import torch

_BLOCK = 16
_VALUES = "float4_e2m1fn_x2"


def _scale(amax: torch.Tensor) -> torch.Tensor:
    from cosmos_export.ir import packing

    return packing.nvfp4_scale(amax)


def _block_scales(rows: torch.Tensor, scale: torch.Tensor, _: int, __: torch.dtype) -> torch.Tensor:
    from cosmos_export.ir import packing

    return packing.nvfp4_block_scale(rows, scale)


def _numbers(rows: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    from cosmos_export.ir import packing

    return packing.to_e2m1(rows, blocks, scale)


def _widen(call: Call, parts: Sequence[Value], dtype: torch.dtype) -> Value:
    from cosmos_export.ir import ops

    values, blocks, scale = parts
    return call(ops.DEQUANTIZE_BLOCKS, values, blocks, scale, dtype)


def _requantize(call: Call, value: Value, scale: Value, _: torch.dtype) -> Value:
    from cosmos_export.ir import ops

    return call(ops.REQUANTIZE_BLOCKS, value, scale)


def _tensors(rows: int, columns: int) -> Stored:
    return {
        "weight": ("U8", (rows, columns // 2)),
        "weight_scale": ("F8_E4M3", (rows, columns // _BLOCK)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }


def _encode(weight: torch.Tensor, inputs: LinearInputs, _: Rounding) -> dict[str, torch.Tensor]:
    import torch

    from cosmos_export.ir import packing

    whole, packed, scales = _scale(weight.abs().max()), [], []
    for rows in pieces(weight):
        scale = packing.nvfp4_block_scale(rows, whole)
        # A zero has no sign in ModelOpt's files; what is rounded to zero has.
        packed.append(packing.nibbles(packing.e2m1_codes(packing.to_e2m1(rows.float() + 0.0, scale, whole))))
        scales.append(scale)
    tensors = {"weight": torch.cat(packed), "weight_scale": torch.cat(scales), "weight_scale_2": whole}
    if inputs.amax is not None:
        tensors["input_scale"] = _scale(torch.tensor(inputs.amax))
    return tensors


def _decode(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch

    from cosmos_export.ir import packing

    weight = tensors["weight"]
    codes = torch.stack([weight & 15, weight >> 4], -1).reshape(weight.shape[0], -1)
    values = torch.tensor(packing.E2M1_VALUES)[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    scale = tensors["weight_scale"].float() * tensors["weight_scale_2"]
    return values * scale.repeat_interleave(_BLOCK, 1)


SCHEME = Scheme(
    name="nvfp4",
    weights="E2M1, blocks of 16",
    activations="E2M1, block scales as they come",
    product="FP4 × FP4",
    computes="nvfp4",
    weight=Format(
        "nvfp4",
        values=_VALUES,
        value_bits=4,
        numbers=_numbers,
        widen=_widen,
        tensor_scale=_scale,
        row_scales=_block_scales,
        block=_BLOCK,
    ),
    activation=Activation(_VALUES, _scale, _requantize, block=_BLOCK),
    engine="nvfp4",
    builder_share=1.15,
    linear_error=0.134,
    steps=StepLimits(0.08, 0.08, 0.996),
    layout=Layout(
        algorithm="NVFP4",
        types="NVFP4_NVFP4",
        numbers={"num_bits": 4, "type": "float", "group_size": _BLOCK},
        tensors=_tensors,
        encode=_encode,
        decode=_decode,
        error=0.095,
        column_multiple=_BLOCK,
    ),
)
