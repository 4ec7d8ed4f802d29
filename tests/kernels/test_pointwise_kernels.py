"""The memory-bound kernels: equal to the graph's operations, bit for bit where sums of squares are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_device import DEVICE

from cosmos_export.ir import ops
from cosmos_export.kernels import activation_quantize as act
from cosmos_export.kernels import norm_quantize as norm
from cosmos_export.kernels import qkv_pack as pack
from cosmos_export.kernels import sampler_step
from cosmos_export.kernels.launch import FP8, Tile, quantize
from cosmos_export.sampling import COLUMNS
from cosmos_export.sampling.solvers import SolverState, unipc_step

BF16, F32 = torch.bfloat16, torch.float32


def random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def steps_apart(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """By how many representable numbers two tensors of one type differ at most."""
    view = {BF16: torch.int16, F32: torch.int32, FP8: torch.uint8}[found.dtype]
    a, b = (t.contiguous().view(view).to(torch.int64) for t in (found, wanted))
    top = 1 << (8 * found.element_size() - 1)
    a, b = (
        torch.where(x < 0, -(x + top), x) if view is not torch.uint8 else torch.where(x >= top, top - x, x)
        for x in (a, b)
    )
    return int((a - b).abs().max())


# -- query, key, value ------------------------------------------------------------------------------------------------


def projections(rows: int, heads: int, kv: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Slices of one merged projection, as they lie."""
    return list(random(rows, (heads + 2 * kv) * size, dtype=dtype).split((heads * size, kv * size, kv * size), dim=1))


