"""Law: the generator on both branches at once = on each alone. The branches' prompts differ in length."""

from __future__ import annotations

import pytest
import torch
from tiny_cosmos import Case, Compiled, request

from cosmos_export.ir import ops
from cosmos_export.ir.graph import is_op, spec_of
from cosmos_export.ir.interpreter import run_program
from cosmos_export.ir.program import Edge
from cosmos_export.ir.text import print_program
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.base import CannotApply
from cosmos_export.passes.batch_guidance import NEGATIVE, BatchGuidance
from cosmos_export.passes.pipeline import default_passes
from cosmos_export.passes.split_towers import CONDITIONING, GENERATOR


@pytest.mark.parametrize("lengths", [(7, 7), (1, 300), (40, 2)])
@pytest.mark.parametrize(
    "case", [Case("everything", 3, 5, 6, 0, clean=(0,), sound=4, actions=5), Case("t2i", 1, 4, 5, 0)]
)
def test_both_branches_at_once_equal_each_alone(compiled: Compiled, case: Case, lengths: tuple[int, int]) -> None:
    if not compiled.config["sound_gen"]:
        case = Case(case.mode, case.frames, case.height, case.width, 0, case.clean, 0, case.actions)
    both = compiled.final.copy()
    BatchGuidance().run(both)
    verify(both)
    inputs = request(compiled.config, case)
    ids = [torch.arange(3, 3 + n) % 512 for n in lengths]
    alone = [run_program(compiled.final, inputs | {"input_ids": i}, compiled.weights) for i in ids]
    found = run_program(both, inputs | {"input_ids": ids[0], f"{NEGATIVE}_input_ids": ids[1]}, compiled.weights)
    for name in alone[0]:
        torch.testing.assert_close(found[name], alone[0][name], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[f"{NEGATIVE}_{name}"], alone[1][name], rtol=0, atol=1e-6)


def test_every_weight_is_read_by_one_product(compiled: Compiled) -> None:
    """Up to the outputs, which each branch has of its own, no linear is there twice."""
    both = compiled.final.copy()
    BatchGuidance().run(both)
    before, after = (p.graphs[GENERATOR] for p in (compiled.final, both))
    linears = [len(g.calls(ops.aten.linear.default)) for g in (before, after)]
    heads = 1 + int(compiled.config["sound_gen"])  # the output projections that are linears
    assert linears[1] == linears[0] + heads
    assert len(after.calls(ops.JOINT_ATTENTION)) == 2 * len(before.calls(ops.JOINT_ATTENTION))


def test_no_branch_shares_its_query(compiled: Compiled) -> None:
    both = compiled.final.copy()
    BatchGuidance().run(both)
    queries = [n.args[0] for n in both.graphs[GENERATOR].calls(ops.JOINT_ATTENTION)]
    assert len(set(queries)) == len(queries)
    assert all(is_op(q, ops.aten.slice.Tensor) for q in queries)


def test_twice_is_once(compiled: Compiled) -> None:
    program = compiled.final.copy()
    BatchGuidance().run(program)
    text = print_program(program)
    assert not BatchGuidance().run(program).modified
    assert print_program(program) == text


def test_a_graph_of_the_request_that_reads_the_prompt_is_refused(compiled: Compiled) -> None:
    """It would run once for both branches."""
    program = compiled.final.copy()
    table = next(e for e in program.edges_into(GENERATOR) if e.source == CONDITIONING)
    conditioning = program.graphs[CONDITIONING]
    spec = spec_of(program.graphs["reasoner"].outputs["key_0"])
    key = conditioning.add_input("key_0", spec)
    made = conditioning.outputs[table.output]
    row = conditioning.call(ops.aten.mean.dim, key, [0, 1, 2], False)
    conditioning.set_outputs({**conditioning.outputs, table.output: conditioning.call(ops.aten.mul.Tensor, made, row)})
    program.edges.append(Edge("reasoner", "key_0", CONDITIONING, "key_0"))
    with pytest.raises(CannotApply, match="the graph it comes from runs once"):
        BatchGuidance().run(program)


def test_a_program_that_is_not_split_is_left_alone(compiled: Compiled) -> None:
    program = compiled.captured
    text = print_program(program)
    result = BatchGuidance().run(program)
    assert not result.modified
    assert print_program(program) == text
    assert BatchGuidance.name not in {p.name for p in default_passes()}
