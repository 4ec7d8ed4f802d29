"""The operations a graph may hold: the specification of the dialect.

Each file declares one operation or a small family (`declare.operation`): its reference, how type and shape follow from
the operands, and its traits. A file that is here is part of the dialect; no list has to name it. The verifier refuses
what is not in `OPERATIONS` and derives every shape again. References of operations that ATen lacks follow the published
module that they are recognised from, in the same order of rounding.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from cosmos_export.ir.ops.attention import ATTENTION
from cosmos_export.ir.ops.convolutions import spatial
from cosmos_export.ir.ops.declare import OPERATIONS, Operation, SpecError, Trait, aten, axis_of, having
from cosmos_export.ir.ops.fp8 import DEQUANTIZE, QUANTIZE
from cosmos_export.ir.ops.fused import (
    ACTIVATION_QUANTIZE,
    ADD_NORM_QUANTIZE,
    ITEM,
    NORM_QUANTIZE,
    QKV_PACK,
    UNIPC_STEP,
)
from cosmos_export.ir.ops.int4 import DEQUANTIZE_GROUPS
from cosmos_export.ir.ops.joint_attention import JOINT_ATTENTION, JOINT_ATTENTION_FP8, attend_rounded
from cosmos_export.ir.ops.nvfp4 import DEQUANTIZE_BLOCKS, REQUANTIZE_BLOCKS
from cosmos_export.ir.ops.rms_norm import RMS_NORM
from cosmos_export.ir.ops.rotary import ROTARY
from cosmos_export.ir.ops.swiglu import SWIGLU

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

VIEWS = having(Trait.VIEW)

__all__ = [
    "ACTIVATION_QUANTIZE", "ADD_NORM_QUANTIZE", "ATTENTION", "DEQUANTIZE", "DEQUANTIZE_BLOCKS", "DEQUANTIZE_GROUPS",
    "ITEM", "JOINT_ATTENTION", "JOINT_ATTENTION_FP8", "NORM_QUANTIZE", "OPERATIONS", "QKV_PACK", "QUANTIZE",
    "REQUANTIZE_BLOCKS", "RMS_NORM", "ROTARY", "SWIGLU", "UNIPC_STEP", "VIEWS", "Operation", "SpecError", "Trait",
    "aten", "attend_rounded", "axis_of", "having", "spatial",
]  # fmt: skip
