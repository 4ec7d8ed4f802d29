"""Graphs, programs, the verifier, the interpreter and the text form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sketch import N, P, Sketch, random_inputs, run, seeded_weights
from tiny_cosmos import Case, request

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir.dims import Dim, symbol
from cosmos_export.ir.formats import Format
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.interpreter import read_weights, run_graph, run_program
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Edge, Loop, Program
from cosmos_export.ir.rates import rates_of, sources_of
from cosmos_export.ir.spec import (
    LowRank,
    Packing,
    Part,
    Rate,
    TensorSpec,
    Transform,
    WeightBinding,
    WeightSource,
)
from cosmos_export.ir.text import print_graph, print_program
from cosmos_export.ir.verifier import verify

F32 = torch.float32
INT4 = Format("int4", "int4", 4, lambda rows, scale, own: rows, lambda call, parts, dtype: parts[0], groups=(32,))


def two_graphs() -> Program:
    """`first` maps x to t = exp(x); `body` computes y = t · w, z = −y, and carries y to y."""
    first = Graph("first")
    first.set_outputs({"t": first.call(aten.exp.default, first.add_input("x", TensorSpec(F32, (N, 4))))})
    body = Graph("body")
    t, carried = body.add_input("t", TensorSpec(F32, (N, 4))), body.add_input("y", TensorSpec(F32, (N, 3)))
    weight = body.add_weight("w", binding("w", 3, 4))
    y = body.call(aten.add.Tensor, body.call(aten.linear.default, t, weight), carried)
    body.set_outputs({"y_next": y, "z": body.call(aten.neg.default, y)})
    return Program(
        graphs={"first": first, "body": body},
        dims={"rows": Dim("rows", 0, 9, "rows of it")},
        rates={"x": Rate.PROMPT, "y": Rate.CARRIED},
        loop=Loop("body", {"y": "y_next"}),
        edges=[Edge("first", "t", "body", "t")],
        unused_keys={"spare": "nothing reads it"},
        history=["capture"],
    )


def binding(key: str, *shape: int, dtype: torch.dtype = F32) -> WeightBinding:
    return WeightBinding((WeightSource(key, Path("absent"), 0, dtype, shape),), Transform.IDENTITY, dtype)


# -- verifier ---------------------------------------------------------------------------------------------------------


def wrong_spec(p: Program) -> None:
    p.graphs["body"].calls()[0].meta["spec"] = TensorSpec(F32, (N, 4))


def no_spec(p: Program) -> None:
    del p.graphs["body"].calls()[0].meta["spec"]


def unbound_input(p: Program) -> None:
    del p.rates["y"]


def unread_weight(p: Program) -> None:
    p.graphs["body"].add_weight("v", binding("v", 2))


def bound_twice(p: Program) -> None:
    body = p.graphs["body"]
    body.call(aten.linear.default, body.inputs["t"], body.add_weight("again", binding("w", 3, 4)))


def bound_to_another_shape(p: Program) -> None:
    p.graphs["body"].weights["w"].meta["weight"] = binding("w", 3, 5)


def edge_of_other_type(p: Program) -> None:
    p.graphs["first"].set_outputs(
        {"t": p.graphs["first"].call(aten._to_copy.default, p.graphs["first"].outputs["t"], dtype=torch.bfloat16)}
    )


def edge_to_nowhere(p: Program) -> None:
    p.edges[0] = replace(p.edges[0], output="u")


def edge_of_no_graph(p: Program) -> None:
    p.edges[0] = replace(p.edges[0], source="second")


def edge_backwards(p: Program) -> None:
    p.graphs = dict(reversed(p.graphs.items()))


def illegal_operation(p: Program) -> None:
    body = p.graphs["body"]
    with body.fx.inserting_before(body.calls()[0]):
        node = body.fx.call_function(aten.sort.default, (body.inputs["t"],))
    node.meta.update(spec=TensorSpec(F32, (N, 4)), module="m")


def operands_that_do_not_fit(p: Program) -> None:
    body = p.graphs["body"]
    body.calls()[0].args = (body.inputs["y"], body.weights["w"])


def operand_too_many(p: Program) -> None:
    neg = p.graphs["body"].calls(aten.neg.default)[0]
    neg.args = (*neg.args, 3)


def no_loop_body(p: Program) -> None:
    p.loop = Loop("attic", {})


def no_loop_value(p: Program) -> None:
    p.loop = Loop("body", {"y": "gone"})


def no_state_to_return(p: Program) -> None:
    p.loop = Loop("body", {"y": "y_next"}, taken=("y",), returned=("x",))


def misplaced(p: Program) -> None:
    linear, _, neg = p.graphs["body"].calls()
    linear.args = (neg, linear.args[1])


def output_that_is_no_value(p: Program) -> None:
    p.graphs["body"].set_outputs({"y_next": p.graphs["body"].outputs["y_next"], "z": 3})  # type: ignore[dict-item]


def lost_piece(p: Program) -> None:
    p.loop = replace(p.loop, pieces=("first", "second", "body"))


def last_piece_is_another(p: Program) -> None:
    p.loop = replace(p.loop, pieces=("body", "first"))


BREACHES: list[tuple[Callable[[Program], None], str]] = [
    (lost_piece, "loop pieces first, second, body are not graphs that end with the body"),
    (last_piece_is_another, "loop pieces body, first are not graphs that end with the body"),
    (wrong_spec, "graph `body`, node `linear_default` (no module) says float32[rows, 4], but its operands give "
                 "float32[rows, 3]"),
    (no_spec, "graph `body`, node `linear_default` (no module) has no spec"),
    (unbound_input, "graph `body`, node `y` (no module) is an input that neither the caller nor an edge supplies"),
    (unread_weight, "graph `body`, node `v` (no module) is a weight nothing reads"),
    (bound_twice, "graph `body`, node `again` (no module) is bound to the same data as `w`"),
    (bound_to_another_shape, "graph `body`, node `w` (no module) says float32[3, 4], but is bound to float32[3, 5]"),
    (edge_of_other_type, "edge first.t → body.t joins bfloat16[rows, 4] to float32[rows, 4]"),
    (edge_to_nowhere, "edge first.u → body.t names a value that is not there"),
    (edge_of_no_graph, "edge second.t → body.t names a graph that is not there"),
    (edge_backwards, "edge first.t → body.t runs backwards"),
    (illegal_operation, "graph `body`, node `sort_default` (m) is not in the dialect: aten.sort.default"),
    (operands_that_do_not_fit, "graph `body`, node `linear_default` (no module) linear of float32[rows, 3] by "
                               "float32[3, 4]"),
    (operand_too_many, "graph `body`, node `neg_default` (no module) operands of `aten.neg.default`: too many "
                       "positional arguments"),
    (no_loop_body, "loop body `attic` is not a graph"),
    (no_loop_value, "loop value `y` → `gone` is not an input and an output of the body"),
    (no_state_to_return, "loop value `x` is taken or returned, but not carried"),
    (misplaced, "graph `body`, node `linear_default` reads a value that is made after it"),
    (output_that_is_no_value, "graph `body`, output `z` is not a value"),
]  # fmt: skip


def test_a_whole_program_is_accepted() -> None:
    verify(two_graphs(), stage="here", forbidden={aten.cos.default})


@pytest.mark.parametrize(("breach", "message"), BREACHES, ids=lambda v: getattr(v, "__name__", ""))
def test_each_breach_is_found_and_named(breach: Callable[[Program], None], message: str) -> None:
    program = two_graphs()
    breach(program)
    with pytest.raises(InternalError) as found:
        verify(program, stage="some_pass")
    assert (found.value.code, found.value.message) == ("CX201", f"after some_pass: {message}")


def test_a_forbidden_operation_is_named() -> None:
    with pytest.raises(InternalError) as found:
        verify(two_graphs(), forbidden={aten.neg.default})
    assert (
        found.value.message == "graph `body`, node `neg_default` (no module) `aten.neg.default` is not legal any more"
    )


# -- interpreter ------------------------------------------------------------------------------------------------------


def good() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 4), "y": torch.randn(2, 3)}


def test_a_program_runs_through_its_edges() -> None:
    inputs = good()
    w = seeded_weights(binding("w", 3, 4))
    outputs = run_program(two_graphs(), inputs, seeded_weights)
    torch.testing.assert_close(outputs["y_next"], inputs["x"].exp() @ w.T + inputs["y"])
    assert torch.equal(outputs["z"], -outputs["y_next"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "graph `body` needs the input `y`"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, r"`x` is torch.float64, expected torch.float32"),
        ({"x": torch.zeros(2, 5)}, "`x` has size 5 on axis 1, expected 4"),
        ({"x": torch.zeros(2)}, "`x` has rank 1, expected 2"),
        ({"x": torch.zeros(3, 4)}, "`y` has rows = 2 on axis 0, another input has 3"),
    ],
    ids=["missing", "type", "size", "rank", "disagree"],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    inputs = {k: v for k, v in (good() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        run_program(two_graphs(), inputs, seeded_weights)


def test_a_result_against_its_spec_is_an_error() -> None:
    program = two_graphs()
    program.graphs["body"].calls(aten.neg.default)[0].meta["spec"] = TensorSpec(F32, (N, 9))
    with pytest.raises(ValueError, match=r"`neg_default` gave torch.float32\(2, 3\), its spec says float32\[rows, 9\]"):
        run_program(program, good(), seeded_weights)


def test_a_graph_alone_binds_composite_sizes_or_is_told() -> None:
    graph = Graph("g")
    x = graph.add_input("x", TensorSpec(F32, (N,)))
    graph.set_outputs({"y": graph.call(aten.expand.default, graph.call(aten.unsqueeze.default, x, 0), [P, N])})
    inputs = {"x": torch.ones(2)}
    assert run_graph(graph, inputs, seeded_weights, {"prompt": 3})["y"].shape == (3, 2)
    with pytest.raises(ValueError, match="prompt is not an integer under"):
        run_graph(graph, inputs, seeded_weights)


def test_conditioning_runs_by_itself(omni: Any) -> None:
    """It sees ⌈height/2⌉ and never the height."""
    graph = omni.final.graphs["conditioning"]
    inputs = request(omni.config, Case("t2v", 5, 5, 7, 3))
    outputs = run_graph(graph, {k: inputs[k] for k in graph.inputs}, omni.weights)
    assert outputs["rotary_cos"].shape == (5 * 3 * 4, omni.config["head_dim"] // 2)


def test_compute_widens_bfloat16() -> None:
    s = Sketch()
    x = s.input("x", (N, 4), dtype=torch.bfloat16)
    y = s.call(aten.linear.default, x, s.weight("w", (3, 4), torch.bfloat16))
    program = s.program(y=y, z=s.call(aten._to_copy.default, y, dtype=torch.bfloat16))
    inputs = random_inputs(program)
    wide = run_program(program, {"x": inputs["x"].float()}, seeded_weights, compute=F32)
    assert {v.dtype for v in wide.values()} == {F32}
    torch.testing.assert_close(
        wide["y"], inputs["x"].float() @ seeded_weights(binding("w", 3, 4, dtype=torch.bfloat16)).float().T
    )
    assert run(program)["y"].dtype == torch.bfloat16


def test_bindings_merge_as_they_say() -> None:
    a, b = (binding(k, 2, 3) for k in "ab")
    read = read_weights(lambda s: torch.full(s.shape, float(ord(s.key))))
    stacked = a.merged((b,), Transform.CONCATENATE)
    mixed = a.merged((b,), Transform.INTERLEAVE)
    assert read(stacked)[:, 0].tolist() == [97, 97, 98, 98] and read(mixed)[:, 0].tolist() == [97, 98, 97, 98]
    assert stacked.shape == mixed.shape == (4, 3) and stacked.keys == ("a", "b")
    assert (str(a), str(stacked), str(mixed)) == ("a", "concatenate(a, b)", "interleave(a, b)")
    assert read(replace(a, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bindings_that_make_no_sense_are_refused() -> None:
    a, b, scalar = binding("a", 2, 3), binding("b", 4, 3), binding("s")
    with pytest.raises(ValueError, match="an identity binding has one source"):
        a.merged((b,), Transform.IDENTITY)
    with pytest.raises(ValueError, match="interleaved sources have one shape"):
        a.merged((b,), Transform.INTERLEAVE)
    with pytest.raises(ValueError, match="scalars have no axis to merge along"):
        scalar.merged((scalar,), Transform.CONCATENATE)
    with pytest.raises(ValueError, match="only plain weights are merged"):
        a.merged((b,), Transform.CONCATENATE).merged((b,), Transform.CONCATENATE)


# -- rates ------------------------------------------------------------------------------------------------------------


def test_join_is_a_semilattice_in_which_step_and_request_make_carried() -> None:
    rates = list(Rate)
    for a in rates:
        assert a.join(a) is a and Rate.CONSTANT.join(a) is a and Rate.CARRIED.join(a) is Rate.CARRIED
        for b in rates:
            assert a.join(b) is b.join(a)
            assert all(a.join(b).join(c) is a.join(b.join(c)) for c in rates)
    assert Rate.STEP.join(Rate.PROMPT) is Rate.STEP.join(Rate.REQUEST) is Rate.STEP.join(Rate.BRANCH) is Rate.CARRIED
    assert Rate.PROMPT.join(Rate.REQUEST) is Rate.BRANCH
    assert [rate for rate in rates if rate.follows_prompt] == [Rate.PROMPT, Rate.BRANCH]


def test_rates_follow_edges() -> None:
    program = two_graphs()
    body = program.graphs["body"]
    rates = rates_of(program, body)
    assert rates[body.inputs["t"]] is Rate.PROMPT and rates[body.weights["w"]] is Rate.CONSTANT
    linear, add, _ = body.calls()
    assert (rates[linear], rates[add]) == (Rate.PROMPT, Rate.CARRIED)
    assert {n.name for n in sources_of(add)} == {"t", "w", "y", "linear_default", "add_tensor"}


# -- graphs and programs ----------------------------------------------------------------------------------------------


def test_a_copy_is_equal_and_independent(omni: Any) -> None:
    program = omni.final
    before = print_program(program)
    copy = program.copy()
    assert print_program(copy) == before
    for graph in copy.graphs.values():
        graph.calls()[-1].meta["spec"] = TensorSpec(F32, (1,))
        graph.set_outputs({})
        graph.eliminate_dead_code()
    copy.edges.clear(), copy.dims.clear(), copy.rates.clear(), copy.unused_keys.clear(), copy.history.clear()
    assert print_program(program) == before
    verify(program)


def test_inputs_keep_their_names() -> None:
    graph = Graph("g")
    x = graph.add_input("x", TensorSpec(F32, (N,)))
    gone = graph.call(aten.neg.default, x)
    graph.erase(gone)
    assert graph.add_input("neg_default", TensorSpec(F32, (N,))).name == "neg_default"
    with pytest.raises(ValueError, match="graph `g` has a value `x` already"):
        graph.add_input("x", TensorSpec(F32, (N,)))
    graph.call(aten.exp.default, x)
    with pytest.raises(ValueError, match="graph `g` has a value `exp_default` already"):
        graph.add_input("exp_default", TensorSpec(F32, (N,)))


def test_dead_code_goes_and_inputs_stay() -> None:
    graph = Graph("g")
    x, y = (graph.add_input(n, TensorSpec(F32, (3, 3))) for n in "xy")
    graph.call(aten.linear.default, graph.call(aten.neg.default, y), graph.add_weight("w", binding("w", 3, 3)))
    constant = graph.add_constant("c", torch.zeros(3))
    graph.set_outputs({"x": x})
    assert [n.name for n in graph.eliminate_dead_code()] == ["linear_default", "neg_default", "c", "w"]
    assert list(graph.inputs) == ["x", "y"] and not graph.constants and constant
    assert graph.remove_unread_inputs() == ["y"]


def test_provenance_of_new_operations() -> None:
    graph = Graph("g")
    x = graph.add_input("x", TensorSpec(F32, (N,)))
    first = graph.call(aten.neg.default, x, by="one")
    first.meta["module"] = "layers.0"
    second = graph.call(aten.exp.default, first, like=first, by="two")
    third = graph.call(aten.cos.default, second, like=second, by="two")
    assert (second.meta["module"], third.meta["passes"]) == ("layers.0", ("one", "two"))


def test_keys_and_inputs_of_a_program() -> None:
    program = two_graphs()
    assert program.bound_keys() == {"w"}
    assert program.free_inputs("first") == ["x"] and program.free_inputs("body") == ["y"]


# -- text -------------------------------------------------------------------------------------------------------------


def test_the_text_of_a_program() -> None:
    program = two_graphs()
    body = program.graphs["body"]
    body.calls()[0].meta["module"] = "head"
    cast = body.call(aten._to_copy.default, body.outputs["z"], dtype=torch.bfloat16)
    joined = body.call(aten.cat.default, [cast, cast], 1)
    mask = body.call(aten.where.self, body.add_constant("m", torch.ones(6, dtype=torch.bool)), joined, joined)
    body.set_outputs({**body.outputs, "z": mask})
    assert (
        print_program(program)
        == """after capture

