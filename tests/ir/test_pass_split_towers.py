"""split_towers: the reasoner and the request's tables leave the loop; a program in which they cannot is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sketch import N, P, Sketch, apply, aten, ops, targets

from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.rates import rates_of
from cosmos_export.ir.spec import Rate
from cosmos_export.passes.base import CannotApply
from cosmos_export.passes.fold_schedule import FoldSchedule
from cosmos_export.passes.split_towers import SplitTowers, memory_bytes_per_token


def joint(read: Any = None, *, join: bool = True, feedback: bool = False) -> Any:
    """One layer: a prompt tower with causal attention, and rows that attend to the prompt and to themselves."""
    s = Sketch()
    ids = s.input("ids", (P,), Rate.PROMPT, torch.int64)
    latent = s.input("latent", (N, 8))
    scale = s.input("scale", (8,), Rate.REQUEST)
    time = s.input("time", (1,), Rate.STEP)
    text = s.call(aten.embedding.default, s.weight("table", (4, 8)), ids)
    if feedback:
        text = s.call(aten.add.Tensor, text, s.call(aten.slice.Tensor, latent, 0, 0, 1))
    key = s.call(aten.view.default, s.call(aten.linear.default, text, s.weight("k", (8, 8))), [P, 1, 8])
    value = s.call(aten.view.default, s.call(aten.linear.default, text, s.weight("v", (8, 8))), [P, 1, 8])
    unread = s.call(ops.ATTENTION, key, key, value, True, 1.0)
    table = s.call(aten.exp.default, scale)
    step = s.call(aten.exp.default, time)
    rows = s.call(aten.mul.Tensor, s.call(aten.add.Tensor, latent, step), table)
    own = s.call(aten.view.default, rows, [N, 1, 8])
    keys, values = key, value
    if join:
        keys = s.call(aten.cat.default, [key, own], 0)
        values = s.call(aten.cat.default, [value, own], 0)
    y = s.call(ops.ATTENTION, own, keys, values, False, 0.5)
    nodes = {"text": text, "latent": latent, "own": own, "key": key, "ids": ids, "unread": unread}
    return s.program(y=y, **(read(s, nodes) if read else {}))


def test_a_joint_step_is_taken_apart() -> None:
    program = joint()
    result = apply(SplitTowers(), program)
    assert list(program.graphs) == ["reasoner", "conditioning", "generator"]
    assert result.changes["keys and values computed once a prompt"] == 2
    assert result.changes["tables computed once a request"] == 1
    assert list(program.graphs["reasoner"].outputs) == ["key_0", "value_0"]
    assert list(program.graphs["reasoner"].inputs) == ["ids"]
    assert program.loop.body == "generator"
    assert memory_bytes_per_token(program) == 2 * 8 * 4


def test_attention_to_the_prompt_alone_may_stay_in_the_loop() -> None:
    """Keys and values need no join to be keys and values; without a label they are named after what made them."""
    program = joint(join=False)
    apply(SplitTowers(), program)
    assert len(program.graphs["reasoner"].outputs) == 2
    assert "ids" not in program.graphs["generator"].inputs


@pytest.mark.parametrize(
    "read",
    [
        lambda s, v: {"z": s.call(aten.add.Tensor, v["latent"], s.call(aten.slice.Tensor, v["text"], 0, 0, 1))},
        lambda s, v: {"z": s.call(aten.mul.Tensor, v["latent"], s.call(aten.slice.Tensor, v["ids"], 0, 0, 1))},
        lambda s, v: {"z": s.call(aten.neg.default, s.call(aten.cat.default, [v["key"], v["own"]], 0))},
        lambda s, v: {"z": s.call(ops.ATTENTION, v["key"], v["own"], v["own"], False, 1.0)},
    ],
    ids=["value added", "ids read", "joined rows read", "as query"],
)
def test_a_generator_that_reads_the_prompt_otherwise_is_refused(read: Any) -> None:
    with pytest.raises(CannotApply) as refused:
        SplitTowers().run(joint(read))
    assert refused.value.code == "CX220"
    assert "the reasoner cannot leave the loop" in str(refused.value)


def test_a_reasoner_that_reads_the_generator_is_refused_by_name() -> None:
    program = joint(feedback=True)
    with pytest.raises(CannotApply) as refused:
        SplitTowers().run(program)
    assert str(refused.value) == (
        "CX220: split_towers: `add_tensor`: reads the prompt's value `embedding_default` together with what changes in "
        "every step, and not as key or value of attention: the reasoner cannot leave the loop "
        "(hint: the graph is in `build --until … --dump DIR`)"
    )


def test_the_ids_themselves_cannot_enter_the_generator() -> None:
    s = Sketch()
    ids = s.input("ids", (N,), Rate.PROMPT, torch.int64)
    embedded = s.call(aten.embedding.default, s.weight("w", (4, 8)), ids)
    y = s.call(aten.add.Tensor, s.input("x", (N,), dtype=torch.int64), ids)
    with pytest.raises(CannotApply, match="`add_tensor`: reads the prompt's value `ids`"):
        SplitTowers().run(s.program(y=y, z=embedded))


def test_a_planted_crossing_in_the_real_model_is_named(compiled: Any) -> None:
    """A generator that adds the mean of a prompt value, as an adaLN on the prompt would."""
    program = compiled.stages["shift_rope"].copy()
    graph = program.graphs["joint"]
    embedded = graph.calls(aten.embedding.default)[0]
    victim = next(n for n in graph.calls(aten.linear.default) if n.meta["module"] == "layers.0.self_attn.add_q_proj")
    row = graph.call(aten.slice.Tensor, embedded, 0, 0, 1, before=victim)
    mixed = graph.call(aten.add.Tensor, victim.args[0], row, before=victim, like=victim)
    victim.replace_input_with(victim.args[0], mixed)
    with pytest.raises(CannotApply, match=r"of module `layers\.0\.self_attn\.add_q_proj`: reads the prompt's value"):
        SplitTowers().run(program)


def pooled(rate: Rate, read: Any) -> Any:
    """Rows that ``read`` mixes with an embedded prompt and an input of ``rate``."""
    s = Sketch()
    ids = s.input("ids", (P,), Rate.PROMPT, torch.int64)
    row = s.call(aten.slice.Tensor, s.call(aten.embedding.default, s.weight("w", (4, 8)), ids), 0, 0, 1)
    mixed = read(s, s.call(aten.exp.default, row), s.input("scale", (8,), rate))
    return s.program(y=s.call(aten.add.Tensor, s.input("x", (N, 8)), mixed))


@pytest.mark.parametrize(
    "read",
    [
        lambda s, row, scale: s.call(aten.exp.default, s.call(aten.mul.Tensor, row, scale)),
        lambda s, row, scale: s.call(aten.mul.Tensor, scale, s.call(aten.sin.default, row)),
        lambda s, row, scale: s.call(aten.neg.default, s.call(aten.mul.Tensor, s.call(aten.exp.default, scale), row)),
    ],
    ids=["prompt and request", "request and prompt", "table of the request"],
)
def test_a_table_of_the_request_that_reads_the_prompt_is_refused(read: Any) -> None:
    """It would run once for both prompts of a guided request: the negative branch would read the positive prompt."""
    with pytest.raises(CannotApply, match="together with what changes with every request") as refused:
        SplitTowers().run(pooled(Rate.REQUEST, read))
    assert refused.value.code == "CX220"
    SplitTowers().run(pooled(Rate.CONSTANT, lambda s, row, scale: s.call(aten.exp.default, scale)))  # no prompt in it


def test_a_request_that_reads_the_length_of_the_prompt_is_refused() -> None:
    """The length is another one for the negative prompt, and no operand says that it is read."""
    s = Sketch()
    ids = s.input("ids", (P,), Rate.PROMPT, torch.int64)
    text = s.call(aten.embedding.default, s.weight("w", (4, 8)), ids)
    moved = s.call(aten.add.Tensor, s.input("scale", (8,), Rate.REQUEST), P)
    program = s.program(y=s.call(aten.add.Tensor, s.input("x", (N, 8)), s.call(aten.exp.default, moved)), z=text)
    rates = rates_of(program, program.graphs["body"])
    assert rates[program.graphs["body"].calls(aten.add.Tensor)[0]] is Rate.BRANCH
    with pytest.raises(CannotApply, match="`exp_default`: reads the prompt's value `add_tensor`"):
        SplitTowers().run(program)


@pytest.mark.parametrize("first", Rate)
@pytest.mark.parametrize("second", Rate)
def test_a_rate_keeps_the_prompt_and_the_order_does_not_matter(first: Rate, second: Rate) -> None:
    joined = first.join(second)
    assert joined is second.join(first)
    assert joined >= max(first, second)
    if joined < Rate.STEP:
        assert joined.follows_prompt == (first.follows_prompt or second.follows_prompt)
    for third in Rate:
        assert joined.join(third) is first.join(second.join(third))


def test_a_pooled_prompt_in_the_real_model_is_refused(compiled: Any) -> None:
    """The mean of the prompt, scaled by a table of the request, is added to the rows of the first layer."""
    program = compiled.stages["shift_rope"].copy()
    graph = program.graphs["joint"]
    rates = rates_of(program, graph)
    embedded = graph.calls(aten.embedding.default)[0]
    victim = next(n for n in graph.calls(aten.linear.default) if n.meta["module"] == "layers.0.self_attn.add_q_proj")
    table = next(n for n in graph.calls(aten.cos.default) if rates[n] is Rate.REQUEST)
    while spec_of(table).rank > 1:
        table = graph.call(aten.select.int, table, 0, 0, before=victim)
    one = graph.call(aten.slice.Tensor, table, 0, 0, 1, before=victim)
    mean = graph.call(aten.mean.dim, embedded, [0], True, before=victim)
    mixed = graph.call(aten.mul.Tensor, mean, one, before=victim)
    moved = graph.call(aten.add.Tensor, victim.args[0], mixed, before=victim, like=victim)
    victim.replace_input_with(victim.args[0], moved)
    with pytest.raises(CannotApply, match=r"reads the prompt's value `mean_dim.*what changes with every request"):
        SplitTowers().run(program)


def test_an_output_that_the_loop_does_not_change_is_handed_over() -> None:
    program = joint(lambda s, v: {"text": s.call(aten.exp.default, v["text"])})
    before = list(program.graphs["body"].outputs)
    apply(SplitTowers(), program)
    assert list(program.graphs["generator"].outputs) == before
    assert "ids" not in program.graphs["generator"].inputs


def test_without_a_prompt_there_is_nothing_to_split() -> None:
    s = Sketch()
    program = s.program(y=s.call(aten.exp.default, s.input("x", (N,))))
    assert not SplitTowers().run(program).modified


# -- fold_schedule ----------------------------------------------------------------------------------------------------


def test_what_follows_from_the_timestep_becomes_the_schedule() -> None:
    program = joint()
    SplitTowers().run(program)
    assert apply(FoldSchedule(), program).changes == {"rows computed once a step of the schedule": 1}
    schedule = program.graphs["schedule"]
    assert list(schedule.inputs) == ["time"] and list(schedule.outputs) == ["time_embedding"]
    assert "time" not in program.graphs["generator"].inputs


def test_two_rows_of_the_schedule_have_two_names() -> None:
    s = Sketch()
    t, x = s.input("t", (1,), Rate.STEP), s.input("x", (N,))
    y = s.call(aten.add.Tensor, x, s.call(aten.cos.default, t))
    program = s.program(y=s.call(aten.mul.Tensor, y, s.call(aten.sin.default, t)))
    apply(FoldSchedule(), program)
    assert list(program.graphs["schedule"].outputs) == ["time_embedding", "time_embedding_1"]


def test_a_timestep_mixed_with_the_request_or_read_as_it_is_stays() -> None:
    """Join of step and request changes in every step of every request: it cannot be a table of the schedule."""
    s = Sketch()
    t, x = s.input("t", (1,), Rate.STEP), s.input("x", (N,))
    mixed = s.call(aten.exp.default, s.call(aten.mul.Tensor, t, s.input("mask", (1,), Rate.REQUEST)))
    y = s.call(aten.mul.Tensor, s.call(aten.add.Tensor, x, mixed), s.call(aten.view.default, t, [1]))
    program = s.program(y=y)
    assert not FoldSchedule().run(program).modified
    assert list(program.graphs) == ["body"]


def test_the_models_schedule_is_its_time_embedder(compiled: Any) -> None:
    program = compiled.stages["fold_schedule"]
    assert list(program.graphs["schedule"].inputs) == ["timestep"]
    assert {k.split(".")[0] for n in program.graphs["schedule"].weights.values() for k in n.meta["weight"].keys} == {
        "time_embedder"
    }
    assert aten.linear.default in targets(program, "schedule")
