"""AWQ-lite: a factor for each input channel at which rounding the weight to INT4 hurts the product least.

The search is that of ModelOpt 0.47 (``awq_lite``; Lin et al., AWQ, 2023): factors s = mean|x|^α / mean|w|^(1−α) for
α in 0, 0.1 … 1, brought to √(max·min) = 1, and of these the one with the least squared error of the output on some rows
of the input. Linears that read the same tensor share one factor, so that it can be folded into what makes that tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cosmos_export.calibration.formats import layout_of, quantized_weight
from cosmos_export.calibration.search import SearchResult
from cosmos_export.precision.layout import LinearInputs
from cosmos_export.precision.schemes import searched_schemes

(_SCHEME,) = searched_schemes("awq")
_LAYOUT = layout_of(_SCHEME.name)
_ALPHAS = tuple(i / 10 for i in range(11))
_TINY = torch.finfo(torch.float32).tiny


def search_pre_scales(
    layer: nn.Module,
    readers: Mapping[str, Sequence[str]],
    rows: Mapping[str, torch.Tensor],
    means: Mapping[str, torch.Tensor],
) -> SearchResult:
    """Pre-scales of linears of ``layer``. ``readers``: the linears that read the input of each key of the others."""
    result: dict[str, torch.Tensor] = {}
    for name, linears in readers.items():
        weights = [layer.get_parameter(f"{linear}.weight").detach() for linear in linears]
        if any(_LAYOUT.refusal(tuple(weight.shape)) for weight in weights):
            continue
        found = search(weights, rows[name], means[name])
        result |= dict.fromkeys(linears, found)
    return SearchResult(result)


def search(weights: Sequence[torch.Tensor], rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """float32 [K]: the pre-scale of the input ``rows`` [n, K] of ``weights`` [N, K]; ``mean`` [K] is its mean |x|."""
    weight_mean = _weight_mean(weights)
    candidates = [_factor(mean, weight_mean, alpha) for alpha in _ALPHAS]
    errors = [sum(_error(weight, rows, factor) for weight in weights) for factor in candidates]
    return 1 / candidates[errors.index(min(errors))]


def _weight_mean(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over all rows of |w| divided by the largest |w| in its group of input channels."""
    total = torch.zeros(weights[0].shape[1])
    for weight in weights:
        groups = weight.float().abs().reshape(weight.shape[0], -1, _LAYOUT.numbers["group_size"])
        total += (groups / (groups.amax(-1, keepdim=True) + _TINY)).reshape(weight.shape).sum(0)
    return total / sum(weight.shape[0] for weight in weights)


def _factor(mean: torch.Tensor, weight_mean: torch.Tensor, alpha: float) -> torch.Tensor:
    factor = (mean.pow(alpha) / (weight_mean.pow(1 - alpha) + _TINY)).clamp(1e-4, 1e4)
    return factor / (factor.max() * factor.min()).sqrt()


def _error(weight: torch.Tensor, rows: torch.Tensor, factor: torch.Tensor) -> float:
    pre = 1 / factor
    rounded = _LAYOUT.decode(quantized_weight(_SCHEME.name, weight, LinearInputs(None, pre)))
    # In one product: what the rounded weight stands for, less the weight.
    difference = rounded * pre - weight.float()
    return float((rows @ difference.T).square().mean())