dim rows: 0..9  # rows of it
input x: prompt
input y: carried
edge first.t -> body.t
loop body: y <- y_next

unused spare: nothing reads it
file 0: absent
graph first {
  %x: float32[rows, 4] = input
  %exp_default: float32[rows, 4] = aten.exp(%x)
  output t: float32[rows, 4] = %exp_default
}

graph body {
  %t: float32[rows, 4] = input
  %y: float32[rows, 3] = input
  %w: float32[3, 4] = weight w@0+0:float32[3x4]
  %m: bool[6] = constant [True, True, True, True, True, True]
  %linear_default: float32[rows, 3] = aten.linear(%t, %w)  # head
  %add_tensor: float32[rows, 3] = aten.add.Tensor(%linear_default, %y)
  %neg_default: float32[rows, 3] = aten.neg(%add_tensor)
  %_to_copy_default: bfloat16[rows, 3] = aten._to_copy(%neg_default, dtype=bfloat16)
  %cat_default: bfloat16[rows, 6] = aten.cat([%_to_copy_default, %_to_copy_default], 1)
  %where_self: bfloat16[rows, 6] = aten.where.self(%m, %cat_default, %cat_default)
  output y_next: float32[rows, 3] = %add_tensor
  output z: bfloat16[rows, 6] = %where_self
}
"""
    )


def _source(**changes: Any) -> Callable[[Program], None]:
    def change(p: Program) -> None:
        node = p.graphs["body"].weights["w"]
        bound = node.meta["weight"]
        node.meta["weight"] = replace(bound, sources=(replace(bound.sources[0], **changes),))

    return change


def _packed(**changes: Any) -> Callable[[Program], None]:
    base = Packing(INT4, Part.VALUES, torch.bfloat16, 32)

    def change(p: Program) -> None:
        packing = replace(base, **changes)
        node = p.graphs["body"].weights["w"]
        node.meta["weight"] = replace(binding("w", 3, 64), packing=packing, dtype=packing.stored)

    return change


def _loop(**changes: Any) -> Callable[[Program], None]:
    return lambda p: setattr(p, "loop", replace(p.loop, **changes))


def _edge(**changes: Any) -> Callable[[Program], None]:
    return lambda p: p.edges.append(replace(p.edges.pop(), **changes))


def _node(which: int, **changes: Any) -> Callable[[Program], None]:
    def change(p: Program) -> None:
        for name, value in changes.items():
            setattr(p.graphs["body"].calls()[which], name, value)

    return change


def _meta(key: str, value: Any) -> Callable[[Program], None]:
    return lambda p: p.graphs["body"].weights["w"].meta.update({key: value})


def _constant(value: torch.Tensor) -> Callable[[Program], None]:
    return lambda p: p.graphs["body"].constants["m"].meta.update(constant=value)


OTHER = WeightSource("other", Path("absent"), 8, F32, (1, 64))
CHANGES: dict[str, Callable[[Program], None]] = {
    "nothing": lambda p: None,
    "dim name": lambda p: p.dims.update(rows=Dim("columns", 0, 9, "rows of it")),
    "dim minimum": lambda p: p.dims.update(rows=Dim("rows", 1, 9, "rows of it")),
    "dim maximum": lambda p: p.dims.update(rows=Dim("rows", 0, 8, "rows of it")),
    "rate": lambda p: p.rates.update(x=Rate.REQUEST),
    "edge source": _edge(source="third"),
    "edge output": _edge(output="u"),
    "edge target": _edge(target="third"),
    "edge input": _edge(input="u"),
    "edge instance": _edge(instance="negative"),
    "loop body": _loop(body="first"),
    "loop carried": _loop(carried={"y": "z"}),
    "loop rows": _loop(rows=("t",)),
    "loop taken": _loop(taken=("y",)),
    "loop returned": _loop(returned=("y",)),
    "loop pieces": _loop(pieces=("first", "body")),
    "loop steps": _loop(steps=4),
    "loop start": _loop(start=1, steps=3),
    "unused": lambda p: p.unused_keys.update(more="nothing"),
    "graph order": lambda p: p.graphs.update(first=p.graphs.pop("first")),
    "graph name": lambda p: p.graphs.update(third=p.graphs.pop("body")),
    "operation": _node(1, target=aten.sub.Tensor),
    "operand": _node(1, args=(1.0, 2)),
    "operand type": _node(1, args=(1, 2)),
    "operand text": _node(1, args=("rows", 2)),
    "operand dim": _node(1, args=(N, 2)),
    "operand option": _node(1, kwargs={"alpha": 2}),
    "node name": _node(1, name="renamed"),
    "node type": lambda p: p.graphs["body"].calls()[0].meta.update(spec=TensorSpec(torch.bfloat16, (N, 3))),
    "node shape": lambda p: p.graphs["body"].calls()[0].meta.update(spec=TensorSpec(F32, (P, 3))),
    "output": lambda p: p.graphs["body"].set_outputs(
        {**p.graphs["body"].outputs, "more": p.graphs["body"].inputs["t"]}
    ),
    "constant value": _constant(torch.tensor([1.0, 2.0, 4.0])),
    "constant type": _constant(torch.tensor([1, 2, 3])),
    "large constant": _constant(torch.arange(9.0)),
    "large constant's last value": _constant(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 9])),
    "label": _meta("precision", "gen.mlp.down[0]: fp8"),
    "weight key": _source(key="v"),
    "weight offset": _source(offset=4),
    "weight type": _source(dtype=torch.bfloat16),
    "weight shape": _source(shape=(4, 3)),
    "weight scale": _source(scale=OTHER),
    "weight's scale's place": _source(scale=replace(OTHER, offset=16)),
    "transform": _meta("weight", WeightBinding((OTHER, OTHER), Transform.CONCATENATE, F32)),
    "other transform": _meta("weight", WeightBinding((OTHER, OTHER), Transform.INTERLEAVE, F32)),
    "packing": _packed(),
    "packing part": _packed(part=Part.SCALE),
    "packing format": _packed(format=replace(INT4, name="other")),
    "packing type": _packed(dtype=torch.float16),
    "packing group": _packed(group=64),
    "packing divisor": _packed(divisor=OTHER),
    "packing low rank": _packed(low_rank=LowRank(OTHER, (OTHER,))),
    "packing other low rank": _packed(low_rank=LowRank(OTHER, (replace(OTHER, key="up"),))),
}


def test_two_programs_that_differ_never_print_alike() -> None:
    texts: dict[str, str] = {}
    for name, change in CHANGES.items():
        program = two_graphs()
        program.graphs["body"].add_constant("m", torch.tensor([1.0, 2.0, 3.0]))
        change(program)
        text = print_program(program)
        alike = [other for other, known in texts.items() if known == text]
        assert not alike, f"{name} prints as {alike[0]}"
        texts[name] = text


def test_weights_of_two_files_do_not_print_alike() -> None:
    """Files of one name in two folders; where the checkpoint is does not matter."""

    def text(*folders: str) -> str:
        graph = Graph("g")
        for i, folder in enumerate(folders):
            bound = binding("w", 2)
            graph.add_weight(f"w{i}", replace(bound, sources=(replace(bound.sources[0], file=Path(folder, "m")),)))
        return print_program(Program({"g": graph}, {}, {}, Loop("g", {})))

    assert text("a", "a") == text("b", "b") != text("a", "b") == text("x/a", "x/b")


def test_an_empty_program_has_a_text() -> None:
    empty = Program({"g": Graph("g")}, {}, {}, Loop("g", {}))
    assert print_program(empty).startswith("empty\n")
    assert print_graph(Graph("g")) == "graph g {\n}\n"
    assert str(TensorSpec(torch.float64, (symbol("a"),))) == "torch.float64[a]"
