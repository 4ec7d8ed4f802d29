"""`SWIGLU`: the gated activation of an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cosmos_export.ir.ops.declare import Trait, new_operator, operation, require
from cosmos_export.ir.spec import TensorSpec


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate) * up


SWIGLU = new_operator(swiglu)


@operation(SWIGLU, traits=(Trait.ELEMENTWISE, Trait.ACTIVATION), rows=(0, 1))
def _rule(gate: TensorSpec, up: TensorSpec) -> TensorSpec:
    require(gate == up, f"swiglu of {gate} and {up}")
    return gate
