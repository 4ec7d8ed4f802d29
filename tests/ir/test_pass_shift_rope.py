"""shift_rope: the prompt's length leaves the generator's positions, only where no score can change."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sketch import N, P, Sketch, apply, aten, declines, ops, targets

from cosmos_export.ir.text import print_graph
from cosmos_export.passes.shift_rope import ShiftRope

D = 8


def towers(
    *,
    second_amount: Any = None,
    other_frequencies: bool = False,
    other_function: Any = None,
    moved_axes: int = 1,
    steady_prompt: bool = True,
    rotate_prompt: bool = True,
    read: Callable[[Sketch, dict[str, Any]], dict[str, Any]] = lambda s, v: {},
    constant: int = 15000,
    causal_read: bool = True,
) -> Any:
    """A prompt at 0 … P−1 and two groups of generated rows after it, attended to together."""
    s = Sketch()
    amount = P + constant
    frequencies = s.constant("frequencies", torch.rand(3, 1, D // 2, 1) * 1e-4)
    text = s.call(aten.arange.start, 0, P, dtype=torch.float32)
    text = s.call(aten.expand.default, s.call(aten.unsqueeze.default, text, 0), [3, P])
    if not steady_prompt:
        text = s.call(aten.add.Tensor, text, amount)
    groups = []
    for i, by in enumerate((amount, amount if second_amount is None else second_amount)):
        if moved_axes == 1:
            along = s.call(aten.add.Tensor, s.input(f"p{i}", (N,)), by)
            rest = s.input(f"rest{i}", (2, N))
            groups.append(s.call(aten.cat.default, [s.call(aten.view.default, along, [1, N]), rest], 0))
        elif i == 0:
            groups.append(s.call(aten.add.Tensor, s.input("p0", (3, N)), by))
        else:
            along = s.call(aten.add.Tensor, s.input("p1", (1, N)), by)
            groups.append(s.call(aten.cat.default, [along, s.input("rest1", (2, N))], 0))
    generated = s.call(aten.cat.default, groups, 1)
    tables = [s.tables(text, frequencies)]
    own = s.constant("others", torch.rand(3, 1, D // 2, 1)) if other_frequencies else frequencies
    tables.append(s.tables(generated, own))
    if other_function is not None:
        cos, sin = tables[1]
        tables[1] = (s.call(other_function, cos), sin)
    prompt, rows = s.input("k_prompt", (P, 2, D)), s.input("k", (2 * N, 2, D))
    query = s.call(ops.ROTARY, s.input("q", (2 * N, 2, D)), *tables[1])
    turned = s.call(ops.ROTARY, prompt, *tables[0]) if rotate_prompt else prompt
    key = s.call(ops.ROTARY, rows, *tables[1])
    keys = s.call(aten.cat.default, [turned, key], 0)
    values = s.input("v", (2 * N + P, 2, D))
    y = s.call(ops.ATTENTION, query, keys, values, False, 0.3)
    nodes = {"text": text, "generated": generated, "query": query, "keys": keys, "values": values, "groups": groups}
    return s.program(y=y, **read(s, nodes))


def attend(s: Sketch, query: Any, key: Any, value: Any) -> Any:
    return s.call(ops.ATTENTION, query, key, value, False, 1.0)


def test_counts_follow_from_the_model(compiled: Any) -> None:
    """One move a modality, and the prompt's positions instead; nothing declined."""
    result = compiled.reports["shift_rope"].result
    assert result.changes["positions made independent of the prompt"] == len(compiled.captured.loop.carried)
    assert result.changes["positions moved instead"] == 1
    assert result.declined == []


def test_the_generators_tables_do_not_depend_on_the_prompt(compiled: Any) -> None:
    """Only the reasoner sees `und_len` in what it computes."""
    for name, graph in compiled.final.graphs.items():
        lines = [line for line in print_graph(graph).splitlines() if re.search(r"\bund_len\b", line)]
        assert name == "reasoner" or all("= input" in line for line in lines), lines
    before = print_graph(compiled.stages["resolve_packing"].graphs["joint"])
    assert "und_len + 15000" in before


def test_scores_stay_the_same() -> None:
    program = towers()
    result = apply(ShiftRope(), program, tolerance=2e-5)
    assert result.changes == {"positions made independent of the prompt": 2, "positions moved instead": 1}
    assert "prompt + 15000" in print_graph(program.graphs["body"])  # what is taken from the prompt


def test_without_a_margin_positions_are_taken_as_they_are() -> None:
    program = towers(constant=0)
    apply(ShiftRope(), program, tolerance=2e-5)
    assert aten.add.Tensor not in targets(program)


def test_the_published_grid_of_positions_is_kept() -> None:
    """fp32 near 15,000 has steps of 2⁻¹⁰: a position is rounded to them, as the model's own sum does."""
    program = towers()
    ShiftRope().run(program)
    (add, _) = program.graphs["body"].calls(aten.add.Tensor)
    assert add.args[1] == 15000 and is_undone(add)


