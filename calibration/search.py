"""Results of a search for the linears of a layer besides ranges, for every search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cosmos_export.precision.scheme import WIDE_BITS
from cosmos_export.precision.schemes import searched_schemes

BUDGETED: Mapping[str, float] = {
    scheme.name: float(WIDE_BITS if scheme.weight is None else scheme.weight.value_bits)
    for scheme in sorted(searched_schemes("modelopt-auto"), key=lambda scheme: scheme.bits)
}
"""Schemes that a budget chooses from, and the bits of a weight. ModelOpt quantizes NVFP4 activations on CUDA only."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class SearchResult:
    """Results of a search, by linear of the layer."""

    pre_scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """float32 [K]: the factor of each input channel; the columns of the weight are divided by it."""
    low_rank: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """float32 [rank, K] and [N, rank], ``down`` and ``up``: up · down of the scaled weight is not quantized."""
    schemes: Mapping[str, str] = field(default_factory=dict)
    """Linear → one of `BUDGETED`."""


Rows = Mapping[str, torch.Tensor]
Search = Callable[[nn.Module, Mapping[str, Sequence[str]], Rows, Rows], SearchResult]
"""Takes a layer, the linears that read each tensor, rows of it [n, K], and the mean |x| of its channels [K]."""
