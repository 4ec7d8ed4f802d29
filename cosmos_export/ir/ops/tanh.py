"""The hyperbolic tangent of each element."""

from __future__ import annotations

from cosmos_export.ir.ops.declare import Trait, aten, operation
from cosmos_export.ir.spec import TensorSpec


@operation(aten.tanh.default, traits=(Trait.ELEMENTWISE,), rows=(0,))
def _rule(x: TensorSpec) -> TensorSpec:
    return x
