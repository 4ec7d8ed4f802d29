"""merge_linears: parallel linears become one; what is not parallel, or not plain, stays."""

from __future__ import annotations

from typing import Any

from sketch import N, Sketch, apply, aten, declines, ops, targets

from cosmos_export.ir.spec import Transform
from cosmos_export.passes.merge_linears import MergeLinears

REASON = "reads the same value, but has a bias or a weight that is shared or transformed"


def test_counts_follow_from_the_model(compile_tiny: Any) -> None:
    """Both towers of a layer: one q·k·v, one gate·up (omni). The last reasoner layer has k and v only, and no MLP."""
    for backbone in ("omni", "edge"):
        for layers in (1, 2):
            changes = compile_tiny(backbone, layers=layers).reports["merge_linears"].result.changes
            assert changes["3 parallel linears"] == 2 * layers - 1
            assert changes["2 parallel linears"] == 1
            assert changes["gate and up"] == (2 * layers - 1 if backbone == "omni" else 0)


def test_parallel_linears_are_stacked_in_order() -> None:
    s = Sketch()
    x = s.input("x", (N, 8))
    parts = [s.call(aten.linear.default, x, s.weight(n, (size, 8))) for n, size in (("a", 4), ("b", 2), ("c", 6))]
    program = s.program(**dict(zip("abc", parts, strict=True)))
    assert apply(MergeLinears(), program, tolerance=1e-6).changes == {"3 parallel linears": 1}
    (merged,) = program.graphs["body"].weights.values()
    binding = merged.meta["weight"]
    assert (binding.keys, binding.transform, binding.shape) == (("a", "b", "c"), Transform.CONCATENATE, (12, 8))
    assert targets(program).count(aten.linear.default) == 1


def test_gate_and_up_are_interleaved_gate_first() -> None:
    for gate_first in (True, False):
        s = Sketch()
        x = s.input("x", (N, 8))
        linear = {n: s.call(aten.linear.default, x, s.weight(n, (4, 8))) for n in ("gu" if gate_first else "ug")}
        program = s.program(y=s.call(ops.SWIGLU, linear["g"], linear["u"]))
        assert apply(MergeLinears(), program, tolerance=1e-6).changes == {"gate and up": 1}
        (merged,) = program.graphs["body"].weights.values()
        assert (merged.meta["weight"].keys, merged.meta["weight"].transform) == (("g", "u"), Transform.INTERLEAVE)


def test_a_gate_that_is_read_elsewhere_is_stacked() -> None:
    s = Sketch()
    x = s.input("x", (N, 8))
    gate, up = (s.call(aten.linear.default, x, s.weight(n, (4, 8))) for n in "gu")
    program = s.program(y=s.call(ops.SWIGLU, gate, up), gate=gate)
    assert apply(MergeLinears(), program, tolerance=1e-6).changes == {"2 parallel linears": 1}


def test_linears_of_different_values_stay() -> None:
    s = Sketch()
    y, z = (s.call(aten.linear.default, s.input(n, (N, 8)), s.weight(f"w{n}", (4, 8))) for n in "xy")
    program = s.program(y=y, z=z)
    assert not MergeLinears().run(program).modified


def test_a_bias_or_a_shared_weight_stays() -> None:
    s = Sketch()
    x = s.input("x", (N, 8))
    biased = s.call(aten.linear.default, x, s.weight("a", (4, 8)), s.weight("bias", (4,)))
    plain = s.call(aten.linear.default, x, s.weight("b", (4, 8)))
    declines(MergeLinears(), s.program(y=biased, z=plain), f"`linear_default`: {REASON}")
    s = Sketch()
    x, other, shared = s.input("x", (N, 8)), s.input("other", (N, 8)), s.weight("w", (4, 8))
    one, two = s.call(aten.linear.default, x, shared), s.call(aten.linear.default, x, s.weight("v", (4, 8)))
    declines(MergeLinears(), s.program(y=one, z=two, u=s.call(aten.linear.default, other, shared)), REASON)


def test_a_weight_that_is_no_parameter_stays() -> None:
    s = Sketch()
    x, computed = s.input("x", (N, 8)), s.input("matrix", (4, 8))
    one, two = (s.call(aten.linear.default, x, w) for w in (computed, s.weight("w", (4, 8))))
    declines(MergeLinears(), s.program(y=one, z=two), REASON)


def test_the_rest_of_a_group_is_merged_without_what_does_not_fit() -> None:
    s = Sketch()
    x = s.input("x", (N, 8))
    biased = s.call(aten.linear.default, x, s.weight("a", (4, 8)), s.weight("bias", (4,)))
    one, two = (s.call(aten.linear.default, x, s.weight(n, (4, 8))) for n in "bc")
    program = s.program(y=biased, z=one, u=two)
    result = apply(MergeLinears(), program, tolerance=1e-6)
    assert result.changes == {"2 parallel linears": 1} and len(result.declined) == 1
