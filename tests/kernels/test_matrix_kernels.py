"""The matrix products, against fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE

from cosmos_export.kernels import gemm_w4a16 as w4
from cosmos_export.kernels import gemm_w8a8 as w8
from cosmos_export.kernels.launch import FP8, Tile

SMALL = Tile((16, 16, 32), 4, 2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 1, 16), (33, 20, 48), (16, 48, 33), (50, 17, 64)])
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_w8a8(rows: int, outputs: int, depth: int, many: bool, fast: bool) -> None:
    a, weight = random(rows, depth).to(FP8), random(outputs, depth, seed=1).to(FP8)
    a_scale = torch.linspace(0.5, 2.0, rows if many else 1).to(DEVICE)
    w_scale = torch.linspace(0.1, 0.3, outputs if many else 1).to(DEVICE)
    bias = random(outputs, seed=2).to(torch.bfloat16) if many else None
    found = w8.gemm_w8a8(a, weight, a_scale, w_scale, bias, fast=fast, tile=SMALL)
    assert found.dtype == torch.bfloat16
    assert relative(found, w8.reference(a, weight, a_scale, w_scale, bias)) < 4e-3


def test_w8a8_is_scaled_mm() -> None:
    """The library's own product on the same operands, where this machine's PyTorch has it."""
    a, weight = random(32, 64).to(FP8), random(48, 64, seed=1).to(FP8)
    scales = torch.tensor(0.3, device=DEVICE), torch.tensor(0.7, device=DEVICE)
    theirs = torch._scaled_mm(a, weight.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16)
    mine = w8.gemm_w8a8(a, weight, scales[0].reshape(1), scales[1].reshape(1), tile=SMALL)
    assert relative(mine, theirs) < 8e-3


def test_w8a8_checks_its_operands() -> None:
    a, weight, one = random(4, 16).to(FP8), random(8, 16).to(FP8), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="E4M3"):
        w8.gemm_w8a8(a.float(), weight, one, one)
    with pytest.raises(ValueError, match="expected float32 of 1 or 4"):
        w8.gemm_w8a8(a, weight, torch.ones(3, device=DEVICE), one)
    with pytest.raises(ValueError, match="by weight"):
        w8.gemm_w8a8(a[:, :8], weight, one, one)


@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 1, 128), (33, 20, 256), (16, 50, 384)])
def test_w4a16(rows: int, outputs: int, depth: int) -> None:
    a = random(rows, depth).to(torch.bfloat16)
    values = torch.randint(-8, 8, (outputs, depth), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    scales = (0.01 + random(outputs, depth // 128).abs()).to(torch.bfloat16)
    found = w4.gemm_w4a16(a, w4.pack(values), scales, tile=Tile((16, 16)))
    assert relative(found, w4.reference(a, w4.pack(values), scales)) < 4e-3


def test_packing_is_undone() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 8)
    packed = w4.pack(values)
    assert packed.shape == (2, 64) and torch.equal(w4.unpack(packed), values)
    assert packed[0, 0] == 0x98  # −8 in the low half, −7 in the high one


def test_w4a16_checks_its_operands() -> None:
    a = random(4, 128).to(torch.bfloat16)
    packed = torch.zeros(8, 64, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="multiple of 128"):
        w4.gemm_w4a16(a[:, :64], packed, torch.ones(8, 1))
    with pytest.raises(ValueError, match="scales are"):
        w4.gemm_w4a16(a, packed, torch.ones(8, 2, dtype=torch.bfloat16, device=DEVICE))
