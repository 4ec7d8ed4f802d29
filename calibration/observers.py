"""Observers: the statistics of a tensor that are kept, and the range that follows from them.

The largest magnitude is exact. Where a range is chosen by distribution, the distribution is exact too: bfloat16 has
32,768 magnitudes, so the count of each is a histogram without bins to choose, of any number of tokens, that adds up in
any order. (Of fp32 activations the histogram holds the values rounded to bfloat16.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from cosmos_export.diagnostics import UserError
from cosmos_export.ir.packing import E4M3_MAX
from cosmos_export.options import ObserverMethod

MAGNITUDES = 1 << 15
"""Bit patterns of bfloat16 without the sign."""
_FINITE = 0x7F80
"""Patterns from here on are infinity and NaN."""
_MSE_STEPS = 80
_MSE_LOWEST = 0.2
"""The search goes from this share of the largest magnitude up to all of it."""


@dataclass(frozen=True)
class Observer:
    """How the range of a tensor follows from what was seen; ``margin`` multiplies it.

    ``absmax``: the largest magnitude. ``percentile``: the smallest magnitude that ``percentile`` % of all values do not
    exceed. ``mse``: the range at which rounding to FP8 E4M3, with what is above cut off, has the least squared error.
    """

    method: ObserverMethod = "absmax"
    margin: float = 1.1
    percentile: float = 99.999

    def __post_init__(self) -> None:
        if self.method not in get_args(ObserverMethod):
            raise UserError("CX320", f"observer `{self.method}`; known: {', '.join(get_args(ObserverMethod))}")
        if not (math.isfinite(self.margin) and 1 <= self.margin <= 4):
            raise UserError(
                "CX320", f"margin {self.margin}; allowed: 1 to 4", "1.1 to 1.25 is usual; FP8 loses nothing"
            )
        if not 50 < self.percentile <= 100:
            raise UserError("CX320", f"percentile {self.percentile}; allowed: above 50, to 100")

    @property
    def counts(self) -> bool:
        """Whether it needs the distribution."""
        return self.method != "absmax"

    @property
    def settings(self) -> dict[str, Any]:
        """Description for the lineage."""
        used = {"method": self.method, "margin": self.margin}
        return used | ({"percentile": self.percentile} if self.method == "percentile" else {})


@dataclass
class ObservedRange:
    """One tensor over some samples: the largest magnitude, and where wanted how often each magnitude came."""

    amax: float = 0.0
    counts: torch.Tensor | None = field(default=None, repr=False)
    """int64 [`MAGNITUDES`]."""

    @classmethod
    def of(cls, values: torch.Tensor, *, count: bool) -> ObservedRange:
        """An observation of all of ``values``. It is not finite where they are not: check `finite`."""
        magnitudes = values.detach().abs()
        amax = float(magnitudes.max()) if magnitudes.numel() else 0.0
        if not count:
            return cls(amax)
        bits = magnitudes.to(torch.bfloat16).view(torch.int16).flatten()
        return cls(amax, torch.bincount(bits.to(torch.int32), minlength=MAGNITUDES))

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor infinity was seen. (`max` of a tensor with NaN is NaN.)"""
        return math.isfinite(self.amax)

    def merged(self, other: ObservedRange) -> ObservedRange:
        """Sum of two observations."""
        if self.counts is None or other.counts is None:
            return ObservedRange(max(self.amax, other.amax))
        return ObservedRange(max(self.amax, other.amax), self.counts + other.counts)


def magnitudes() -> torch.Tensor:
    """float32 [finite magnitudes]: the value of each bit pattern, rising."""
    return torch.arange(_FINITE, dtype=torch.int16).view(torch.bfloat16).float()


def choose_range(observer: Observer, seen: ObservedRange) -> float:
    """The range, a float32 number, that ``observer`` takes of ``seen``; 0 where nothing but zeros came."""
    value = _RANGES[observer.method](observer, seen)
    return float(torch.tensor(value, dtype=torch.float32) * torch.tensor(observer.margin, dtype=torch.float32))


def _absmax(observer: Observer, seen: ObservedRange) -> float:
    return seen.amax


def _percentile(observer: Observer, seen: ObservedRange) -> float:
    assert seen.counts is not None
    total = int(seen.counts.sum())
    # Exactly how many values may be above it, in whole numbers: a share of a float would not be.
    above = math.floor(total * (100 - observer.percentile) / 100 + 1e-9)
    cumulative = seen.counts.cumsum(0)
    index = int(torch.searchsorted(cumulative, total - above))
    return min(float(magnitudes()[index]), seen.amax)


def _mse(observer: Observer, seen: ObservedRange) -> float:
    assert seen.counts is not None
    values, counts = magnitudes(), seen.counts[:_FINITE].double()
    present = counts > 0
    values, counts = values[present], counts[present]
    candidates = [seen.amax * (_MSE_LOWEST + (1 - _MSE_LOWEST) * i / _MSE_STEPS) for i in range(_MSE_STEPS, -1, -1)]
    # The first of equals is the widest.
    return min(candidates, key=lambda amax: _squared_error(values, counts, amax)) if seen.amax > 0 else 0.0


def _squared_error(values: torch.Tensor, counts: torch.Tensor, amax: float) -> float:
    scale = amax / E4M3_MAX
    rounded = (values / scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
    return float(((values - rounded).double().square() * counts).sum())


_RANGES: Mapping[ObserverMethod, Any] = {"absmax": _absmax, "percentile": _percentile, "mse": _mse}
