"""FP8 weights with activations in the model's own type: the bytes of `fp8`, widened in the product's kernel."""

from __future__ import annotations

from cosmos_export.precision.scheme import Scheme
from cosmos_export.precision.schemes.fp8 import STEPS, WEIGHT

SCHEME = Scheme(
    name="fp8-w8a16",
    weights="the same bytes as `fp8`",
    activations="16 bit",
    product="widened in the product's kernel",
    computes="bf16",
    weight=WEIGHT,
    engine="fp8-weight",
    builder_share=2.04,
    linear_error=0.0265,
    steps=STEPS,
)
