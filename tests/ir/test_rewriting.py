"""The slicer's law: whatever it makes of a slice equals the slice, for every operation and along every axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sketch import Sketch, aten, ops, random_inputs, run

from cosmos_export.ir.verifier import verify
from cosmos_export.passes.rewriting import Slicer, eliminate_common, uniform_value


def rows(s: Sketch, name: str = "x") -> Any:
    return s.input(name, (4, 6))


def heads(s: Sketch, name: str = "x", count: int = 4) -> Any:
    return s.input(name, (count, 2, 8))


VALUES = {
    "input": rows,
    "neg": lambda s: s.call(aten.neg.default, rows(s)),
    "cast": lambda s: s.call(aten._to_copy.default, rows(s), dtype=torch.float16),
    "add": lambda s: s.call(aten.add.Tensor, rows(s), s.input("row", (6,))),
    "outer": lambda s: s.call(aten.mul.Tensor, s.input("c", (4, 1)), s.input("r", (1, 6))),
    "where": lambda s: s.call(aten.where.self, s.constant("m", torch.eye(4, 6) > 0), rows(s), rows(s, "y")),
    "cat rows": lambda s: s.call(aten.cat.default, [rows(s), rows(s, "y")], 0),
    "cat columns": lambda s: s.call(aten.cat.default, [rows(s), rows(s, "y")], -1),
    "unsqueeze": lambda s: s.call(aten.unsqueeze.default, rows(s), 1),
    "squeeze": lambda s: s.call(aten.squeeze.dim, s.input("x", (4, 1, 6)), 1),
    "select": lambda s: s.call(aten.select.int, s.input("x", (3, 4, 6)), 0, 1),
    "permute": lambda s: s.call(aten.permute.default, s.input("x", (6, 2, 4)), [2, 0, 1]),
    "slice": lambda s: s.call(aten.slice.Tensor, s.input("x", (9, 6)), 0, 2, 6),
    "strided": lambda s: s.call(aten.slice.Tensor, s.input("x", (4, 12)), 1, 0, 12, 2),
    "expand": lambda s: s.call(aten.expand.default, s.input("x", (1, 6)), [3, 4, 6]),
    "split view": lambda s: s.call(aten.view.default, rows(s), [4, 2, 3]),
    "merge view": lambda s: s.call(aten.view.default, s.input("x", (4, 2, 3)), [4, 6]),
    "mixing view": lambda s: s.call(aten.view.default, rows(s), [6, 4]),
    "linear": lambda s: s.call(aten.linear.default, rows(s), s.weight("w", (5, 6))),
    "matmul": lambda s: s.call(aten.matmul.default, s.input("a", (3, 4, 5)), s.input("b", (5, 6))),
    "batched matmul": lambda s: s.call(aten.matmul.default, s.input("a", (3, 4, 5)), s.input("b", (3, 5, 6))),
    "rms_norm": lambda s: s.call(ops.RMS_NORM, heads(s), s.weight("w", (8,)), 1e-6),
    "rotary": lambda s: s.call(ops.ROTARY, heads(s), s.input("cos", (4, 4)), s.input("sin", (4, 4))),
    "swiglu": lambda s: s.call(ops.SWIGLU, rows(s), rows(s, "y")),
    "attention": lambda s: s.call(ops.ATTENTION, heads(s), heads(s, "k", 5), heads(s, "v", 5), False, 0.5),
    "causal": lambda s: s.call(ops.ATTENTION, heads(s), heads(s, "k"), heads(s, "v"), True, 0.5),
    "joint": lambda s: s.call(
        ops.JOINT_ATTENTION, heads(s), heads(s, "k"), heads(s, "v"), heads(s, "pk", 3), heads(s, "pv", 3), 0.5
    ),
    "joint in FP8": lambda s: s.call(
        ops.JOINT_ATTENTION_FP8,
        heads(s),
        heads(s, "k"),
        heads(s, "v"),
        heads(s, "pk", 3),
        heads(s, "pv", 3),
        s.constant("scales", torch.tensor([0.02, 0.02, 0.02])),
        0.5,
    ),
    "mean": lambda s: s.call(aten.mean.dim, s.input("x", (4, 6, 3)), [1]),
    "embedding": lambda s: s.call(aten.embedding.default, s.weight("w", (5, 6)), s.constant("i", torch.arange(4))),
    "slice_scatter": lambda s: s.call(aten.slice_scatter.default, rows(s), s.input("part", (4, 3)), 1, 0, 6, 2),
    "select_scatter": lambda s: s.call(aten.select_scatter.default, rows(s), s.input("part", (4,)), 1, 5),
    "arange": lambda s: s.call(aten.arange.start, 3, 9, dtype=torch.float32),
    "full": lambda s: s.call(aten.full.default, [4, 6], 2.5, dtype=torch.float32),
}
SLICES = [(name, axis) for name, make in VALUES.items() for axis in range(make(Sketch()).meta["spec"].rank)]


@pytest.mark.parametrize(("name", "axis"), SLICES, ids=[f"{n}-{a}" for n, a in SLICES])
def test_what_the_slicer_makes_equals_the_slice(name: str, axis: int) -> None:
    for start, end in ((0, None), (0, 1), (1, None), (1, 3)):
        s = Sketch()
        value = VALUES[name](s)
        size = value.meta["spec"].shape[axis]
        last = size if end is None else min(end, size)
        first = min(start, last)
        part = Slicer(s.graph, "test").of(value, axis, first, last)
        program = s.program(whole=value, part=part)
        verify(program)
        outputs = run(program, random_inputs(program))
        expected = outputs["whole"].narrow(axis, first, last - first)
        torch.testing.assert_close(outputs["part"], expected, rtol=1e-6, atol=1e-6)
        if (first, last) == (0, size):
            assert part is value


def test_every_rule_has_a_value() -> None:
    """A rule added to the slicer is held to the law."""
    from cosmos_export.passes.rewriting import _RULES, ELEMENTWISE

    held = {VALUES[name](Sketch()).target for name in VALUES}
    assert set(_RULES) - held <= ELEMENTWISE


def test_a_slice_is_made_once_and_where_its_value_is() -> None:
    s = Sketch()
    early = s.call(aten.neg.default, rows(s))
    late = s.call(aten.exp.default, early)
    slicer = Slicer(s.graph, "test")
    a, b = slicer.of(late, 0, 1, 3), slicer.of(early, 0, 1, 3)
    assert a.args[0] is b and slicer.of(late, 0, 1, 3) is a
    assert s.graph.misplaced() is None
    assert slicer.residual == 1  # of the input itself


def test_common_operations_become_one() -> None:
    s = Sketch()
    x, y = rows(s), rows(s, "y")
    sums = s.call(aten.add.Tensor, x, y), s.call(aten.add.Tensor, y, x)
    differences = s.call(aten.sub.Tensor, x, y), s.call(aten.sub.Tensor, y, x)
    wide = s.call(aten._to_copy.default, x, dtype=torch.float16), s.call(aten._to_copy.default, x, dtype=torch.bfloat16)
    scaled = s.call(aten.mul.Tensor, x, 1), s.call(aten.mul.Tensor, x, 1.0)
    joined = s.call(aten.cat.default, [x, y], 0), s.call(aten.cat.default, [x, y], 0)
    every = [*sums, *differences, *wide, *scaled, *joined]
    program = s.program(**{f"o{i}": node for i, node in enumerate(every)})
    before = run(program)
    assert eliminate_common(program.graphs["body"]) == 2  # the sums and the joins
    after = run(program)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_fill_behind_views_is_one_number() -> None:
    s = Sketch()
    row = s.call(aten.full.default, [1, 6], 2.0, dtype=torch.float32)
    assert uniform_value(s.call(aten.expand.default, row, [4, 6])) == 2.0
    assert uniform_value(s.call(aten.neg.default, row)) is None
    assert uniform_value(3.0) is None
