"""Attention over own and prompt rows: against one softmax in fp64, and against the graph's operation."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE

from cosmos_export.ir import ops
from cosmos_export.kernels import joint_attention as kernel
from cosmos_export.kernels.joint_attention import check, joint_attention, reference
from cosmos_export.kernels.launch import FP8, Tile

SMALL = Tile((16, 32), 4, 2)


def operands(
    rows: int, keys: int, prefix: int, heads: int, kv_heads: int, size: int, *, branches: int = 0,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> list[torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    lead = (branches,) if branches else ()
    shapes = [(rows, heads)] + [(keys, kv_heads)] * 2 + [(prefix, kv_heads)] * 2
    return [torch.randn(*lead, *s, size, generator=generator).to(DEVICE, dtype) for s in shapes]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("rows", "keys", "prefix", "heads", "kv_heads", "size"),
    [(1, 1, 1, 1, 1, 16), (37, 37, 19, 4, 2, 32), (64, 64, 32, 2, 2, 16), (5, 70, 0, 4, 1, 16), (33, 31, 65, 8, 1, 64)],
)
def test_equals_the_graphs_operation(rows: int, keys: int, prefix: int, heads: int, kv_heads: int, size: int) -> None:
    given = operands(rows, keys, prefix, heads, kv_heads, size)
    found = joint_attention(*given, 0.3, tile=SMALL)
    assert relative(found, ops.JOINT_ATTENTION(*given, 0.3)) < 1e-6
    assert relative(found, reference(*given, 0.3)) < 1e-6


def test_bf16_is_within_its_rounding() -> None:
    given = operands(37, 37, 19, 4, 2, 32, dtype=torch.bfloat16)
    found = joint_attention(*given, 0.2, tile=SMALL)
    assert found.dtype == torch.bfloat16
    exact = reference(*given, 0.2)
    assert relative(found, exact) < 1.2 * relative(ops.JOINT_ATTENTION(*given, 0.2), exact) + 1e-3


@pytest.mark.parametrize("lengths", [(0, 19), (7, 16), (19, 1)])
def test_each_branch_has_its_own_prompt(lengths: tuple[int, int]) -> None:
    given = operands(21, 21, 19, 4, 2, 16, branches=2)
    own = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    for prefix in given[3:]:
        for branch, length in enumerate(lengths):
            prefix[branch, length:] = float("nan")  # rows beyond a length are never read
    found = joint_attention(*given, 0.25, prefix_lengths=own, tile=SMALL)
    for branch, length in enumerate(lengths):
        alone = [t[branch] for t in given[:3]] + [t[branch, :length] for t in given[3:]]
        assert relative(found[branch], ops.JOINT_ATTENTION(*alone, 0.25)) < 1e-6


def test_operands_are_read_where_they_lie() -> None:
    """Query, key and value as slices of one projection; a value that is stored transposed."""
    rows, heads, kv, size = 18, 4, 2, 16
    packed = torch.randn(rows, (heads + 2 * kv) * size).to(DEVICE)
    q, k, v = (t.unflatten(1, (-1, size)) for t in packed.split((heads * size, kv * size, kv * size), dim=1))
    prefix = [torch.randn(9, kv, size).to(DEVICE) for _ in "kv"]
    stored = v.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert stored.stride(0) == 1
    wanted = ops.JOINT_ATTENTION(q, k, v, *prefix, 0.25)
    assert relative(joint_attention(q, k, v, *prefix, 0.25, tile=SMALL), wanted) < 1e-6
    assert relative(joint_attention(q, k, stored, *prefix, 0.25, tile=SMALL), wanted) < 1e-6


def test_large_scores_do_not_overflow() -> None:
    given = operands(16, 40, 8, 1, 1, 16)
    found = joint_attention(*[100 * t for t in given[:2]], *given[2:], 1.0, tile=SMALL)
    assert torch.isfinite(found).all()


def test_fp8_with_a_scale_a_head() -> None:
    wide = operands(40, 40, 24, 4, 2, 32, branches=2)
    scales = tuple(torch.linspace(0.01, 0.02, n).to(DEVICE) for n in (4, 2, 2))
    of = (scales[0], scales[1], scales[2], scales[1], scales[2])
    narrow = [(t / s[:, None]).clamp(-448, 448).to(FP8) for t, s in zip(wide, of, strict=True)]
    lengths = torch.tensor([24, 5], dtype=torch.int32, device=DEVICE)
    found = joint_attention(*narrow, 0.2, prefix_lengths=lengths, scales=scales, tile=SMALL)
    exact = reference(*narrow, 0.2, prefix_lengths=lengths, scales=scales)
    assert found.dtype == torch.bfloat16
    # The probabilities have 3 bits of mantissa: at most 2^-4 of each, in both directions.
    assert relative(found, exact) < 0.03
    assert relative(exact, reference(*wide, 0.2, prefix_lengths=lengths)) < 0.06


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g.update(size=24), "power of two"),
        (lambda g: g.update(heads=3, kv_heads=2), "3 query heads over 2"),
        (lambda g: g.update(keys=0), "no key"),
    ],
)
def test_what_the_contract_excludes(change: object, said: str) -> None:
    shape = {"rows": 4, "keys": 4, "prefix": 2, "heads": 4, "kv_heads": 2, "size": 16}
    change(shape)  # type: ignore[operator]
    with pytest.raises(ValueError, match=said):
        joint_attention(*operands(**shape), 0.25)


def test_rows_beyond_a_32_bit_offset_are_refused() -> None:
    def rows(heads: int) -> torch.Tensor:
        return torch.empty_strided((300_000, heads, 16), (8192, 16, 1), dtype=torch.bfloat16, device="meta")

    with pytest.raises(ValueError, match="beyond 2³¹"):
        check(rows(4), rows(2), rows(2), rows(2)[:7], rows(2)[:7], 0.25, None, None)
    check(rows(4)[:200_000], rows(2)[:9], rows(2)[:9], rows(2)[:7], rows(2)[:7], 0.25, None, None)


def test_nothing_of_a_prompts_length_is_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers that Triton compiles for are those of another prompt, also where values lie transposed."""
    launched = list[dict[str, object]]()
    names = kernel.joint_attention_kernel.arg_names

    class Recorded:
        def __getitem__(self, grid: object) -> object:
            return lambda *given, **constants: launched.append(dict(zip(names, given, strict=False)) | constants)

    monkeypatch.setattr(kernel, "joint_attention_kernel", Recorded())
    for prompt in (37, 48):
        query, key, value, prefix, _ = (t.to(FP8) for t in operands(64, 64, prompt, 4, 2, 16))
        padded = torch.zeros(2, 16, 64, dtype=FP8)[:, :, :prompt].permute(2, 0, 1)
        ones = tuple(torch.ones(n) for n in (4, 2, 2))
        joint_attention(query, key, value, prefix, padded, 0.25, scales=ones)
    free = {"rows", "keys", "prefix_rows"}
    first, second = ({n: v for n, v in one.items() if isinstance(v, int) and n not in free} for one in launched)
    assert first == second and first["stride_pvn"] == 1


def test_scales_and_lengths_are_checked() -> None:
    given = operands(4, 4, 2, 4, 2, 16)
    scales = (torch.ones(4), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="no others take them"):
        joint_attention(*given, 0.25, scales=scales)
    with pytest.raises(ValueError, match="expected int32"):
        joint_attention(*given, 0.25, prefix_lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match="scales of"):
        joint_attention(*[t.to(FP8) for t in given], 0.25, scales=(torch.ones(2), torch.ones(2), torch.ones(2)))
