"""Attention whose query, keys, values and softmax are E4M3."""

from __future__ import annotations

from typing import Any

from cosmos_export.precision.scheme import Scheme
from cosmos_export.precision.schemes.fp8 import STEPS
from cosmos_export.precision.sites import CORE


def _operation() -> Any:
    from cosmos_export.ir import ops

    return ops.JOINT_ATTENTION_FP8


SCHEME = Scheme(
    name="fp8-attention",
    weights="–",
    activations="query, keys, values and softmax E4M3",
    product="one fused kernel",
    computes="fp8",
    kinds=(CORE,),
    attention=_operation,
    engine="fp8",
    steps=STEPS,
)