def is_undone(add: Any) -> bool:
    (user,) = add.users
    return user.target is aten.sub.Tensor and user.args == (add, 15000)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (lambda: towers(second_amount=P + 14000), "rows of axis 0 are not all moved by one amount"),
        (lambda: towers(second_amount=7), "rows of axis 0 are not all moved by one amount"),
        (lambda: towers(other_frequencies=True), "another function of positions"),
        (lambda: towers(other_function=aten.neg.default), "not shown to be a product with positions"),
        (lambda: towers(other_function=aten.exp.default), "not shown to be a product with positions"),
        (lambda: towers(rotate_prompt=False), "rotates only one of query and key"),
        (lambda: towers(moved_axes=3), "rows of axis 1 are not all moved by one amount"),
        (
            lambda: towers(read=lambda s, v: {"z": s.call(aten.neg.default, v["query"])}),
            "reads a rotated value, and not as query or key of attention",
        ),
        (
            lambda: towers(read=lambda s, v: {"z": s.call(aten.neg.default, v["keys"])}),
            "reads a rotated value, and not as query or key of attention",
        ),
        (
            lambda: towers(read=lambda s, v: {"z": attend(s, v["query"], v["keys"], v["keys"])}),
            "reads a rotated value, and not as query or key of attention",
        ),
        (
            lambda: towers(read=lambda s, v: {"z": s.call(aten.neg.default, v["text"])}),
            "reads a position, and not as angle of a rotation",
        ),
        (
            lambda: towers(read=lambda s, v: {"z": s.call(aten.neg.default, v["generated"])}),
            "reads a position, and not as angle of a rotation",
        ),
    ],
    ids=["sound moved by another amount", "part not moved", "other frequencies", "negated cosine", "not an angle",
         "unrotated key", "one sum for three axes", "query read elsewhere", "key read elsewhere", "key as value",
         "prompt positions read elsewhere", "generated positions read elsewhere"],
)  # fmt: skip
def test_where_scores_could_change_nothing_moves(program: Any, reason: str) -> None:
    declines(ShiftRope(), program(), reason)


def test_what_is_moved_on_some_axes_is_moved_back_on_the_others() -> None:
    """The prompt is moved on three axes by one sum, generated rows on one: there both lose it, elsewhere they swap."""
    program = towers(steady_prompt=False, constant=0)
    result = apply(ShiftRope(), program, tolerance=2e-5)
    assert result.changes == {"positions made independent of the prompt": 3, "positions moved instead": 2}


@pytest.mark.parametrize("wrong", ["tables of two angles", "angles that are given", "integer positions"])
def test_angles_that_are_no_product_stay(wrong: str) -> None:
    s = Sketch()
    frequencies = s.constant("frequencies", torch.rand(1, 1, D // 2, 1))
    if wrong == "angles that are given":
        angles = s.input("angles", (N, D // 2))
        tables = tuple(s.call(f, angles) for f in (aten.cos.default, aten.sin.default))
    elif wrong == "tables of two angles":
        one, other = (s.tables(s.input(n, (1, N)), frequencies) for n in ("a", "b"))
        tables = one[0], other[1]
    else:
        wide = s.call(aten.add.Tensor, s.input("p", (1, 1, N)), P)
        angles = s.call(aten.matmul.default, s.constant("f", torch.rand(1, D // 2, 1)), wide)
        angles = s.call(aten.squeeze.dim, s.call(aten.permute.default, angles, [0, 2, 1]), 0)
        tables = tuple(s.call(f, angles) for f in (aten.cos.default, aten.sin.default))
    q, k = (s.call(ops.ROTARY, s.input(n, (N, 2, D)), *tables) for n in ("q", "k"))
    program = s.program(y=s.call(ops.ATTENTION, q, k, s.input("v", (N, 2, D)), False, 1.0))
    declines(ShiftRope(), program, "its angles are not shown to be a product with positions [axes, rows]")


def turned(s: Sketch, positions: Any, frequencies: Any, name: str, rows: Any) -> Any:
    return s.call(ops.ROTARY, s.input(name, (rows, 2, D)), *s.tables(positions, frequencies))


def test_rows_without_rotation_beside_rotated_ones_stay() -> None:
    """Registers, as in models whose first rows have no position: joined to query and key, they meet rotated rows."""
    s = Sketch()
    frequencies = s.constant("frequencies", torch.rand(3, 1, D // 2, 1) * 1e-4)
    text = s.call(aten.expand.default, s.call(aten.unsqueeze.default,
                  s.call(aten.arange.start, 0, P, dtype=torch.float32), 0), [3, P])  # fmt: skip
    moved = s.call(aten.add.Tensor, s.input("p", (3, N)), P + 15000)
    registers = s.input("registers", (2, 2, D))
    query = s.call(aten.cat.default, [turned(s, moved, frequencies, "q", N), registers], 0)
    keys = [turned(s, text, frequencies, "kp", P), turned(s, moved, frequencies, "k", N), s.input("rk", (2, 2, D))]
    y = attend(s, query, s.call(aten.cat.default, keys, 0), s.input("v", (P + N + 2, 2, D)))
    declines(ShiftRope(), s.program(y=y), "or some rows of them")


def test_frequencies_that_follow_from_positions_stay() -> None:
    """Dynamic scaling: the angles are no longer linear in the positions."""
    s = Sketch()
    moved = s.call(aten.add.Tensor, s.input("p", (3, N)), P + 15000)
    wide = s.call(aten.unsqueeze.default, s.call(aten.unsqueeze.default, moved, 1), 2)
    own = s.constant("frequencies", torch.rand(3, 1, D // 2, 1) * 1e-4)
    first = s.call(aten.slice.Tensor, s.call(aten.cos.default, wide), 3, 0, 1)
    angles = s.call(aten.matmul.default, s.call(aten.matmul.default, own, first), wide)
    angles = s.call(aten.permute.default, angles, [0, 1, 3, 2])
    turned_by = s.call(aten.select.int, angles, 0, 0)
    cos, sin = (s.call(aten.squeeze.dim, s.call(f, turned_by), 0) for f in (aten.cos.default, aten.sin.default))
    query, key = (s.call(ops.ROTARY, s.input(name, (N, 2, D)), cos, sin) for name in "qk")
    y = attend(s, query, key, s.input("v", (N, 2, D)))
    declines(ShiftRope(), s.program(y=y), "its angles are not shown to be a product with positions")
