"""Values that no other value is read for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cosmos_export.ir.dims import Size, expression, simplify
from cosmos_export.ir.ops.declare import Trait, aten, operation
from cosmos_export.ir.spec import TensorSpec


@operation(aten.arange.start, traits=(Trait.CREATES,))
def arange(start: Size, end: Size, *, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(dtype, (simplify(expression(end) - start),))


def _fill(size: Sequence[int], value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(size, value, dtype=dtype)


@operation(aten.full.default, traits=(Trait.CREATES,), reference=_fill)
def full(size: Sequence[Size], value: float, *, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(dtype, tuple(size))
