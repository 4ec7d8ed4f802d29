"""slice_outputs: outputs that a mode never reads go, and rows that nothing reads are not computed."""

from __future__ import annotations

from typing import Any

import pytest
from sketch import N, P, Sketch, apply, aten, ops, targets
from tiny_cosmos import Case, assert_close, request, stock_forward

from cosmos_export.diagnostics import UserError
from cosmos_export.ir.interpreter import run_program
from cosmos_export.passes.pipeline import default_passes, run_passes
from cosmos_export.passes.slice_outputs import SliceOutputs


def layer(*, reads: Any) -> Any:
    """norm, linear and residual over [x; y], of which ``reads`` says what is read."""
    s = Sketch()
    joined = s.call(aten.cat.default, [s.input("x", (P, 8)), s.input("y", (N, 8))], 0)
    normal = s.call(ops.RMS_NORM, joined, s.weight("n", (8,)), 1e-6)
    linear = s.call(aten.linear.default, normal, s.weight("w", (8, 8)))
    total = s.call(aten.add.Tensor, joined, linear)
    return s.program(**reads(s, total))


def rows(s: Sketch, value: Any, start: Any, end: Any) -> Any:
    return s.call(aten.slice.Tensor, value, 0, start, end)


def shapes(program: Any, target: Any) -> list[Any]:
    return [n.meta["spec"].shape[0] for n in program.graphs["body"].calls(target)]


def test_only_the_rows_that_are_read_are_computed() -> None:
    program = layer(reads=lambda s, t: {"a": s.call(aten.neg.default, rows(s, t, P, N + P))})
    assert apply(SliceOutputs(), program, tolerance=1e-6).changes["values narrowed to the rows read"] == 3
    assert shapes(program, aten.linear.default) == shapes(program, ops.RMS_NORM) == [N]


def test_one_range_covers_what_several_readers_read() -> None:
    program = layer(reads=lambda s, t: {"a": rows(s, t, 2, 4), "b": rows(s, t, 3, 5), "c": rows(s, t, 2, 5)})
    apply(SliceOutputs(), program, tolerance=1e-6)
    assert shapes(program, aten.linear.default) == [3]


def test_a_value_that_is_also_read_whole_stays() -> None:
    program = layer(reads=lambda s, t: {"a": rows(s, t, P, N + P), "b": s.call(aten.neg.default, t)})
    assert not SliceOutputs().run(program).modified
    program = layer(reads=lambda s, t: {"a": rows(s, t, P, N + P), "whole": t})
    assert not SliceOutputs().run(program).modified


def test_ranges_that_cannot_be_ordered_stay() -> None:
    """Whether rows 0 … P or 0 … 2·N reach further depends on the request."""
    program = layer(reads=lambda s, t: {"a": rows(s, t, 0, P), "b": rows(s, t, 0, N)})
    assert not SliceOutputs().run(program).modified
    program = layer(reads=lambda s, t: {"a": rows(s, t, P, N + P), "b": rows(s, t, N, N + P)})
    assert not SliceOutputs().run(program).modified


def test_strided_reads_and_other_axes_stay() -> None:
    program = layer(reads=lambda s, t: {"a": s.call(aten.slice.Tensor, rows(s, t, 0, 2), 0, 0, 2, 2)})
    assert apply(SliceOutputs(), program, tolerance=1e-6).modified  # down to the strided slice, which stays
    program = layer(reads=lambda s, t: {"a": s.call(aten.slice.Tensor, t, 1, 0, 2)})
    assert not SliceOutputs().run(program).modified


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_narrowed_in_its_queries_only_and_never_where_causal(causal: bool) -> None:
    s = Sketch()
    q, k, v = (s.call(aten.neg.default, s.input(n, (5, 2, 8))) for n in "qkv")
    out = s.call(ops.ATTENTION, q, k, v, causal, 1.0)
    program = s.program(y=s.call(aten.neg.default, rows(s, out, 3, 5)))
    if causal:
        assert not SliceOutputs().run(program).modified
        return
    apply(SliceOutputs(), program)
    (node,) = program.graphs["body"].calls(ops.ATTENTION)
    assert [a.meta["spec"].shape[0] for a in node.args[:3]] == [2, 5, 5]


def test_rotations_and_joint_attention_are_narrowed_by_rows() -> None:
    s = Sketch()
    q = s.call(ops.ROTARY, s.input("q", (N + P, 2, 8)), s.input("cos", (N + P, 4)), s.input("sin", (N + P, 4)))
    k, v, prompt = s.input("k", (N + P, 2, 8)), s.input("v", (N + P, 2, 8)), s.input("p", (P, 2, 8))
    out = s.call(ops.JOINT_ATTENTION, q, k, v, prompt, prompt, 1.0)
    flat = s.call(aten.view.default, out, [N + P, 16])
    shown = s.call(aten.neg.default, s.input("n", (N,)))
    program = s.program(y=s.call(aten.neg.default, rows(s, flat, P, N + P)), shown=shown)
    apply(SliceOutputs(), program, tolerance=1e-6)
    assert shapes(program, ops.ROTARY) == shapes(program, ops.JOINT_ATTENTION) == [N]


