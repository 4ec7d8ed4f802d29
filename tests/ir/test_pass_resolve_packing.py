"""resolve_packing: rows written into one buffer and read back are passed on directly, where their ranges tile it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from sketch import N, P, Sketch, apply, aten, declines, targets

from cosmos_export.passes.resolve_packing import ResolvePacking


def rows(s: Sketch, start: Any, end: Any) -> Any:
    return s.call(aten.arange.start, start, end, dtype=torch.int64)


def buffer(s: Sketch, size: Any) -> Any:
    return s.call(aten.full.default, [size, 4], 0.0, dtype=torch.float32)


def test_counts_follow_from_the_model(compiled: Any) -> None:
    """One packed buffer; one read of rows a modality."""
    changes = compiled.reports["resolve_packing"].result.changes
    modalities = len(compiled.captured.loop.carried)
    assert changes["packed buffers"] == 1
    assert changes["reads by index"] == modalities
    assert compiled.reports["resolve_packing"].result.declined == []


def test_towers_share_no_operation_but_attention_afterwards(compiled: Any) -> None:
    """No buffer, index or join holds rows of both, except the keys and values of attention."""
    graph = compiled.stages["resolve_packing"].graphs["joint"]
    assert not set(targets(compiled.stages["resolve_packing"], "joint")) & ResolvePacking.removes
    both = [n for n in graph.calls(aten.cat.default) if re.search(r"frames.*\bund_len\b", str(n.meta["spec"].shape[0]))]
    assert len(both) == 2 * compiled.config["num_hidden_layers"]


def test_written_and_read_rows_are_the_part_itself() -> None:
    s = Sketch()
    a, b = s.input("a", (P, 4)), s.input("b", (N, 4))
    packed = s.call(aten.index_put.default, buffer(s, N + P), [rows(s, 0, P)], a)
    packed = s.call(aten.index_put.default, packed, [rows(s, P, N + P)], b)
    doubled = s.call(aten.mul.Tensor, packed, 2.0)
    y = s.call(aten.index.Tensor, doubled, [rows(s, P, N + P)])
    program = s.program(y=s.call(aten.neg.default, y))
    changes = apply(ResolvePacking(), program).changes
    assert changes == Counter({"packed buffers": 1, "reads by index": 1, "slices of joined rows": 1})
    assert targets(program) == [aten.mul.Tensor, aten.neg.default]
    assert program.graphs["body"].inputs["a"].users == {}


def test_ranges_in_any_order_of_writing() -> None:
    s = Sketch()
    a, b = s.input("a", (P, 4)), s.input("b", (N, 4))
    packed = s.call(aten.index_put.default, buffer(s, N + P), [rows(s, P, N + P)], b)
    packed = s.call(aten.index_put.default, packed, [rows(s, 0, P)], a)
    program = s.program(y=packed)
    apply(ResolvePacking(), program)
    (cat,) = program.graphs["body"].calls()
    assert cat.args[0] == [a, b]


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [((0, 3), (2, 5), 5), ((0, 2), (3, 5), 5), ((0, 3), (0, 3), 3), ((0, 2), (2, 4), 5), ((1, 3), (3, 5), 5)],
    ids=["overlap", "gap", "written twice", "short", "late"],
)
def test_ranges_that_do_not_tile_stay(first: Any, second: Any, size: int) -> None:
    s = Sketch()
    packed = buffer(s, size)
    ranges = {r: rows(s, *r) for r in (first, second)}
    for name, place in (("a", first), ("b", second)):
        values = s.input(name, (place[1] - place[0], 4))
        packed = s.call(aten.index_put.default, packed, [ranges[place]], values)
    declines(ResolvePacking(), s.program(y=packed), "its ranges do not tile the buffer")


def test_indices_that_are_no_ranges_stay() -> None:
    s = Sketch()
    chosen = s.input("chosen", (3,), dtype=torch.int64)
    packed = s.call(aten.index_put.default, buffer(s, 3), [chosen], s.input("a", (3, 4)))
    declines(ResolvePacking(), s.program(y=packed), "its ranges do not tile the buffer")
    s = Sketch()
    chosen = s.input("chosen", (3,), dtype=torch.int64)
    y = s.call(aten.index.Tensor, s.input("a", (5, 4)), [chosen])
    declines(ResolvePacking(), s.program(y=y), "its index is not a range")


def test_a_slice_through_a_part_stays() -> None:
    """Rows 1 … 4 of [a; b] with two rows of each kind cut through both parts."""
    s = Sketch()
    joined = s.call(aten.cat.default, [s.input("a", (2, 4)), s.input("b", (3, 4))], 0)
    program = s.program(y=s.call(aten.slice.Tensor, joined, 0, 1, 4))
    assert not ResolvePacking().run(program).modified
    assert targets(program) == [aten.cat.default, aten.slice.Tensor]


def test_a_slice_within_one_part_frees_the_other() -> None:
    s = Sketch()
    joined = s.call(aten.cat.default, [s.input("a", (2, 4)), s.input("b", (3, 4))], 0)
    program = s.program(y=s.call(aten.slice.Tensor, joined, 0, 3, 4))
    apply(ResolvePacking(), program)
    (only,) = program.graphs["body"].calls()
    assert only.args == (program.graphs["body"].inputs["b"], 0, 1, 2)


def test_layers_are_not_passed() -> None:
    """A linear of joined rows is one product; slicing must not make it two."""
    s = Sketch()
    joined = s.call(aten.cat.default, [s.input("a", (P, 4)), s.input("b", (N, 4))], 0)
    layer = s.call(aten.linear.default, joined, s.weight("w", (4, 4)))
    program = s.program(y=s.call(aten.slice.Tensor, layer, 0, 0, P))
    assert not ResolvePacking().run(program).modified


def test_strided_slices_and_slices_of_inputs_stay() -> None:
    s = Sketch()
    a, b = s.input("a", (4, 4)), s.input("b", (4, 4))
    strided = s.call(aten.slice.Tensor, s.call(aten.cat.default, [a, b], 0), 0, 0, 8, 2)
    program = s.program(y=strided, z=s.call(aten.slice.Tensor, a, 0, 1, 3))
    assert not ResolvePacking().run(program).modified


# -- every rule by which a slice moves towards the leaves -------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "axis"),
    [
        (lambda s, x: s.call(aten.neg.default, x), 0),
        (lambda s, x: s.call(aten.add.Tensor, x, s.input("row", (4,))), 0),
        (lambda s, x: s.call(aten.add.Tensor, x, 1.5), 0),
        (lambda s, x: s.call(aten.mul.Tensor, x, s.input("one", (1, 1))), 0),
        (lambda s, x: s.call(aten.unsqueeze.default, x, 1), 0),
        (lambda s, x: s.call(aten.unsqueeze.default, x, 0), 1),
        (lambda s, x: s.call(aten.squeeze.dim, s.call(aten.unsqueeze.default, x, 1), 1), 0),
        (lambda s, x: s.call(aten.select.int, x, 1, 2), 0),
        (lambda s, x: s.call(aten.permute.default, x, [1, 0]), 1),
        (lambda s, x: s.call(aten.expand.default, s.call(aten.unsqueeze.default, x, 0), [3, 5, 4]), 1),
        (lambda s, x: s.call(aten.view.default, x, [5, 2, 2]), 0),
        (lambda s, x: s.call(aten.cat.default, [x, x], 1), 0),
        (lambda s, x: s.call(aten.select_scatter.default, x, s.call(aten.select.int, x, 1, 0), 1, 2), 0),
        (lambda s, x: s.call(aten.slice_scatter.default, x, s.call(aten.slice.Tensor, x, 1, 0, 2), 1, 2, 4, 1), 0),
        (lambda s, x: s.call(aten.slice.Tensor, x, 1, 1, 3), 0),
        (lambda s, x: s.call(aten.slice.Tensor, s.call(aten.cat.default, [x, x], 0), 0, 0, 5), 0),
        (lambda s, x: s.call(aten.where.self, s.constant("m", torch.tensor([True, False, True, False])), x, x), 0),
    ],
    ids=["unary", "row", "scalar", "one", "unsqueeze behind", "unsqueeze before", "squeeze", "select", "permute",
         "expand", "view", "cat across", "select_scatter", "slice_scatter", "slice across", "slice along", "where"],
)  # fmt: skip
def test_a_slice_of_a_part_passes(make: Any, axis: int) -> None:
    """Afterwards nothing joins a with b: only a is left, joined at most with itself."""
    s = Sketch()
    a, b = s.input("a", (2, 4)), s.input("b", (3, 4))
    value = make(s, s.call(aten.cat.default, [a, b], 0))
    program = s.program(y=s.call(aten.slice.Tensor, value, axis, 0, 2))
    assert apply(ResolvePacking(), program).modified
    assert program.graphs["body"].inputs["a"].users and not program.graphs["body"].inputs["b"].users


def test_ranges_and_fills_are_narrowed() -> None:
    s = Sketch()
    s.input("n", (N,)), s.input("p", (P,))  # what shows the dims
    along = s.call(aten.unsqueeze.default, s.call(aten.arange.start, 2, N + P + 2, dtype=torch.float32), 1)
    filled = s.call(aten.full.default, [N + P, 4], 3.0, dtype=torch.float32)
    y = s.call(aten.slice.Tensor, s.call(aten.mul.Tensor, along, filled), 0, P, N + P)
    program = s.program(y=y)
    apply(ResolvePacking(), program)
    arange, *_ = program.graphs["body"].calls(aten.arange.start)
    assert arange.args == (P + 2, N + P + 2)
    assert aten.slice.Tensor not in targets(program)


def test_an_outer_product_is_sliced_by_its_factors() -> None:
    """`frequencies @ positions` has an inner size of one: a row of angles follows from one position."""
    s = Sketch()
    joined = s.call(aten.cat.default, [s.input("a", (1, P)), s.input("b", (1, N))], 1)
    angles = s.call(aten.matmul.default, s.input("f", (6, 1)), joined)
    program = s.program(y=s.call(aten.slice.Tensor, angles, 1, P, N + P))
    apply(ResolvePacking(), program)
    assert targets(program) == [aten.matmul.default]


@pytest.mark.parametrize(
    "make",
    [
        lambda s, x: s.call(aten.slice.Tensor, s.call(aten.unsqueeze.default, x, 0), 0, 0, 0),
        lambda s, x: s.call(aten.slice.Tensor, s.call(aten.slice.Tensor, x, 0, 0, 5, 2), 0, 0, 1),
        lambda s, x: s.call(aten.slice.Tensor, s.call(aten.view.default, x, [20]), 0, 0, 8),
        lambda s, x: s.call(
            aten.slice.Tensor,
            s.call(aten.select_scatter.default, x, s.call(aten.select.int, x, 0, 0), 0, 1), 0, 0, 2
        ),
    ],
    ids=["axis that a view made", "of a strided slice", "of a flattened value", "of a written axis"],
)  # fmt: skip
def test_slices_without_a_rule_stay(make: Any) -> None:
    s = Sketch()
    x = s.call(aten.cat.default, [s.input("a", (2, 4)), s.input("b", (3, 4))], 0)
    before = s.program(y=make(s, x))
    names = targets(before)
    ResolvePacking().run(before)
    assert aten.slice.Tensor in targets(before) and aten.cat.default in targets(before) and names


@pytest.mark.parametrize("shape", [(1, 4), (4,), (1, 1)])
def test_values_that_are_repeated_over_a_range_stay(shape: Any) -> None:
    """Joined, they would be one row where the buffer has many."""
    s = Sketch()
    packed = s.call(aten.index_put.default, buffer(s, N + P), [rows(s, 0, P)], s.input("a", shape))
    packed = s.call(aten.index_put.default, packed, [rows(s, P, N + P)], s.input("b", (N, 4)))
    declines(ResolvePacking(), s.program(y=packed), "do not tile the buffer")
