"""Ranges from what was seen, and the AWQ search against ModelOpt's."""

from __future__ import annotations

import make_modelopt_fixture as fixture
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosmos_export.calibration.awq import _error, search
from cosmos_export.calibration.observers import ObservedRange, Observer, choose_range


def values(seed: int = 0, count: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * 3).bfloat16().reshape(-1, 100)


def observed(*tensors: torch.Tensor) -> ObservedRange:
    first, *others = (ObservedRange.of(tensor, count=True) for tensor in tensors)
    for other in others:
        first = first.merged(other)
    return first


def test_counts_are_the_exact_distribution_in_any_order() -> None:
    parts = values(1), values(2), values(3)
    forward, backward = observed(*parts), observed(*reversed(parts))
    assert forward.amax == backward.amax == max(float(part.abs().max()) for part in parts)
    assert forward.counts is not None and backward.counts is not None
    assert torch.equal(forward.counts, backward.counts) and int(forward.counts.sum()) == 60_000


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.99, 100.0])
def test_percentile_is_that_of_the_sorted_values(percent: float) -> None:
    data = values(4)
    found = choose_range(Observer("percentile", margin=1.0, percentile=percent), observed(data))
    ordered = np.sort(data.float().abs().flatten().numpy())
    above = int(np.floor(len(ordered) * (100 - percent) / 100 + 1e-9))
    assert found == ordered[len(ordered) - above - 1]


def test_absmax_and_margin_are_in_float32() -> None:
    data = values(5)
    amax = np.float32(float(data.abs().max()))
    assert choose_range(Observer("absmax", margin=1.0), ObservedRange.of(data, count=False)) == amax
    assert choose_range(Observer("absmax", margin=1.25), ObservedRange.of(data, count=False)) == amax * np.float32(1.25)


def test_mse_has_the_least_error_of_all_ranges() -> None:
    data = values(6)
    data[0, 0] = 4000.0  # one outlier among 20,000 values
    seen = observed(data)
    found = choose_range(Observer("mse", margin=1.0), seen)

    def error(amax: float) -> float:
        scale = amax / 448
        rounded = (data.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return float((rounded - data.float()).double().square().sum())

    assert error(found) <= min(error(seen.amax * share) for share in np.linspace(0.2, 1, 81)) * 1.0001


def test_what_is_not_finite_is_seen() -> None:
    for bad in (float("nan"), float("inf")):
        data = values(7)
        data[3, 3] = bad
        assert not ObservedRange.of(data, count=False).finite
    assert ObservedRange.of(values(7), count=False).finite
    assert choose_range(Observer("mse"), observed(torch.zeros(2, 2))) == 0


def test_the_search_finds_what_modelopt_finds() -> None:
    """ModelOpt takes its mean in bfloat16 and its loss on rounded outputs; the factor is the same but for that."""
    weight, inputs = fixture.layer()
    theirs = load_file(fixture.FIXTURE)[f"int4_awq.{fixture.SEARCHED}"]
    found = search([weight], inputs.float(), inputs.float().abs().mean(0))
    torch.testing.assert_close(found, theirs.reshape(-1), rtol=0.02, atol=0)
    plain = _error(weight, inputs.float(), torch.ones(weight.shape[1]))
    assert _error(weight, inputs.float(), 1 / found) < 0.9 * plain
