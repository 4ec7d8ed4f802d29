"""Keys and values of the prompt in FP8, from the reasoner to the generator's attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized import Tiny
from tiny_cosmos import assert_close, distance

from cosmos_export.diagnostics import UserError
from cosmos_export.ir import ops
from cosmos_export.ir.graph import is_op, spec_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.text import print_program
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.base import CannotApply
from cosmos_export.passes.batch_guidance import BatchGuidance
from cosmos_export.passes.insert_quantization import InsertQuantization
from cosmos_export.passes.options import Ranges
from cosmos_export.passes.pipeline import run_passes
from cosmos_export.passes.quantize_prefix import QuantizePrefix

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module", params=["omni", "edge"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp(request.param))


def asked(*layers: int, core: str = "bf16") -> Callable[[str, str, int], tuple[str, ...]]:
    """The prompt's keys and values of ``layers`` in FP8, attention in ``core``, nothing else."""

    def over_steps(tower: str, kind: str, layer: int) -> tuple[str, ...]:
        if (tower, kind) == ("und", "attention.kv"):
            return ("fp8" if layer in layers else "bf16",)
        return (core if kind == "attention.core" else "bf16",)

    return over_steps


def ranges_of(model: Tiny) -> Ranges:
    """Ranges of attention, wide enough for anything that comes out of a norm here."""
    layers = model.config["num_hidden_layers"]
    return Ranges(attention={(layer, operand): 12.0 + layer for layer in range(layers) for operand in "qkv"})


def rewritten(model: Tiny, *layers: int, core: str = "bf16", prefix: bool = True) -> Program:
    program = model.assigned(asked(*layers, core=core))
    run_passes(program, [InsertQuantization(ranges_of(model))])
    if prefix:
        (report,) = run_passes(program, [QuantizePrefix(ranges_of(model))])
        assert report.result.modified == bool(layers)
    return program


def everywhere(model: Tiny) -> range:
    return range(model.config["num_hidden_layers"])


def test_the_edge_is_in_fp8_and_half_the_size(model: Tiny) -> None:
    program = rewritten(model, *everywhere(model))
    body, source = program.graphs["generator"], program.graphs["reasoner"]
    edges = [e for e in program.edges_into("generator") if e.source == "reasoner"]
    assert len(edges) == 2 * len(everywhere(model))
    for edge in edges:
        assert spec_of(source.outputs[edge.output]).dtype == spec_of(body.inputs[edge.input]).dtype == FP8
    for attention in body.calls(ops.JOINT_ATTENTION):
        for operand in attention.args[3:5]:
            assert is_op(operand, ops.DEQUANTIZE) and spec_of(operand).dtype is torch.bfloat16


def test_only_the_layers_that_are_asked_for(model: Tiny) -> None:
    program = rewritten(model, 1)
    types = {name: spec_of(value).dtype for name, value in program.graphs["reasoner"].outputs.items()}
    assert {name for name, dtype in types.items() if dtype == FP8} == {"key_1", "value_1"}
    untouched, labelled = (print_program(p) for p in (rewritten(model), model.assigned(asked())))
    assert untouched.partition("\n")[2] == labelled.partition("\n")[2]  # the first line names the last pass


def test_running_twice_changes_nothing(model: Tiny) -> None:
    program = rewritten(model, *everywhere(model))
    before = print_program(program)
    assert not QuantizePrefix(ranges_of(model)).run(program).modified
    assert print_program(program) == before


def test_both_branches_of_guidance_share_what_the_reasoner_does(model: Tiny) -> None:
    program = model.assigned(asked(*everywhere(model)))
    BatchGuidance().run(program)
    QuantizePrefix(ranges_of(model)).run(program)
    verify(program, stage="prefix")
    given = [v for n, v in program.graphs["generator"].inputs.items() if n.split("_")[-2] in ("key", "value")]
    assert len(given) == 4 * len(everywhere(model)) and all(spec_of(v).dtype == FP8 for v in given)
    assert len(program.graphs["reasoner"].calls(ops.QUANTIZE)) == 2 * len(everywhere(model))


def test_it_costs_one_rounding_and_onnx_runtime_computes_the_same(model: Tiny) -> None:
    program = rewritten(model, *everywhere(model))
    exact, found = model.run(model.program), model.run(program)
    for name, value in found.items():
        if value.numel():
            assert 1e-5 < distance(value, exact[name]) < 0.03, name
    assert_close(model.run_onnx(program), found, 1e-5)


def test_attention_in_fp8_rounds_the_same_numbers_once(model: Tiny) -> None:
    """One scale for all keys: what was rounded on the way is not rounded again."""
    alone = rewritten(model, core="fp8-attention", prefix=False)
    both = rewritten(model, *everywhere(model), core="fp8-attention")
    expected, found = model.run(alone), model.run(both)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_what_cannot_be_done_is_said(model: Tiny, tmp_path: Path) -> None:
    program = model.assigned(asked(0))
    with pytest.raises(UserError, match="q_amax of attention in layer 0") as caught:
        QuantizePrefix(Ranges()).run(program)
    assert caught.value.code == "CX312"
    body = program.graphs["generator"]
    first = body.calls(ops.JOINT_ATTENTION)[0]
    doubled = body.call(torch.ops.aten.add.Tensor, first.args[3], first.args[3], before=first)
    first.args = (*first.args[:3], doubled, *first.args[4:])
    with pytest.raises(CannotApply, match="does not come from the reasoner as it is"):
        QuantizePrefix(ranges_of(model)).run(program)
