"""Convolutions of the codecs."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from cosmos_export.ir.dims import equal, expression, floor_div, simplify
from cosmos_export.ir.ops.declare import Trait, aten, operation, require
from cosmos_export.ir.spec import TensorSpec


def spatial(values: Sequence[int], axes: int) -> list[int]:
    """One value per axis: a convolution takes one for all, too."""
    return list(values) * axes if len(values) == 1 else list(values)


@operation(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, traits=(Trait.CONVOLUTION,), rows=(0,)
)  # fmt: skip
def convolution(
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> TensorSpec:
    axes = x.rank - 2
    fits = weight.rank == x.rank and equal(x.shape[1], simplify(weight.shape[1] * sympy.Integer(groups)))
    require(fits and x.dtype == weight.dtype, f"convolution of {x} by {weight}")
    require(bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype), f"bias {bias} of {weight}")
    steps = zip(x.shape[2:], weight.shape[2:], *(spatial(v, axes) for v in (stride, padding, dilation)), strict=True)
    sizes = [floor_div(expression(n) + 2 * p - d * (k - 1) - 1, s) + 1 for n, k, s, p, d in steps]
    return TensorSpec(x.dtype, (x.shape[0], weight.shape[0], *sizes))


@operation(aten.conv_transpose1d.default, rows=(0,))
def transposed_convolution(
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> TensorSpec:
    fits = weight.rank == x.rank == 3 and equal(x.shape[1], weight.shape[0]) and groups == 1
    require(fits and x.dtype == weight.dtype, f"transposed convolution of {x} by {weight}")
    span = dilation[0] * (weight.shape[2] - 1) - 2 * padding[0] + output_padding[0] + 1
    return TensorSpec(x.dtype, (x.shape[0], weight.shape[1], (expression(x.shape[2]) - 1) * stride[0] + span))
