"""normalize: norms, rotations, gates and attention are recognised; look-alikes are not, and it says why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from sketch import N, Sketch, apply, aten, declines, ops, targets

from cosmos_export.diagnostics import UserError
from cosmos_export.ir.dims import symbol
from cosmos_export.passes.normalize import Normalize
from cosmos_export.passes.pipeline import run_passes


def test_counts_follow_from_the_model(compile_tiny: Any) -> None:
    """Per layer: omni has 4 + 4 norms (q, k of both towers), Edge 4 + 3 (q, k generated, the extra key norm)."""
    for backbone, norms, gates, rotations in (("omni", 8, 2, 4), ("edge", 7, 0, 5)):
        for layers in (1, 2):
            changes = compile_tiny(backbone, layers=layers).reports["normalize"].result.changes
            assert changes["norms"] == norms * layers + 2  # and one after each tower
            assert changes["gated activations"] == gates * layers
            assert changes["attentions"] == 2 * layers
            assert changes["rotations"] == rotations * layers


def test_nothing_is_left_or_declined(compiled: Any) -> None:
    assert compiled.reports["normalize"].result.declined == []
    left = set(targets(compiled.stages["normalize"], "joint"))
    assert not left & Normalize.removes


def norm_of(**options: Any) -> tuple[Sketch, Any]:
    s = Sketch()
    x = s.input("x", (N, 8))
    return s, s.norm(x, s.weight("w", (8,)), **options)


def test_a_norm_is_one_node_and_bit_exact() -> None:
    s, y = norm_of(eps=1e-5)
    program = s.program(y=y)
    assert apply(Normalize(), program).changes == Counter({"norms": 1})
    (node,) = program.graphs["body"].calls()
    assert node.target is ops.RMS_NORM and node.args[2] == 1e-5


@pytest.mark.parametrize("options", [{"axis": 0}, {"exponent": 3}], ids=["other axis", "cube"])
def test_a_look_alike_of_a_norm_stays(options: dict[str, Any]) -> None:
    s, y = norm_of(**options)
    declines(Normalize(), s.program(y=y), "rsqrt that is not the root mean square of one value along its last axis")


def test_a_norm_with_statistics_in_low_precision_stays() -> None:
    """The one operation computes its statistics in fp32: this would be another function."""
    s = Sketch()
    x = s.input("x", (N, 8), dtype=torch.bfloat16)
    y = s.norm(x, s.weight("w", (8,), torch.bfloat16))
    declines(Normalize(), s.program(y=y), "rsqrt that is not")


def test_a_norm_scaled_by_one_number_stays() -> None:
    s = Sketch()
    y = s.norm(s.input("x", (N, 8)), s.weight("w", (1,)))
    declines(Normalize(), s.program(y=y), "rsqrt that is not")


def test_the_root_of_another_value_stays() -> None:
    s = Sketch()
    x, z = s.input("x", (N, 8)), s.input("z", (N, 8))
    mean = s.call(aten.mean.dim, s.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    root = s.call(aten.rsqrt.default, s.call(aten.add.Tensor, mean, 1e-6))
    y = s.call(aten.mul.Tensor, s.call(aten.mul.Tensor, z, root), s.weight("w", (8,)))
    declines(Normalize(), s.program(y=y), "rsqrt that is not")


def test_a_normal_value_that_is_read_before_its_weight_stays() -> None:
    s = Sketch()
    y = s.norm(s.input("x", (N, 8)), s.weight("w", (8,)))
    declines(Normalize(), s.program(y=y, unweighted=y.args[0]), "rsqrt that is not")


def test_a_root_without_a_weight_or_an_epsilon_stays() -> None:
    s = Sketch()
    x = s.input("x", (N, 8))
    mean = s.call(aten.mean.dim, s.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    bare = s.call(aten.mul.Tensor, x, s.call(aten.rsqrt.default, s.call(aten.add.Tensor, mean, 1.0)))
    sudden = s.call(aten.mul.Tensor, x, s.call(aten.rsqrt.default, mean))
    declines(Normalize(), s.program(y=bare, z=sudden), "rsqrt that is not")


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_a_gated_activation_in_either_order(swapped: bool) -> None:
    s = Sketch()
    gate, up = s.input("g", (N, 8)), s.input("u", (N, 8))
    silu = s.call(aten.silu.default, gate)
    y = s.call(aten.mul.Tensor, *((up, silu) if swapped else (silu, up)))
    program = s.program(y=y)
    assert apply(Normalize(), program).changes["gated activations"] == 1
    (node,) = program.graphs["body"].calls()
    assert (node.target, node.args) == (ops.SWIGLU, (gate, up))


def test_a_gate_that_is_read_elsewhere_or_repeats_rows_stays() -> None:
    s = Sketch()
    gate, up, row = s.input("g", (N, 8)), s.input("u", (N, 8)), s.input("r", (1, 8))
    shared = s.call(aten.silu.default, gate)
    y = s.call(aten.mul.Tensor, shared, up)
    z = s.call(aten.mul.Tensor, s.call(aten.silu.default, up), row)
    program = s.program(y=y, z=z, shared=shared)
    assert not Normalize().run(program).modified


# -- attention --------------------------------------------------------------------------------------------------------


def attention_of(*extra: Any, order: tuple[int, ...] = (0, 2, 1, 3), swap_rows: bool = True, **options: Any) -> Any:
    s = Sketch()
    q, k, v = (s.input(n, (N, heads, 8)) for n, heads in (("q", 4), ("k", 2), ("v", 2)))
    rows = [s.batched(t) if swap_rows else s.call(aten.unsqueeze.default, t, 0) for t in (q, k, v)]
    mask = [s.constant("mask", torch.zeros(1))] if extra == ("mask",) else list(extra)
    named = {k: s.constant("mask", torch.zeros(1)) if v == "mask" else v for k, v in options.items()}
    out = s.call(aten.scaled_dot_product_attention.default, *rows, *mask, **named, enable_gqa=swap_rows)
    return s.program(y=s.unbatched(out, order))


def test_attention_on_rows() -> None:
    program = attention_of(None, 0.0, True)
    assert apply(Normalize(), program).changes["attentions"] == 1
    (node,) = program.graphs["body"].calls()
    assert node.target is ops.ATTENTION and node.args[3] is True and node.args[4] == 8**-0.5


def test_attention_keeps_a_scale_of_its_own_and_reads_options_by_name() -> None:
    program = attention_of(scale=0.25, is_causal=True)
    apply(Normalize(), program)
    (node,) = program.graphs["body"].calls()
    assert node.args[3:] == (True, 0.25)


ATTENTION_REASON = "attention with a mask, dropout, a batch, or another layout"


@pytest.mark.parametrize(
    "program",
    [
        lambda: attention_of("mask"),
        lambda: attention_of(attn_mask="mask"),
        lambda: attention_of(None, 0.1),
        lambda: attention_of(swap_rows=False),
    ],
    ids=["mask", "mask by name", "dropout", "rows not swapped"],
)
def test_other_attention_stays(program: Any) -> None:
    declines(Normalize(), program(), ATTENTION_REASON)


def test_attention_that_leaves_in_another_layout_stays() -> None:
    """[1, heads, N, d] permuted to [1, d, heads, N] is not rows, though a permute and a squeeze follow."""
    declines(Normalize(), attention_of(order=(0, 3, 1, 2)), ATTENTION_REASON)


# -- rotations --------------------------------------------------------------------------------------------------------


def rotation_of(halves: str, *, sine_first: bool = False, axis: int = -1) -> Any:
    s = Sketch()
    x = s.input("x", (N, 2, 8))
    f, g = s.input("f", (N, 4)), s.input("g", (N, 4))
    parts = [f, f] if halves == "equal" else [f, g]
    angles = s.call(aten.cat.default, parts, axis)
    functions = (aten.sin.default, aten.cos.default) if sine_first else (aten.cos.default, aten.sin.default)
    made = [s.call(function, angles) for function in functions]
    cos, sin = made[::-1] if sine_first else made
    turned = s.call(
        aten.cat.default,
        [s.call(aten.neg.default, s.call(aten.slice.Tensor, x, 2, 4, 8)), s.call(aten.slice.Tensor, x, 2, 0, 4)],
        -1,
    )
    straight = s.call(aten.mul.Tensor, x, s.call(aten.unsqueeze.default, cos, 1))
    return s.program(
        y=s.call(aten.add.Tensor, straight, s.call(aten.mul.Tensor, turned, s.call(aten.unsqueeze.default, sin, 1)))
    )


@pytest.mark.parametrize("sine_first", [False, True])
def test_a_rotation_reads_half_tables(sine_first: bool) -> None:
    program = rotation_of("equal", sine_first=sine_first)
    assert apply(Normalize(), program).changes["rotations"] == 1
    (node,) = program.graphs["body"].calls(ops.ROTARY)
    assert [t.meta["spec"].shape for t in node.args[1:]] == [(N, 4), (N, 4)]
    assert aten.cat.default not in targets(program)


def test_tables_whose_halves_differ_stay() -> None:
    declines(Normalize(), rotation_of("different"), "the two halves of its tables are not shown to be equal")


def test_tables_that_arrive_whole_stay() -> None:
    s = Sketch()
    x, cos, sin = s.input("x", (N, 2, 8)), s.input("cos", (N, 8)), s.input("sin", (N, 8))
    negated = s.call(aten.neg.default, s.call(aten.slice.Tensor, x, 2, 4, 8))
    turned = s.call(aten.cat.default, [negated, s.call(aten.slice.Tensor, x, 2, 0, 4)], -1)
    straight = s.call(aten.mul.Tensor, x, s.call(aten.unsqueeze.default, cos, 1))
    y = s.call(aten.add.Tensor, straight, s.call(aten.mul.Tensor, turned, s.call(aten.unsqueeze.default, sin, 1)))
    declines(Normalize(), s.program(y=y), "the two halves of its tables are not shown to be equal")


def turned_by(s: Sketch, x: Any, first: Any, second: Any, size: int = 8, unsqueeze: int = 1) -> Any:
    table = s.input("table", (N, size))
    wide = s.call(aten.unsqueeze.default, table, unsqueeze)
    turned = s.call(aten.cat.default, [first, second], -1)
    return s.call(aten.add.Tensor, s.call(aten.mul.Tensor, x, wide), s.call(aten.mul.Tensor, turned, wide))


@pytest.mark.parametrize("wrong", ["not negated", "halves in order", "quarter"])
def test_other_sums_of_products_are_no_rotation(wrong: str) -> None:
    s = Sketch()
    x = s.input("x", (N, 2, 8))
    low, high = s.call(aten.slice.Tensor, x, 2, 0, 4), s.call(aten.slice.Tensor, x, 2, 4, 8)
    if wrong == "not negated":
        first, second = high, low
    elif wrong == "halves in order":
        first, second = s.call(aten.neg.default, low), high
    else:
        first, second = s.call(aten.neg.default, high), s.call(aten.slice.Tensor, x, 2, 2, 6)
    program = s.program(y=turned_by(s, x, first, second))
    assert not Normalize().run(program).modified


def test_a_rotation_of_values_of_another_rank_stays() -> None:
    s = Sketch()
    x = s.input("x", (N, 8))
    negated = s.call(aten.neg.default, s.call(aten.slice.Tensor, x, 1, 4, 8))
    table = s.input("table", (N, 8))
    turned = s.call(aten.cat.default, [negated, s.call(aten.slice.Tensor, x, 1, 0, 4)], -1)
    y = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, x, table), s.call(aten.mul.Tensor, turned, table))
    assert not Normalize().run(s.program(y=y)).modified


# -- writes in place and identities -----------------------------------------------------------------------------------


def test_a_strided_write_becomes_a_selection() -> None:
    s = Sketch()
    base, other = s.input("base", (N, 9)), s.input("other", (N, 9))
    part = s.call(aten.slice.Tensor, other, 1, 1, 9, 3)
    program = s.program(y=s.call(aten.slice_scatter.default, base, part, 1, 1, 9, 3))
    assert apply(Normalize(), program).changes["writes in place"] == 1
    assert targets(program) == [aten.where.self]


@pytest.mark.parametrize("wrong", ["other part", "longer source", "not a part", "symbolic"])
def test_a_write_of_something_else_stays(wrong: str) -> None:
    s = Sketch()
    base = s.input("base", (N, 9))
    if wrong == "other part":
        part, place = s.call(aten.slice.Tensor, s.input("other", (N, 9)), 1, 0, 8, 3), (1, 1, 9, 3)
    elif wrong == "longer source":
        part, place = s.call(aten.slice.Tensor, s.input("other", (N, 12)), 1, 1, 9, 3), (1, 1, 9, 3)
    elif wrong == "not a part":
        part, place = s.input("other", (N, 3)), (1, 1, 9, 3)
    else:
        part, place = s.call(aten.slice.Tensor, s.input("other", (N, 9)), 0, 0, N), (0, 0, N, 1)
    program = s.program(y=s.call(aten.slice_scatter.default, base, part, *place))
    declines(Normalize(), program, "writes a part that is not the same part of another value of fixed size")


def test_reads_of_a_written_row_skip_the_write() -> None:
    s = Sketch()
    base, row = s.input("base", (3, N)), s.input("row", (N,))
    written = s.call(aten.select_scatter.default, base, row, 0, 1)
    same, other = s.call(aten.select.int, written, 0, 1), s.call(aten.select.int, written, 0, 2)
    elsewhere = s.call(aten.select_scatter.default, base, row, 0, 0)
    sums = s.call(aten.add.Tensor, s.call(aten.neg.default, same), other)
    program = s.program(y=sums, z=s.call(aten.neg.default, elsewhere))
    assert apply(Normalize(), program).changes["writes in place"] == 2
    assert targets(program).count(aten.select_scatter.default) == 1  # the one that is read whole


def test_what_changes_nothing_goes() -> None:
    s = Sketch()
    x = s.input("x", (N, 8))
    twice = s.call(aten.permute.default, s.call(aten.permute.default, x, [1, 0]), [1, 0])
    ones = s.call(aten.full.default, [N, 8], 1.0, dtype=torch.float32)
    row = s.call(aten.full.default, [1, 8], 1.0, dtype=torch.float32)
    y = s.call(aten.mul.Tensor, s.call(aten.mul.Tensor, s.call(aten.cat.default, [twice], 0), ones), 1.0)
    y = s.call(aten.mul.Tensor, row, y)
    program = s.program(y=s.call(aten.neg.default, y))
    assert apply(Normalize(), program).changes["identities"] == 5
    assert targets(program) == [aten.neg.default]


def test_ones_that_repeat_rows_go_only_where_a_sum_repeats_them() -> None:
    s = Sketch()
    x, row = s.input("x", (N, 8)), s.input("row", (1, 8))
    ones = s.call(aten.full.default, [N, 1], 1.0, dtype=torch.float32)
    repeated = s.call(aten.mul.Tensor, ones, row)
    program = s.program(y=s.call(aten.add.Tensor, x, repeated))
    assert apply(Normalize(), program).changes["identities"] == 1
    s = Sketch()
    row = s.input("row", (1, 8))
    ones = s.call(aten.full.default, [symbol("rows"), 1], 1.0, dtype=torch.float32)
    assert not Normalize().run(s.program(y=s.call(aten.mul.Tensor, ones, row))).modified


def test_numbers_that_python_calls_equal_are_not_common() -> None:
    s = Sketch()
    zero, minus = (s.call(aten.full.default, [4], v, dtype=torch.float32) for v in (0.0, -0.0))
    program = s.program(y=zero, z=minus)
    assert not Normalize().run(program).modified


@pytest.mark.parametrize(
    ("rows", "written", "read", "gone"),
    [
        (N, 0, -1, False),  # one row or several: the same where there is one
        (N, -1, 0, False),
        (N, 0, 0, True),
        (N, 0, 1, True),
        (N, -1, -1, True),
        (N, -1, -2, True),
        (3, 2, -1, True),
        (3, -1, 2, True),
        (3, 0, -1, True),
    ],
)
@pytest.mark.parametrize("axis", [0, -2])
def test_rows_written_in_place_are_compared_by_where_they_are(
    rows: Any, written: int, read: int, gone: bool, axis: int
) -> None:
    s = Sketch()
    whole = s.call(aten.select_scatter.default, s.input("x", (rows, 4)), s.input("w", (4,)), 0, written)
    program = s.program(y=s.call(aten.neg.default, s.call(aten.select.int, whole, axis, read)))
    assert apply(Normalize(), program).changes == (Counter({"writes in place": 1}) if gone else Counter())
    assert (aten.select_scatter.default in targets(program)) is not gone


def test_what_no_pass_knows_is_no_bug() -> None:
    """A pooled prompt: a mean that is no norm's."""
    s = Sketch()
    pooled = s.call(aten.mean.dim, s.input("x", (N, 8)), [0], True)
    with pytest.raises(UserError) as caught:
        run_passes(s.program(y=pooled), [Normalize()])
    assert caught.value.code == "CX220" and "aten.mean.dim" in caught.value.message
    s, y = norm_of(axis=0)
    with pytest.raises(UserError, match="not the root mean square of one value along its last axis"):
        run_passes(s.program(y=y), [Normalize()])
