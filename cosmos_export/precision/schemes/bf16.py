"""The model's own type: nothing is quantized."""

from __future__ import annotations

from cosmos_export.precision.scheme import Scheme
from cosmos_export.precision.sites import KINDS

SCHEME = Scheme(
    name="bf16",
    weights="the model's own type",
    activations="the model's own type",
    product="BF16 × BF16",
    computes="bf16",
    kinds=KINDS,
    builder_share=1.15,
    algorithms=("modelopt-auto",),
)