def test_a_view_that_mixes_rows_stays() -> None:
    s = Sketch()
    folded = s.call(aten.view.default, s.call(aten.neg.default, s.input("x", (6, 8))), [12, 4])
    program = s.program(y=s.call(aten.neg.default, rows(s, folded, 0, 4)))
    assert not SliceOutputs().run(program).modified


def test_an_unknown_output_is_an_error(compiled: Any) -> None:
    have = ", ".join(compiled.captured.loop.carried.values())
    with pytest.raises(UserError) as refused:
        SliceOutputs({"smell_velocity"}).run(compiled.stages["fold_schedule"].copy())
    assert str(refused.value) == (
        f"CX221: outputs ['smell_velocity'] of the step do not exist; it has {have} (hint: name at least one of them)"
    )
    with pytest.raises(UserError, match="CX221"):
        SliceOutputs([]).run(compiled.stages["fold_schedule"].copy())


@pytest.fixture(scope="module")
def action_program(compile_tiny: Any) -> Any:
    """Inverse dynamics reads actions alone."""

    def make(backbone: str) -> Any:
        compiled = compile_tiny(backbone)
        program = compiled.captured
        reports = run_passes(program, default_passes({"action_velocity"}))
        return compiled, program, {r.name: r.result for r in reports}

    return make


@pytest.mark.parametrize("backbone", ["omni", "edge"])
def test_slicing_is_computing_all_rows(action_program: Any, backbone: str) -> None:
    compiled, program, reports = action_program(backbone)
    case = Case("inverse_dynamics", 5, 3, 6, 11, clean=(0, 1, 2, 3, 4), actions=6)
    inputs = request(compiled.config, case)
    outputs = run_program(program, inputs, compiled.weights)
    assert list(outputs) == ["action_velocity"]
    stock = stock_forward(compiled.model, inputs)
    assert_close(outputs, {"action_velocity": stock["action_velocity"]}, 1e-5)
    whole = run_program(compiled.final, inputs, compiled.weights)
    assert_close(outputs, {"action_velocity": whole["action_velocity"]}, 1e-6)
    assert reports["slice_outputs"].changes["outputs dropped"] == len(compiled.captured.loop.carried) - 1


@pytest.mark.parametrize("backbone", ["omni", "edge"])
def test_the_last_layer_computes_action_rows_only(action_program: Any, backbone: str) -> None:
    """Query, attention, output, MLP and last norm of the last generator layer; its keys and values need all rows."""
    _, program, _ = action_program(backbone)
    graph = program.graphs["generator"]
    of = {n.meta["module"]: [] for n in graph.calls()}
    for node in graph.calls():
        of[node.meta["module"]].append(node)

    def rows_of(module: str, *kinds: Any) -> set[str]:
        return {str(n.meta["spec"].shape[0]) for n in of[module] if n.target in kinds}

    last, before = "layers.1.", "layers.0."
    linear, norm = aten.linear.default, ops.RMS_NORM
    narrow = ["self_attn.add_q_proj", "self_attn.to_add_out", "mlp_moe_gen.down_proj"]
    for module in narrow:
        assert rows_of(last + module, linear) == {"action_len"}, module
        assert rows_of(before + module, linear) > {"action_len"} or "action_len" not in rows_of(before + module, linear)
    assert rows_of(last + "self_attn", ops.JOINT_ATTENTION) == {"action_len"}
    assert rows_of("norm_moe_gen", norm) == {"action_len"}
    keys = [n for n in of[last + "self_attn.add_k_proj"] if n.target is linear]
    assert len(keys) == 1 and "frames" in str(keys[0].meta["spec"].shape[0])
    assert not any(n.meta["module"].startswith(("proj_out", "audio_proj_out")) for n in graph.calls())


@pytest.mark.parametrize("backbone", ["omni", "edge"])
def test_what_the_dropped_outputs_read_is_unused_with_a_reason(action_program: Any, backbone: str) -> None:
    _, program, _ = action_program(backbone)
    assert program.unused_keys["proj_out.weight"] == "no output follows from it (slice_outputs)"
    assert program.loop.carried == {"action_latent": "action_velocity"}


def test_graphs_that_only_fed_dropped_outputs_go(compiled: Any) -> None:
    """Without actions among the outputs the embodiment's output matrix is not conditioned either."""
    program = compiled.captured
    run_passes(program, default_passes({"vision_velocity"}))
    assert not any("proj_out" in name for name in program.graphs["conditioning"].outputs)
    s = Sketch()
    assert targets(s.program(y=s.input("x", (N,)))) == []


@pytest.mark.parametrize("kind", ["linear", "norm"])
def test_a_value_whose_rows_are_its_columns_stays(kind: str) -> None:
    """Every number along the one axis follows from all: the pass ends, and changes nothing."""
    s = Sketch()
    x = s.input("x", (8,))
    value = (
        s.call(aten.linear.default, x, s.weight("w", (8, 8)))
        if kind == "linear"
        else s.call(ops.RMS_NORM, x, s.weight("n", (8,)), 1e-6)
    )
    program = s.program(y=rows(s, value, 0, 2), z=rows(s, value, 1, 4))
    assert not apply(SliceOutputs(), program).modified
