"""The kernel passes: what they fuse computes the same, bit for bit, and each condition has a graph that breaks it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from sketch import N, Sketch, apply, aten, ops, targets

from cosmos_export.passes.fuse_activation_quantize import FuseActivationQuantize
from cosmos_export.passes.fuse_norm_quantize import FuseNormQuantize
from cosmos_export.passes.fuse_qkv_pack import FuseQkvPack
from cosmos_export.passes.fuse_sampler_step import FuseSamplerStep
from cosmos_export.passes.pipeline import fuse_kernels, run_passes
from cosmos_export.sampling import COLUMNS

BF16, SCALE = torch.bfloat16, torch.tensor(0.02)


def untouched(step: Any, program: Any) -> None:
    before = targets(program)
    assert not step.run(program).modified and targets(program) == before


# -- norm and quantization ---------------------------------------------------------------------------------------------


def norm_of(
    *, add: bool = True, shape: Any = (N, 8), per_row: bool = False, cast: Any = None, read: bool = False
) -> Any:
    """A (summed) value normalized and quantized."""
    s = Sketch()
    x = s.call(aten.add.Tensor, s.input("x", shape), s.input("delta", shape)) if add else s.input("x", shape)
    norm = s.call(ops.RMS_NORM, x, s.weight("w", (shape[-1],)), 1e-6)
    value = s.call(aten._to_copy.default, norm, dtype=cast) if cast else norm
    narrow = s.call(ops.QUANTIZE, value, s.constant("scale", SCALE))
    wide = s.call(ops.DEQUANTIZE, narrow, s.constant("rows", torch.ones(5)) if per_row else s.constant("s", SCALE),
                  torch.float32)  # fmt: skip
    outputs = {"y": wide, "stream": s.call(aten.neg.default, x)}
    return s.program(**outputs, **({"norm": s.call(aten.neg.default, norm)} if read else {}))


def test_a_sum_its_norm_and_quantization_are_one_operation() -> None:
    program = norm_of()
    assert apply(FuseNormQuantize(), program).changes == Counter({"sums, norms and quantizations": 1})
    assert ops.ADD_NORM_QUANTIZE in targets(program) and aten.add.Tensor not in targets(program)
    program = norm_of(add=False)
    assert apply(FuseNormQuantize(), program).changes == Counter({"norms and quantizations": 1})


@pytest.mark.parametrize("wrong", ["heads", "another type", "wide", "read elsewhere"])
def test_a_norm_that_the_kernel_does_not_take_stays(wrong: str) -> None:
    options: dict[str, Any] = {
        "heads": {"shape": (N, 2, 8)}, "another type": {"cast": BF16}, "wide": {"shape": (2, 65_537)},
        "read elsewhere": {"read": True},
    }[wrong]  # fmt: skip
    untouched(FuseNormQuantize(), norm_of(**options))


def test_a_sum_that_repeats_rows_or_is_read_too_early_is_left_outside() -> None:
    s = Sketch()
    x = s.call(aten.add.Tensor, s.input("x", (N, 8)), s.input("row", (1, 8)))
    norm = s.call(ops.RMS_NORM, x, s.weight("w", (8,)), 1e-6)
    program = s.program(y=s.call(ops.QUANTIZE, norm, s.constant("scale", SCALE)))
    assert apply(FuseNormQuantize(), program).changes == Counter({"norms and quantizations": 1})
    s = Sketch()
    x = s.call(aten.add.Tensor, s.input("x", (N, 8)), s.input("delta", (N, 8)))
    early = s.call(aten.neg.default, x)
    scale = s.call(aten.select.int, s.call(aten.mul.Tensor, s.input("scales", (3,)), 0.0), 0, 0)
    positive = s.call(aten.exp.default, scale)
    narrow = s.call(ops.QUANTIZE, s.call(ops.RMS_NORM, x, s.weight("w", (8,)), 1e-6), positive)
    assert apply(FuseNormQuantize(), s.program(y=narrow, z=early)).changes == Counter({"norms and quantizations": 1})


# -- activation and quantization ---------------------------------------------------------------------------------------


def activation_of(kind: str, *, shape: Any = (N, 8), read: bool = False) -> Any:
    s = Sketch()
    gate = s.input("gate", shape)
    relu = s.call(aten.relu.default, gate)
    value = {
        "swiglu": lambda: s.call(ops.SWIGLU, gate, s.input("up", shape)),
        "relu²": lambda: s.call(aten.pow.Tensor_Scalar, relu, 2),
        "relu·relu": lambda: s.call(aten.mul.Tensor, relu, relu),
        "relu³": lambda: s.call(aten.pow.Tensor_Scalar, relu, 3),
        "relu·x": lambda: s.call(aten.mul.Tensor, relu, gate),
        "relu": lambda: relu,
    }[kind]()
    outputs = {"y": s.call(ops.QUANTIZE, value, s.constant("scale", SCALE))}
    return s.program(**outputs, **({"z": s.call(aten.neg.default, value)} if read else {}))


@pytest.mark.parametrize("kind", ["swiglu", "relu²", "relu·relu"])
def test_an_activation_and_its_quantization_are_one_operation(kind: str) -> None:
    program = activation_of(kind)
    assert apply(FuseActivationQuantize(), program).changes == Counter({"activations and quantizations": 1})
    assert targets(program) == [ops.ACTIVATION_QUANTIZE]


@pytest.mark.parametrize("kind", ["relu³", "relu·x", "relu"])
def test_other_activations_stay(kind: str) -> None:
    untouched(FuseActivationQuantize(), activation_of(kind))


def test_an_activation_of_heads_or_that_is_read_elsewhere_stays() -> None:
    untouched(FuseActivationQuantize(), activation_of("swiglu", read=True))
    untouched(FuseActivationQuantize(), activation_of("swiglu", shape=(N, 2, 8)))


# -- query, key and value ----------------------------------------------------------------------------------------------


def projection(
    *,
    start: int = 0,
    gap: int = 0,
    eps: float = 1e-6,
    angles: bool = True,
    wide_value: bool = False,
    early: bool = False,
) -> Any:
    """Two query heads, a key head and a value head of 4, of one merged projection."""
    s = Sketch()
    merged = s.input("merged", (N, 40))
    cos, sin, other = (s.input(name, (N, 2)) for name in ("cos", "sin", "other"))

    def heads(first: int, last: int, size: int = 4) -> Any:
        return s.call(
            aten.view.default, s.call(aten.slice.Tensor, merged, 1, first, last), [N, (last - first) // size, size]
        )

    def turned(view: Any, name: str, eps: float, by: Any) -> Any:
        return s.call(ops.ROTARY, s.call(ops.RMS_NORM, view, s.weight(name, (4,)), eps), by, sin)

    query = turned(heads(start, start + 8), "q", 1e-6, cos)
    outputs = {"early": s.call(aten.neg.default, query)} if early else {}
    first = start + 8 + gap
    key = turned(heads(first, first + 4), "k", eps, cos if angles else other)
    value = heads(first + 4, first + 8, 2 if wide_value else 4)
    return s.program(q=query, k=key, v=s.call(aten.neg.default, value), **outputs)


def test_query_key_and_value_are_one_operation() -> None:
    program = projection()
    assert apply(FuseQkvPack(), program).changes == Counter({"queries, keys and values": 1})
    assert targets(program).count(ops.ITEM) == 3 and ops.ROTARY not in targets(program)


@pytest.mark.parametrize(
    "wrong",
    [{"start": 4}, {"gap": 4}, {"eps": 1e-5}, {"angles": False}, {"wide_value": True}, {"early": True}],
    ids=["not the first columns", "not neighbours", "another epsilon", "other angles", "other heads", "read too early"],
)
def test_projections_that_the_kernel_does_not_take_stay(wrong: dict[str, Any]) -> None:
    untouched(FuseQkvPack(), projection(**wrong))


# -- the sampler -------------------------------------------------------------------------------------------------------


def step_of(
    *, guided: bool = True, held: int = 1, swap: bool = False, dtype: Any = torch.float32, far: bool = False
) -> Any:
    s = Sketch()
    shape = (N, 3)
    row = s.input("row", (10,))
    cond, uncond = (s.input(name, shape, dtype=BF16) for name in ("cond", "uncond"))
    x, last, m0, m1 = (s.input(name, shape, dtype=dtype) for name in ("x", "last", "m0", "m1"))

    def times(value: Any, column: str) -> Any:
        return s.call(aten.mul.Tensor, value, s.call(aten.select.int, row, 0, COLUMNS["unipc"].index(column)))

    def total(*terms: Any) -> Any:
        result = terms[0]
        for term in terms[1:]:
            result = s.call(aten.add.Tensor, result, term)
        return result

    velocity = s.call(aten._to_copy.default, cond, dtype=torch.float32)
    if guided:
        other = s.call(aten._to_copy.default, uncond, dtype=torch.float32)
        velocity = total(other, times(s.call(aten.sub.Tensor, velocity, other), "guidance"))
    d = s.call(aten.sub.Tensor, x, times(velocity, "sigma"))
    names = ("c_sample", "c_last", "c_m1" if swap else "c_m0", "c_m0" if swap else "c_m1", "c_d")
    corrected = total(*(times(v, c) for v, c in zip((x, last, m0, m1, d), names, strict=True)))
    new = total(times(corrected, "p_sample"), times(d, "p_d"), times(m0, "p_m0"))
    for i in range(held):
        mask = s.call(aten.view.default, s.input(f"mask_{i}", (3,)), [1, 3])
        rest = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, mask, -1.0), 1.0)
        new = total(s.call(aten.mul.Tensor, new, mask), s.call(aten.mul.Tensor, last if far else x, rest))
    return s.program(new=new, corrected=corrected, d=d)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("held", [0, 1, 2])
def test_a_sampler_step_is_one_operation(guided: bool, held: int) -> None:
    program = step_of(guided=guided, held=held)
    assert apply(FuseSamplerStep(), program).changes == Counter({"sampler steps": 1})
    assert targets(program) == [ops.UNIPC_STEP, ops.ITEM, ops.ITEM, ops.ITEM]


def test_masks_that_hold_another_value_or_one_too_many_stay_outside() -> None:
    for options, left in (({"held": 3}, 2), ({"far": True}, 2)):
        program = step_of(**options)
        assert apply(FuseSamplerStep(), program).changes == Counter({"sampler steps": 1})
        assert targets(program).count(aten.add.Tensor) == left


def test_other_arithmetic_and_narrow_state_stay() -> None:
    untouched(FuseSamplerStep(), step_of(swap=True))
    untouched(FuseSamplerStep(), step_of(dtype=BF16))


# -- the frame ---------------------------------------------------------------------------------------------------------


def test_kernels_are_passes_of_the_frame() -> None:
    """Verified, reported and on a copy; the graph itself, and one that asks for nothing, stay as they are."""
    program = norm_of()
    graph, seen = program.graphs["body"], []
    before = targets(program)
    fused = fuse_kernels(
        graph, ["norm-quantize", "joint-attention"], lambda p, report: seen.append((report.name, report.form))
    )
    assert seen == [("fuse_norm_quantize", "body")] and targets(program) == before
    assert [n.target for n in fused.calls()].count(ops.ADD_NORM_QUANTIZE) == 1
    assert [n.target for n in fuse_kernels(graph, []).calls()] == before
    run_passes(program, [FuseNormQuantize()])
    assert program.history[-1] == "fuse_norm_quantize"
