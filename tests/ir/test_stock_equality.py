"""The program, captured and after every pass, computes what the stock forward computes; so does ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_cosmos import (
    BACKBONES,
    CASES,
    Case,
    assert_close,
    cases_for,
    distance,
    request,
    stock_forward,
    stock_forward_fp64,
)

from cosmos_export.ir.interpreter import run_program
from cosmos_export.ir.program import Program
from cosmos_export.passes.pipeline import CAPTURE, default_passes
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.weights import Stored

PAIRS = [(b, c) for b in BACKBONES for c in cases_for(b)]


def test_the_cases_cover_what_the_law_quantifies_over() -> None:
    assert {c.frames for c in CASES} >= {1, 5, 17}
    assert any(c.height % 2 and c.width % 2 for c in CASES)
    assert {c.height % 2 for c in CASES} == {c.width % 2 for c in CASES} == {0, 1}
    assert min(c.prompt for c in CASES) == 1 and max(c.prompt for c in CASES) >= 300
    modes = {"t2i", "t2v", "i2v", "v2v", "policy", "forward_dynamics", "inverse_dynamics", "sound"}
    assert {c.mode for c in CASES} >= modes


@pytest.mark.parametrize("stage", [CAPTURE, *(one.name for one in default_passes())])
@pytest.mark.parametrize(("backbone", "case"), PAIRS, ids=[f"{b}-{c}" for b, c in PAIRS])
def test_program_equals_the_stock_forward(compile_tiny: Any, backbone: str, case: Case, stage: str) -> None:
    """fp32, relative L2 ≤ 1e-5, for every output, mode, shape and pass."""
    compiled = compile_tiny(backbone)
    inputs = request(compiled.config, case)
    outputs = run_program(compiled.stages[stage], inputs, compiled.weights)
    assert_close(outputs, stock_forward(compiled.model, inputs), 1e-5, f"{backbone} {case} after {stage}")


@pytest.mark.parametrize(("backbone", "case"), PAIRS, ids=[f"{b}-{c}" for b, c in PAIRS])
def test_clean_rows_have_exactly_no_velocity(compile_tiny: Any, backbone: str, case: Case) -> None:
    compiled = compile_tiny(backbone)
    outputs = run_program(compiled.final, request(compiled.config, case), compiled.weights)
    assert outputs["vision_velocity"][:, :, list(case.clean)].count_nonzero() == 0
    assert outputs["action_velocity"][list(case.clean_actions)].count_nonzero() == 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_shifted_angles_are_no_less_exact_than_the_stock_ones(compile_tiny: Any, backbone: str) -> None:
    """Against the stock forward in fp64, angles included, both fp32 runs round: the stock one the angles of generated
    rows near 15,000, ours those of the prompt. Over all requests ours is nearer (measured 0.54 and 0.64 of the stock
    distance); the worst single one, seven generated rows after 310 of the prompt, has 1.54.
    """
    compiled = compile_tiny(backbone)
    ours_squared = stock_squared = 0.0
    for case in cases_for(backbone):
        inputs = request(compiled.config, case)
        exact = stock_forward_fp64(compiled.model, inputs)
        ours = run_program(compiled.stages["shift_rope"], inputs, compiled.weights)
        for name, stock in stock_forward(compiled.model, inputs).items():
            own, theirs = distance(ours[name], exact[name]), distance(stock, exact[name])
            assert own <= 2 * theirs, f"{case} `{name}`: {own:.2e} from fp64, the stock fp32 run is {theirs:.2e}"
            ours_squared, stock_squared = ours_squared + own**2, stock_squared + theirs**2
    assert ours_squared <= stock_squared


# -- ONNX Runtime -----------------------------------------------------------------------------------------------------


def sessions(program: Program, weights: Any, folder: Path) -> dict[str, onnxruntime.InferenceSession]:
    """A session for every graph of ``program``, over one file of all its weights."""
    stored, chunks, offset = {}, [], 0
    for graph in program.graphs.values():
        for node in graph.weights.values():
            binding = node.meta["weight"]
            if binding not in stored:
                data = weights(binding).contiguous().numpy().tobytes()
                stored[binding] = Stored(offset, len(data))
                chunks.append(data)
                offset += len(data)
    (folder / "weights.bin").write_bytes(b"".join(chunks))
    found = {}
    for name, graph in program.graphs.items():
        path = folder / f"{name}.onnx"
        path.write_bytes(lower(graph, stored, "weights.bin").SerializeToString())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        found[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return found


def run_sessions(
    program: Program, found: dict[str, onnxruntime.InferenceSession], inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The graphs in order, chained through the program's edges."""
    results: dict[str, dict[str, np.ndarray]] = {}
    for name, session in found.items():
        fed = {e.input: results[e.source][e.output] for e in program.edges_into(name)}
        fed |= {i: inputs[i].numpy() for i in program.free_inputs(name)}
        outputs = [o.name for o in session.get_outputs()]
        results[name] = dict(zip(outputs, session.run(outputs, fed), strict=True))
    return {k: torch.from_numpy(np.array(v)) for k, v in results[program.loop.body].items()}


@pytest.mark.parametrize("stage", ["split_towers", "fuse_joint_attention"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_onnx_runtime_equals_the_stock_forward(compile_tiny: Any, backbone: str, stage: str, tmp_path: Path) -> None:
    """Every lowered graph, chained; relative L2 ≤ 1e-4 (measured ≤ 5e-6)."""
    compiled = compile_tiny(backbone)
    program = compiled.stages[stage]
    found = sessions(program, compiled.weights, tmp_path)
    for case in cases_for(backbone):
        inputs = request(compiled.config, case)
        outputs = run_sessions(program, found, inputs)
        assert_close(outputs, stock_forward(compiled.model, inputs), 1e-4, f"{backbone} {case} after {stage}")
