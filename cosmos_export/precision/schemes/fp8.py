"""FP8 weights and activations: E4M3, one static scale per tensor, as the published FP8 checkpoints have it.

ModelOpt rounds a weight twice: to its own bfloat16, then to FP8, which changes 2 to 4 % of the bytes and adds 1 % to
the error. Here it is rounded once, from the exact quotient; a checkpoint can be written with both roundings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cosmos_export.ir.formats import E4M3, Call, Format, Value
from cosmos_export.precision.layout import Layout, LinearInputs, Rounding, Stored, pieces
from cosmos_export.precision.scheme import Activation, Scheme, StepLimits
from cosmos_export.precision.sites import LINEARS, PROMPT_KV

if TYPE_CHECKING:
    import torch


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The float32 scale at which ``amax`` is the largest number of E4M3."""
    from cosmos_export.ir import packing

    return packing.fp8_scale(amax)


def numbers(rows: torch.Tensor, _: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``rows`` over the scale of the tensor in E4M3."""
    from cosmos_export.ir import packing

    return packing.to_fp8(rows, scale)


def widen(call: Call, parts: Sequence[Value], dtype: torch.dtype) -> Value:
    """E4M3 values times their scale: of the tensor, or of each row."""
    from cosmos_export.ir import ops

    values, scale = parts
    return call(ops.DEQUANTIZE, values, scale, dtype)


def _requantize(call: Call, value: Value, scale: Value, dtype: torch.dtype) -> Value:
    from cosmos_export.ir import ops

    return call(ops.DEQUANTIZE, call(ops.QUANTIZE, value, scale), scale, dtype)


def _tensors(rows: int, columns: int) -> Stored:
    return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())}


def _encode(weight: torch.Tensor, inputs: LinearInputs, rounding: Rounding) -> dict[str, torch.Tensor]:
    import torch

    from cosmos_export.ir import packing

    scale, once, parts = scale_of(weight.abs().max()), torch.ones(()), []
    for rows in pieces(weight):
        if rounding == "modelopt":
            parts.append(packing.to_fp8((rows.float() / scale).to(weight.dtype), once))
        else:
            parts.append(packing.to_fp8(rows, scale))
    tensors = {"weight": torch.cat(parts), "weight_scale": scale}
    if inputs.amax is not None:
        tensors["input_scale"] = scale_of(torch.tensor(inputs.amax))
    return tensors


def _decode(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return tensors["weight"].float() * tensors["weight_scale"]


WEIGHT = Format("fp8", values=E4M3, value_bits=8, numbers=numbers, widen=widen, tensor_scale=scale_of)
STEPS = StepLimits(0.08, 0.08, 0.996, median_share=1.3, largest_share=1.5)
"""The shares are of the loss of an error as large as that of E4M3 in every value that is rounded to it."""

SCHEME = Scheme(
    name="fp8",
    weights="E4M3, one scale per tensor",
    activations="E4M3, one static scale per tensor",
    product="FP8 × FP8",
    computes="fp8",
    kinds=(*LINEARS, PROMPT_KV),
    weight=WEIGHT,
    activation=Activation(E4M3, scale_of, _requantize),
    engine="fp8",
    builder_share=1.08,
    linear_error=0.0374,
    steps=STEPS,
    layout=Layout(
        algorithm="FP8",
        types="FP8_FP8",
        numbers={"num_bits": 8, "type": "float"},
        tensors=_tensors,
        encode=_encode,
        decode=_decode,
        error=0.0265,
        roundings=("exact", "modelopt"),
        step_policy=True,
    ),
    algorithms=("modelopt-auto",),
    modelopt="FP8_DEFAULT_CFG",
)
