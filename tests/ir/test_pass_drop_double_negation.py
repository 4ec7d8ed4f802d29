"""drop_double_negation: −(−x) = x."""

from __future__ import annotations

from sketch import N, Sketch, apply, aten, targets

from cosmos_export.passes.drop_double_negation import DropDoubleNegation


def test_a_value_is_read_instead() -> None:
    s = Sketch()
    twice = s.call(aten.neg.default, s.call(aten.neg.default, s.input("x", (N, 4))))
    program = s.program(y=s.call(aten.exp.default, twice))
    assert apply(DropDoubleNegation(), program).changes["double negations"] == 1
    assert targets(program) == [aten.exp.default]


def test_one_negation_stays_and_so_does_one_that_is_read() -> None:
    s = Sketch()
    once = s.call(aten.neg.default, s.input("x", (N, 4)))
    assert not apply(DropDoubleNegation(), s.program(y=once)).modified
    s = Sketch()
    once = s.call(aten.neg.default, s.input("x", (N, 4)))
    program = s.program(y=once, z=s.call(aten.exp.default, s.call(aten.neg.default, once)))
    assert apply(DropDoubleNegation(), program).modified
    assert targets(program) == [aten.neg.default, aten.exp.default]
