"""The declaration of a scheme of quantization. One file in `cosmos_export.precision.schemes` is one scheme.

A declaration says everything that the rest of the project asks about a scheme; nothing outside its file names it. It
imports nothing heavy: its functions import what they need when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cosmos_export.ir.formats import Call, Format, Value
from cosmos_export.precision.layout import Layout
from cosmos_export.precision.sites import LINEARS

if TYPE_CHECKING:
    import torch

WIDE_BITS = 16
"""Bits of a number in a model's own type."""


@dataclass(frozen=True)
class Activation:
    """How a product quantizes what it reads, besides its weight."""

    values: str
    """PyTorch's name of the type of the numbers."""
    scale: Callable[[torch.Tensor], torch.Tensor]
    """The float32 scale from the largest magnitude that calibration saw."""
    requantize: Callable[[Call, Value, Value, torch.dtype], Value]
    """Adds to a graph what rounds a value by a scale; the result has the given type, the value's own."""
    block: int = 0
    """Columns that share a second scale, which follows from the value; 0: none."""


@dataclass(frozen=True)
class StepLimits:
    """Largest loss of a step: relative L2 of its velocity, median and largest over all steps, and its cosine."""

    median: float
    largest: float
    cosine: float
    median_share: float | None = None
    """The median and the largest in shares of what rounding to E4M3 alone loses; None: not compared, as where values
    are rounded to something else."""
    largest_share: float | None = None

    @staticmethod
    def loosest(limits: Sequence[StepLimits]) -> StepLimits:
        """Largest loss of a model in whose steps schemes with these ``limits`` compute together."""

        def share(values: Sequence[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return max(known) if len(known) == len(values) else None

        return StepLimits(
            max(one.median for one in limits),
            max(one.largest for one in limits),
            min(one.cosine for one in limits),
            share([one.median_share for one in limits]),
            share([one.largest_share for one in limits]),
        )


@dataclass(frozen=True)
class Scheme:
    """A number format, and how products compute in it."""

    name: str
    """Name in recipes, targets and manifests."""
    weights: str
    """The weights in words, for the documentation."""
    activations: str
    """The other operands in words."""
    product: str
    """How an engine computes the product, in words."""
    computes: str
    """The type at whose rate its products run: a key of `Target.peak_flops`."""
    kinds: tuple[str, ...] = LINEARS
    """Kinds of sites that it is for."""
    weight: Format | None = None
    """Format in which the weight of a linear is stored; schemes with one format share the weight. None: as it is."""
    activation: Activation | None = None
    """How what a linear reads is quantized; None: it is read as it is."""
    attention: Callable[[], Any] | None = None
    """Gives the IR's operation that attention is replaced by, which takes its scales as another operand; None: it
    stays."""
    engine: str = ""
    """Name of its products in an engine's inspector; empty: the name of those in the model's own type."""
    builder_share: float = 0.0
    """Anonymous memory of TensorRT-RTX's builder per byte of stored weights, with merged projections and mapped
    weights. 0 where there is no weight."""
    linear_error: float = 0.0
    """Relative error of one linear's result for Gaussian weights and inputs, measured at 4096 × 4096."""
    steps: StepLimits | None = None
    """Largest loss of a step of a model in this scheme; None: nothing is lost."""
    layout: Layout | None = None
    """How checkpoints store a linear; None: no checkpoint is written in it."""
    algorithms: tuple[str, ...] = ()
    """Searches of calibration that make something for it."""
    pre_scaled: bool = False
    """Whether it takes pre-scales and parts of low rank from a scale table that has them."""
    modelopt: str = ""
    """ModelOpt's name of the configuration that quantizes to it, for a search over schemes; empty: none."""
    requires: str = ""
    """The precision that a target must have to run it; empty: its own name."""

    def __repr__(self) -> str:
        return f"Scheme({self.name}, {self.bits:g} bits, {self.product})"

    @property
    def bits(self) -> float:
        """Bits of a stored number with its share of scales: a weight's, or of attention's operands."""
        if self.weight is not None:
            return self.weight.bits
        return WIDE_BITS if self.attention is None else 8

    @property
    def calibrated(self) -> bool:
        """Whether it needs ranges of activations, that is calibration."""
        return self.activation is not None or self.attention is not None

    @property
    def weight_only(self) -> bool:
        """Whether it multiplies narrow weights by wide activations: its products widen the weights themselves."""
        return self.weight is not None and self.activation is None

    @property
    def storage(self) -> str:
        """Name of the form in which weights are stored."""
        return self.name if self.weight is None else self.weight.name
