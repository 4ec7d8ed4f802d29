"""Bytes and scales against NVIDIA's ModelOpt: as recorded from it, and live where it is installed."""

from __future__ import annotations

from importlib import metadata

import make_modelopt_fixture as fixture
import pytest
import torch
from safetensors.torch import load_file

from cosmos_export.calibration.formats import FORMATS, layout_of, quantized_weight
from cosmos_export.diagnostics import UserError
from cosmos_export.ir import packing
from cosmos_export.precision.layout import LinearInputs, Rounding

NAMES = sorted(fixture.CONFIGS)


def ours(
    name: str, weight: torch.Tensor, inputs: torch.Tensor, theirs: dict[str, torch.Tensor], rounding: Rounding
) -> dict[str, torch.Tensor]:
    """The same with our functions. The pre-scale is an input here: its search is tested elsewhere."""
    kind = "int4" if name.startswith("int4") else name
    pre = theirs.pop(fixture.SEARCHED, None)
    amax = None if kind == "int4" else float(inputs.abs().max())
    return quantized_weight(kind, weight, LinearInputs(amax, pre), rounding)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        torch.testing.assert_close(raw(found[key]), raw(value), rtol=0, atol=0, msg=key)


def raw(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def recorded(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    tensors = load_file(fixture.FIXTURE)
    weight, inputs = fixture.layer()
    assert torch.equal(tensors["weight"], weight) and torch.equal(tensors["inputs"], inputs)
    return weight, inputs, {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


@pytest.mark.parametrize("name", NAMES)
def test_bytes_and_scales_are_those_recorded_from_modelopt(name: str) -> None:
    weight, inputs, theirs = recorded(name)
    same(ours(name, weight, inputs, theirs, "modelopt"), theirs)


def test_exact_rounding_changes_few_bytes_and_no_scale() -> None:
    weight, inputs, theirs = recorded("fp8")
    found = ours("fp8", weight, inputs, theirs, "exact")
    different = (raw(found["weight"]) != raw(theirs["weight"])).float().mean()
    assert 0.005 < different < 0.06
    for key in ("weight_scale", "input_scale"):
        assert torch.equal(found[key], theirs[key])
    error = {
        name: float((layout_of("fp8").decode(tensors) - weight.float()).norm())
        for name, tensors in (("exact", found), ("twice", theirs))
    }
    assert error["exact"] < error["twice"]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_and_scales_are_those_of_modelopt(name: str, seed: int) -> None:
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt 0.47 (heavy); its recorded results are tested above")
    assert metadata.version("nvidia-modelopt") == fixture.VERSION
    weight, inputs = fixture.layer(seed, rows=96, columns=384)
    theirs = fixture.exported(name, weight, inputs)
    same(ours(name, weight, inputs, theirs, "modelopt"), theirs)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_comes_back_near_what_it_was(kind: str) -> None:
    """Within the relative errors that are usual: FP8 2.6 %, INT4 in groups of 128 11.7 %, NVFP4 9.5 %."""
    weight = torch.from_numpy(fixture.layer(4, 64, 512)[0].float().numpy()).bfloat16()
    back = layout_of(kind).decode(quantized_weight(kind, weight, LinearInputs(1.0)))
    error = float((back - weight.float()).norm() / weight.float().norm())
    assert error < {"fp8": 0.03, "int4": 0.13, "nvfp4": 0.11}[kind]
    assert error > 0.01


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_independent_of_how_many_are_in_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = fixture.layer(5)
    whole = quantized_weight(kind, weight, LinearInputs(2.0))
    monkeypatch.setattr("cosmos_export.precision.layout._ROWS", 10)
    same(quantized_weight(kind, weight, LinearInputs(2.0)), whole)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_of_zeros_has_a_scale(kind: str) -> None:
    found = quantized_weight(kind, torch.zeros(2, 128, dtype=torch.bfloat16), LinearInputs(1.0))
    assert not layout_of(kind).decode(found).any()
    assert all(bool((value.float() > 0).all()) for key, value in found.items() if "scale" in key)


def test_a_pre_scale_leaves_the_product_as_it_was() -> None:
    weight, inputs = fixture.layer(6)
    pre = torch.linspace(0.5, 2, weight.shape[1])
    found = quantized_weight("int4", weight, LinearInputs(None, pre))
    plain = quantized_weight("int4", weight, LinearInputs(None))
    expected = inputs.float() @ weight.float().T
    for tensors, x in ((found, inputs.float() * pre), (plain, inputs.float())):
        error = (x @ layout_of("int4").decode(tensors).T - expected).norm() / expected.norm()
        assert error < 0.2


def test_four_bit_floats_round_to_the_nearest_and_ties_to_even() -> None:
    values = torch.tensor([0.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 9.0, -0.3, -5.0, -0.1])
    codes = packing.e2m1_codes(packing.round_e2m1(values))
    assert codes.tolist() == [0, 0, 1, 2, 2, 4, 4, 6, 6, 7, 7, 9, 14, 8]


def test_scales_are_divisions_in_float32() -> None:
    amax = torch.tensor([448.0, 1.0, 3.3, 0.0])
    assert torch.equal(packing.fp8_scale(amax), torch.where(amax > 0, amax / torch.tensor(448.0), 1.0))
    assert packing.nvfp4_scale(torch.tensor(2688.0)) == 1
    assert packing.fp8_scale(amax.double()).dtype is packing.nvfp4_scale(amax.double()).dtype is torch.float32


def test_what_cannot_be_quantized_is_said() -> None:
    assert "multiple of 128" in str(layout_of("int4").refusal((64, 96)))
    assert "odd" in str(layout_of("int4").refusal((63, 128)))
    assert "multiple of 16" in str(layout_of("nvfp4").refusal((64, 24)))
    assert layout_of("fp8").refusal((63, 24)) is None
    with pytest.raises(UserError, match="CX331"):
        quantized_weight("fp8", torch.tensor([[1.0, float("nan")]]), LinearInputs(1.0))
