"""Arithmetic on elements at the same place."""

from __future__ import annotations

from typing import Any

import torch

from cosmos_export.ir.ops.declare import Trait, aten, broadcast, operation, require
from cosmos_export.ir.spec import TensorSpec


@operation(aten.add.Tensor, aten.mul.Tensor, traits=(Trait.ELEMENTWISE, Trait.COMMUTATIVE), rows=(0, 1))
@operation(aten.sub.Tensor, aten.div.Tensor, traits=(Trait.ELEMENTWISE,), rows=(0, 1))
def arithmetic(a: Any, b: Any) -> TensorSpec:
    specs = [s for s in (a, b) if isinstance(s, TensorSpec)]
    if len(specs) == 2:
        # A rank-0 tensor does not widen the other operand within one kind (PyTorch's type promotion).
        low, high = sorted(specs, key=lambda s: s.rank)
        weak = low.rank == 0 < high.rank and low.dtype.is_floating_point == high.dtype.is_floating_point
        dtype = high.dtype if weak else torch.promote_types(low.dtype, high.dtype)
    else:
        scalar = b if isinstance(a, TensorSpec) else a
        dtype = specs[0].dtype
        if isinstance(scalar, float) and not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
    return TensorSpec(dtype, broadcast([s.shape for s in specs]))


@operation(
    aten.cos.default, aten.sin.default, aten.exp.default, aten.rsqrt.default, aten.silu.default, aten.neg.default,
    aten.reciprocal.default, traits=(Trait.ELEMENTWISE,), rows=(0,),
)  # fmt: skip
@operation(aten.relu.default, traits=(Trait.ELEMENTWISE, Trait.ACTIVATION), rows=(0,))
def unary(x: TensorSpec) -> TensorSpec:
    return x


@operation(aten.pow.Tensor_Scalar, traits=(Trait.ELEMENTWISE,), rows=(0,))
def power(x: TensorSpec, exponent: float) -> TensorSpec:
    return x


@operation(aten.clamp_min.default, traits=(Trait.ELEMENTWISE,), rows=(0,))
def clamp_min(x: TensorSpec, low: float) -> TensorSpec:
    return x


@operation(aten.clamp.default, traits=(Trait.ELEMENTWISE,), rows=(0,))
def clamp(x: TensorSpec, low: float, high: float) -> TensorSpec:
    return x


@operation(aten.where.self, traits=(Trait.ELEMENTWISE,), rows=(0, 1, 2))
def where(condition: TensorSpec, a: TensorSpec, b: TensorSpec) -> TensorSpec:
    require(condition.dtype == torch.bool and a.dtype == b.dtype, "where takes a bool and two values of one type")
    return TensorSpec(a.dtype, broadcast([condition.shape, a.shape, b.shape]))


def _convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype)


# The type is an operand in the IR, but not in ATen's overload.
@operation(aten._to_copy.default, traits=(Trait.ELEMENTWISE, Trait.VIEW), rows=(0,), reference=_convert)
def convert(x: TensorSpec, *, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(dtype, x.shape)