@pytest.mark.parametrize(
    ("dtype", "weight", "table"), [(BF16, BF16, BF16), (BF16, F32, BF16), (F32, F32, F32), (BF16, BF16, F32)]
)
@pytest.mark.parametrize(("rows", "heads", "kv", "size", "repeats"), [(7, 4, 2, 16, 1), (18, 2, 1, 8, 2)])
def test_qkv_pack_is_norm_then_rotary(
    dtype: torch.dtype, weight: torch.dtype, table: torch.dtype, rows: int, heads: int, kv: int, size: int, repeats: int
) -> None:
    q, k, v = projections(rows, heads, kv, size, dtype)
    w_q, w_k = random(size, dtype=weight, seed=1), random(size, dtype=weight, seed=2)
    cos, sin = (random(rows // repeats, size // 2, dtype=table, seed=s) for s in (3, 4))
    found = pack.qkv_pack(q, k, v, w_q, w_k, cos, sin, 1e-6, tile=Tile((4,)))
    angles = [t.repeat(repeats, 1) for t in (cos, sin)]
    for result, x, w in ((found[0], q, w_q), (found[1], k, w_k)):
        normal = ops.RMS_NORM(x.unflatten(1, (-1, size)), w, 1e-6).to(dtype)
        wanted = ops.ROTARY(normal, *angles).to(dtype)
        # A device contracts products and sums: in fp32 a small difference of two numbers is many steps there.
        assert result.is_contiguous()
        assert steps_apart(result, wanted) <= (1 if dtype == BF16 else 64) or (dtype == F32 and DEVICE != "cpu")
        assert torch.allclose(result.float(), wanted.float(), rtol=1e-2 if dtype == BF16 else 1e-6, atol=1e-6)
    assert torch.equal(found[2], v.unflatten(1, (-1, size)))
    for mine, theirs in zip(found, pack.reference(q, k, v, w_q, w_k, cos, sin, 1e-6), strict=True):
        assert torch.allclose(mine.float(), theirs.float(), rtol=1e-2 if dtype == BF16 else 1e-6, atol=1e-6)


def test_qkv_pack_without_norms() -> None:
    """Edge's reasoner has none on its own query and key; its exported key has one."""
    q, k, v = projections(5, 2, 1, 16, BF16)
    cos, sin = random(5, 8, seed=1), random(5, 8, seed=2)
    plain = pack.qkv_pack(q, k, v, None, None, cos, sin, 1e-6, tile=Tile((4,)))
    assert torch.equal(plain[0], ops.ROTARY(q.unflatten(1, (-1, 16)), cos, sin))
    weight = random(16, seed=3)
    half = pack.qkv_pack(q, k, v, None, weight, cos, sin, 1e-6, tile=Tile((4,)))
    assert torch.equal(half[0], plain[0]) and not torch.equal(half[1], plain[1])
    other = pack.qkv_pack(q, k, v, weight, None, cos, sin, 1e-6, tile=Tile((4,)))
    assert torch.equal(other[1], plain[1]) and not torch.equal(other[0], plain[0])


@pytest.mark.parametrize("transpose", [False, True])
def test_qkv_pack_quantizes_a_head_at_a_time(transpose: bool) -> None:
    q, k, v = projections(9, 4, 2, 16, BF16)
    w = random(16, seed=1)
    cos, sin = random(9, 8, seed=3), random(9, 8, seed=4)
    scales = tuple(torch.linspace(0.005, 0.02, n).to(DEVICE) for n in (4, 2, 2))
    found = pack.qkv_pack(q, k, v, w, w, cos, sin, 1e-6, scales=scales, transpose_value=transpose, tile=Tile((4,)))
    wanted = pack.reference(q, k, v, w, w, cos, sin, 1e-6, scales=scales)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == FP8 and mine.shape == theirs.shape and steps_apart(mine, theirs) <= 1
    assert (found[2].stride(0) == 1) == transpose and (not transpose or found[2].stride(2) % 16 == 0)


def test_qkv_pack_checks_its_operands() -> None:
    q, k, v = projections(6, 2, 1, 16, BF16)
    cos = random(6, 8)
    with pytest.raises(ValueError, match="over a table of"):
        pack.qkv_pack(q, k, v, None, None, cos[:4], cos[:4], 1e-6)
    with pytest.raises(ValueError, match="different flavours"):
        pack.qkv_pack(q, k, v, random(16), random(16, dtype=F32), cos, cos, 1e-6)
    with pytest.raises(ValueError, match="not contiguous"):
        pack.qkv_pack(q.t().contiguous().t(), k, v, None, None, cos, cos, 1e-6)


# -- norm, activation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 33, 200])
@pytest.mark.parametrize(("dtype", "weight"), [(BF16, BF16), (BF16, F32), (F32, F32)])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_norm_quantize(width: int, dtype: torch.dtype, weight: torch.dtype, static: bool, residual: bool) -> None:
    x, w = random(5, width, dtype=dtype), random(width, dtype=weight, seed=1)
    x[3] = 0.0
    delta = random(5, width, dtype=dtype, seed=2) if residual else None
    scale = torch.tensor([0.011], device=DEVICE) if static else None
    total = x + delta if delta is not None else x.clone()
    normal = ops.RMS_NORM(total, w, 1e-6).to(dtype)
    expected = norm.reference(x, w, 1e-6, scale, delta=delta)
    y, scales = norm.norm_quantize(x, w, 1e-6, scale, delta=delta)
    assert torch.equal(x, total)  # the residual sum, in place
    if static:
        assert steps_apart(y, quantize(normal, scale)) <= 1
    else:
        assert torch.allclose(
            scales, normal.float().abs().amax(-1).clamp_min(1e-12) / 448, rtol=1e-2 if dtype == BF16 else 1e-5
        )
    assert steps_apart(y, expected[0]) <= 1
    assert torch.allclose(scales, expected[1], rtol=1e-2 if dtype == BF16 else 1e-5)


def test_the_residual_sum_apart() -> None:
    """As a graph wants it, whose values nothing overwrites."""
    x, delta, w = random(5, 33), random(5, 33, seed=1), random(33, seed=2)
    before, total, scale = x.clone(), torch.empty_like(x), torch.tensor([0.02], device=DEVICE)
    y, _ = norm.norm_quantize(x, w, 1e-6, scale, delta=delta, total=total)
    assert torch.equal(x, before) and torch.equal(total, x + delta)
    assert steps_apart(y, norm.reference(x, w, 1e-6, scale, delta=delta)[0]) <= 1
    with pytest.raises(ValueError, match="without anything to add"):
        norm.norm_quantize(x, w, 1e-6, scale, total=total)


def test_norm_quantize_takes_rows_where_they_lie() -> None:
    wide = random(4, 100)
    x, w = wide[:, :64], random(64, seed=1)
    y, _ = norm.norm_quantize(x, w, 1e-6, torch.tensor([0.01], device=DEVICE))
    assert steps_apart(y, norm.reference(x, w, 1e-6, torch.tensor([0.01], device=DEVICE))[0]) <= 1
    with pytest.raises(ValueError, match="static scale"):
        norm.norm_quantize(x, w, 1e-6, torch.tensor([0.01, 0.02], device=DEVICE))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 65), (4, 130)])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_activation_quantize(gated: bool, static: bool, rows: int, width: int, dtype: torch.dtype) -> None:
    merged = random(rows, 2 * width, dtype=dtype)
    x, up = merged.split(width, dim=1)
    scale = torch.tensor([0.03], device=DEVICE) if static else None
    value = ops.SWIGLU(x, up) if gated else torch.relu(x) * torch.relu(x)
    y, scales = act.activation_quantize(x, up if gated else None, scale, tile=Tile((64,)))
    value = value.clamp(-448 * 0.03, 448 * 0.03) if static else value
    expected, expected_scales = act.reference(x, up if gated else None, scale)
    assert steps_apart(y, expected) <= 1
    assert torch.allclose(scales, expected_scales, rtol=1e-2 if dtype == BF16 else 1e-5)
    found = y.float() * (scales if static else scales[:, None])
    assert torch.allclose(found, value.float(), rtol=0.07, atol=0.02)


