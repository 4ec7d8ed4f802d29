"""The laws: each pass, and the whole, computes the same function another way. This file is the list.

split      ≡  joint               the towers apart compute what they compute together             bitwise
reuse      ≡  recompute           keys and values of one prompt serve every latent and timestep   bitwise
table      ≡  embedder            the schedule's row is the time embedding of its step            bitwise
recognised ≡  primitive           one node for each building block computes its primitives        bitwise
direct     ≡  packed              rows passed on are the rows written to a buffer and read back   1e-6
shifted    ≡  rope                scores follow from differences of positions                     1e-5 in fp32
sliced     ≡  all rows            rows that are read do not depend on which are read              1e-6
merged     ≡  separate            stacked weights are the same products                           1e-6
fused      ≡  joined              full attention does not depend on the order of its keys         1e-6
absent     ≡  no rows             a modality without rows is the model without it                 1e-5 from stock
clean      ≡  no time             a clean row has no time embedding and no velocity               exact
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import captured
from tiny_cosmos import BACKBONES, Case, assert_close, cases_for, request, sources_of_model, stock_forward

from cosmos_export.ir.interpreter import run_graph, run_program
from cosmos_export.ir.program import Program
from cosmos_export.passes.pipeline import default_passes, run_passes

PAIRS = [(b, c) for b in BACKBONES for c in cases_for(b)]
every_case = pytest.mark.parametrize(("backbone", "case"), PAIRS, ids=[f"{b}-{c}" for b, c in PAIRS])


def outputs_of(compiled: Any, case: Case, *stages: str) -> list[dict[str, torch.Tensor]]:
    inputs = request(compiled.config, case)
    return [run_program(compiled.stages[stage], inputs, compiled.weights) for stage in stages]


def assert_bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@every_case
def test_split_is_joint(compile_tiny: Any, backbone: str, case: Case) -> None:
    assert_bitwise(*outputs_of(compile_tiny(backbone), case, "shift_rope", "split_towers"))


@every_case
def test_table_is_embedder(compile_tiny: Any, backbone: str, case: Case) -> None:
    assert_bitwise(*outputs_of(compile_tiny(backbone), case, "split_towers", "fold_schedule"))


@every_case
def test_recognised_is_primitive(compile_tiny: Any, backbone: str, case: Case) -> None:
    before, after = outputs_of(compile_tiny(backbone), case, "capture", "normalize")
    if case.sound:
        # A join of one part goes, and the GEMM of the sound latent reads it transposed: BLAS sums in another order.
        assert_close(after, before, 1e-6)
    else:
        assert_bitwise(before, after)


@every_case
def test_direct_is_packed(compile_tiny: Any, backbone: str, case: Case) -> None:
    """Without the packed buffer; angles are computed for fewer rows at a time, which orders no sum differently."""
    before, after = outputs_of(compile_tiny(backbone), case, "normalize", "resolve_packing")
    assert_close(after, before, 1e-6)


@every_case
def test_shifted_is_rope(compile_tiny: Any, backbone: str, case: Case) -> None:
    before, after = outputs_of(compile_tiny(backbone), case, "resolve_packing", "shift_rope")
    assert_close(after, before, 1e-5)


@every_case
def test_merged_is_separate(compile_tiny: Any, backbone: str, case: Case) -> None:
    before, after = outputs_of(compile_tiny(backbone), case, "slice_outputs", "merge_linears")
    assert_close(after, before, 1e-6)


@every_case
def test_fused_is_joined(compile_tiny: Any, backbone: str, case: Case) -> None:
    before, after = outputs_of(compile_tiny(backbone), case, "merge_linears", "fuse_joint_attention")
    assert_close(after, before, 1e-6)


# -- reuse ------------------------------------------------------------------------------------------------------------


def run_once(program: Program, name: str, inputs: dict[str, torch.Tensor], weights: Any, binding: Any) -> Any:
    graph = program.graphs[name]
    return run_graph(graph, {k: inputs[k] for k in graph.inputs}, weights, binding)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_reuse_is_recompute(compile_tiny: Any, backbone: str) -> None:
    """What the reasoner and the conditioning give for one latent and timestep serves all others, bit for bit."""
    compiled = compile_tiny(backbone)
    program, case = compiled.final, Case("policy", 5, 5, 6, 33, clean=(0,), actions=6)
    first = request(compiled.config, case, seed=1, timestep=995.0)
    binding = {"und_len": 33, "frames": 5, "height": 5, "width": 6, "sound_len": 0, "action_len": 6}
    kept: dict[str, torch.Tensor] = {}
    for name in ("reasoner", "conditioning"):
        kept |= run_once(program, name, first, compiled.weights, binding)
    for seed, timestep in ((2, 995.0), (3, 500.0), (4, 7.0)):
        noise = request(compiled.config, case, seed=seed, timestep=timestep)
        inputs = {**first, **{k: v for k, v in noise.items() if k.endswith("_latent") or k == "timestep"}}
        row = run_once(program, "schedule", inputs, compiled.weights, binding)
        reused = run_once(program, "generator", {**inputs, **kept, **row}, compiled.weights, binding)
        assert_bitwise(reused, run_program(program, inputs, compiled.weights))
        assert_close(reused, stock_forward(compiled.model, inputs), 1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_prompt_serves_every_size_of_video(compile_tiny: Any, backbone: str) -> None:
    compiled = compile_tiny(backbone)
    found = []
    for case in (Case("t2i", 1, 4, 6, 40), Case("t2v", 5, 7, 9, 40)):
        inputs = request(compiled.config, case, seed=5)
        inputs["input_ids"] = torch.arange(40)
        found.append(run_once(compiled.final, "reasoner", inputs, compiled.weights, {"und_len": 40}))
    assert_bitwise(*found)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_row_of_the_schedule_serves_every_request(compile_tiny: Any, backbone: str) -> None:
    compiled = compile_tiny(backbone)
    rows = [
        run_once(compiled.final, "schedule", {"timestep": torch.tensor([t])}, compiled.weights, {})["time_embedding"]
        for t in (437.0, 437.0, 438.0)
    ]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert rows[0].shape == (1, compiled.config["hidden_size"])


# -- slicing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vision_velocity", "sound_velocity", "action_velocity"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_sliced_is_all_rows(compile_tiny: Any, backbone: str, name: str) -> None:
    compiled = compile_tiny(backbone)
    if name not in compiled.final.graphs["generator"].outputs:
        pytest.skip("Edge has no sound")
    program = compiled.captured
    run_passes(program, default_passes({name}))
    for case in cases_for(backbone):
        inputs = request(compiled.config, case)
        whole = run_program(compiled.final, inputs, compiled.weights)
        sliced = run_program(program, inputs, compiled.weights)
        assert sliced.keys() == {name}
        assert_close(sliced, {name: whole[name]}, 1e-6, str(case))


# -- absence ----------------------------------------------------------------------------------------------------------


def test_absent_is_no_rows(omni: Any) -> None:
    """A program captured without sound and action equals the full program with no rows of them, and the stock model."""
    program = captured(omni.config, sources_of_model(omni.model), modalities=["vision"])
    run_passes(program, default_passes())
    assert list(program.graphs["generator"].outputs) == ["vision_velocity"]
    for case in (Case("t2i", 1, 5, 4, 1), Case("v2v", 5, 4, 5, 17, clean=(0, 1))):
        inputs = request(omni.config, case)
        full = run_program(omni.final, inputs, omni.weights)
        alone = run_program(program, inputs, omni.weights)
        assert_close(alone, {"vision_velocity": full["vision_velocity"]}, 1e-6)
        assert_close(alone, stock_forward(omni.model, inputs), 1e-5)


# -- clean rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["capture", "fuse_joint_attention"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_request_of_clean_rows_knows_no_time(compile_tiny: Any, backbone: str, stage: str) -> None:
    """Forward dynamics: actions are clean, so their rows do not change with the timestep; only noisy frames do."""
    compiled = compile_tiny(backbone)
    everything = Case("all clean", 3, 4, 5, 9, clean=(0, 1, 2), actions=4, clean_actions=(0, 1, 2, 3))
    for t in (3.0, 900.0):
        outputs = run_program(
            compiled.stages[stage], request(compiled.config, everything, timestep=t), compiled.weights
        )
        assert all(value.count_nonzero() == 0 for value in outputs.values())
    moving = Case("one noisy", 3, 4, 5, 9, clean=(0, 1))
    a, b = (
        run_program(compiled.stages[stage], request(compiled.config, moving, timestep=t), compiled.weights)
        for t in (3.0, 900.0)
    )
    assert not torch.equal(a["vision_velocity"][:, :, 2], b["vision_velocity"][:, :, 2])