@pytest.mark.parametrize("static", [True, False])
def test_gate_and_up_in_turns(static: bool) -> None:
    """Merged weights whose rows alternate: gate and up are every other element of the projection."""
    merged = random(3, 65, 2)
    gate, up = merged[..., 0], merged[..., 1]
    scale = torch.tensor([0.03], device=DEVICE) if static else None
    y, scales = act.activation_quantize(gate, up, scale, tile=Tile((64,)))
    expected, expected_scales = act.reference(gate, up, scale)
    assert steps_apart(y, expected) <= 1 and torch.allclose(scales, expected_scales, rtol=1e-2)
    with pytest.raises(ValueError, match="strides"):
        act.activation_quantize(gate, up.contiguous(), scale)
    with pytest.raises(ValueError, match="strides"):
        act.activation_quantize(random(3, 65, 3)[..., 0], None, scale)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter: silu(-1e4) is 0
def test_values_beyond_the_range_saturate() -> None:
    x = torch.tensor([[1e4, -1e4, 3.0]], device=DEVICE)
    y, _ = act.activation_quantize(x, torch.ones_like(x), torch.tensor([1.0], device=DEVICE), tile=Tile((64,)))
    assert y.float().tolist() == [[448.0, 0.0, 2.75]]


# -- sampler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("shape", "masks"), [((1, 3, 4, 5, 3), ((2, 4),)), ((7, 6), ((0, 7), (1, 6))), ((2, 9), ())])
def test_sampler_step_is_the_solvers(guided: bool, shape: tuple[int, ...], masks: tuple[tuple[int, int], ...]) -> None:
    generator = np.random.default_rng(0)
    row = generator.normal(size=10)
    cond, uncond = random(*shape), random(*shape, seed=1) if guided else None
    state = [random(*shape, dtype=F32, seed=s) for s in range(2, 6)]
    before = [t.cpu().numpy().copy() for t in state]
    given = [
        (axis, torch.from_numpy((generator.random(n) > 0.4).astype(np.float32)).to(DEVICE, BF16)) for axis, n in masks
    ]
    narrow = torch.full_like(cond, float("nan"))
    coefficients = torch.from_numpy(row.astype(np.float32)).to(DEVICE)
    expected = sampler_step.reference(coefficients, cond, uncond, *(t.clone() for t in state), masks=given)
    sampler_step.unipc_step(coefficients, cond, uncond, *state, masks=given, narrow=narrow, tile=Tile((64,)))
    c = cond.float().cpu().numpy()
    velocity = (
        c if uncond is None else uncond.float().cpu().numpy() + np.float32(row[0]) * (c - uncond.float().cpu().numpy())
    )
    noisy = np.ones(shape, dtype=np.float32)
    for axis, mask in given:
        noisy = noisy * mask.float().cpu().numpy().reshape([-1 if i == axis else 1 for i in range(len(shape))])
    wanted = unipc_step(row, SolverState(*before), velocity, noisy)
    for mine, theirs, solver in zip(state, expected, (wanted.sample, wanted.last, wanted.m0, wanted.m1), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        assert np.allclose(mine.cpu().numpy(), solver, rtol=1e-5, atol=1e-5)
    held = noisy == 0
    assert np.array_equal(state[0].cpu().numpy()[held], before[0][held])  # bit for bit
    assert torch.equal(narrow, state[0].to(BF16))


def test_the_next_state_apart() -> None:
    x = [random(4, 5, dtype=F32, seed=s) for s in range(4)]
    before, into = [t.clone() for t in x], tuple(torch.empty_like(x[0]) for _ in range(3))
    row, cond = random(10, dtype=F32, seed=9), random(4, 5, seed=8)
    sampler_step.unipc_step(row, cond, None, *x, into=into, tile=Tile((64,)))
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))
    expected = sampler_step.reference(row, cond, None, *x)
    for mine, theirs in zip(into, expected[:3], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_sampler_step_has_the_solvers_columns() -> None:
    assert COLUMNS["unipc"] == sampler_step.COLUMNS


def test_sampler_step_checks_its_operands() -> None:
    x = random(4, 4, dtype=F32)
    with pytest.raises(ValueError, match="coefficients"):
        sampler_step.unipc_step(torch.zeros(9), x, None, x, x, x, x)
    with pytest.raises(ValueError, match="float32"):
        sampler_step.unipc_step(torch.zeros(10), x, None, x.to(BF16), x, x, x)
    with pytest.raises(ValueError, match="mask"):
        sampler_step.unipc_step(torch.zeros(10), x, None, x, x, x, x, masks=[(0, torch.ones(3))])
