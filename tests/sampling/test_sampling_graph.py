"""The sampler's graph computes what the numpy steps and the published pipeline compute, here and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from published_schedules import EDGE, FOUR_STEP, GRID_CASES, NANO, published, schedule

from cosmos_export.ir.dims import evaluate, symbol
from cosmos_export.ir.graph import Graph, infer, spec_of
from cosmos_export.ir.interpreter import run_graph
from cosmos_export.ir.spec import TensorSpec, WeightBinding
from cosmos_export.passes.sampler import COEFFICIENTS, MASKS, carried_state, sampler_graph
from cosmos_export.sampling import (
    Schedule,
    SolverState,
    coefficient_table,
    distilled_step,
    guide,
    resolve_schedule,
    unipc_step,
)
from cosmos_export.targets import load_target
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.trt.tensorrt_rtx import build_engine

Tensors = dict[str, torch.Tensor]
Run = Callable[[Tensors], Tensors]

FRAMES, HEIGHT, WIDTH, SOUND, ACTION = 3, 4, 6, 5, 7
COLUMNS = 6
"""Columns that the embodiment uses, of 8."""


def latents(dtype: torch.dtype = torch.float32) -> dict[str, TensorSpec]:
    """As the captured step has them."""
    frames, height, width, sound, action = map(symbol, ("frames", "height", "width", "sound_len", "action_len"))
    return {
        "vision": TensorSpec(dtype, (1, 4, frames, height, width)),
        "sound": TensorSpec(dtype, (6, sound)),
        "action": TensorSpec(dtype, (action, 8)),
    }


SIZES = {"vision": (1, 4, FRAMES, HEIGHT, WIDTH), "sound": (6, SOUND), "action": (ACTION, 8)}
NOISY = {
    "vision_mask": torch.tensor([0.0, 1, 1]),
    "action_mask": torch.tensor([0.0, 1, 1, 1, 1, 1, 1]),
    "action_columns": (torch.arange(8) < COLUMNS).float(),
}
"""An image and a robot state given, and an embodiment narrower than the action head."""


def no_weights(_: WeightBinding) -> torch.Tensor:
    raise AssertionError


def interpreted(graph: Graph) -> Run:
    return lambda inputs: run_graph(graph, inputs, no_weights)


def in_onnx_runtime(graph: Graph) -> Run:
    model = lower(graph, {}, "none.bin", compute=torch.float32)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(inputs: Tensors) -> Tensors:
        results = session.run(None, {name: inputs[name].float().numpy() for name in graph.inputs})
        return dict(zip(graph.outputs, map(torch.from_numpy, results), strict=True))

    return run


class Request:
    """Start values and the velocities of each step, the same for every implementation."""

    def __init__(self, steps: int, dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(0)

        def draw(name: str) -> torch.Tensor:
            return torch.randn(SIZES[name], generator=random)

        self.start = {name: draw(name) for name in SIZES}
        self.start["action"] *= NOISY["action_columns"]
        self.steps = [
            {f"{name}_{kind}": draw(name).to(dtype) for name in SIZES for kind in ("velocity_cond", "velocity_uncond")}
            for _ in range(steps)
        ]
        self.noise = [{f"{name}_noise": draw(name) for name in SIZES} for _ in range(steps)]
        self.masks = {name: mask.to(dtype) for name, mask in NOISY.items()}


def drive(plan: Schedule, request: Request, steps: Mapping[bool, Run], graphs: Mapping[bool, Graph]) -> Tensors:
    """The loop: the graph for guided or for unguided steps, fed with its own outputs."""
    carried = carried_state(plan, latents())
    state = {name: torch.zeros(SIZES[name.partition("_")[0]]) for name in carried}
    state |= {f"{name}_sample": start for name, start in request.start.items()}
    table = torch.from_numpy(coefficient_table(plan)).float()
    for i, guided in enumerate(plan.guided):
        inputs = {COEFFICIENTS: table[i], **state, **request.steps[i], **request.noise[i], **request.masks}
        results = steps[guided]({name: inputs[name] for name in graphs[guided].inputs})
        state = {name: results[result] for name, result in carried.items()}
    return {name: state[f"{name}_sample"] for name in SIZES}


def on(make: Callable[[Graph], Run], plan: Schedule, request: Request, dtype: torch.dtype = torch.float32) -> Tensors:
    graphs = {guided: sampler_graph(plan, latents(dtype), guided=guided) for guided in set(plan.guided)}
    return drive(plan, request, {guided: make(graph) for guided, graph in graphs.items()}, graphs)


def noisy_part(name: str) -> torch.Tensor:
    mask = torch.ones(())
    for axis, key in MASKS.get(name, {}).items():
        mask = mask * NOISY[key].reshape([-1 if i == axis else 1 for i in range(len(SIZES[name]))])
    return mask


def in_numpy(plan: Schedule, request: Request) -> Tensors:
    found = {}
    for name, start in request.start.items():
        state, noisy = SolverState.start(start.numpy()), noisy_part(name).numpy()
        for i, row in enumerate(coefficient_table(plan)):
            cond, uncond = (
                request.steps[i][f"{name}_{kind}"].float().numpy() for kind in ("velocity_cond", "velocity_uncond")
            )
            velocity = guide(cond, uncond if plan.guided[i] else None, row[0])
            if plan.sampler == "unipc":
                state = unipc_step(row, state, velocity, noisy)
            else:
                noise = request.noise[i][f"{name}_noise"].numpy()
                state = SolverState.start(distilled_step(row, state.sample, velocity, noise, noisy))
        found[name] = torch.from_numpy(state.sample)
    return found


def in_the_pipeline(checkpoint: Any, plan: Schedule, request: Request) -> Tensors:
    """The update of the published pipeline: velocities masked in their type, guidance in float32, a scheduler each."""
    found = {}
    for name, start in request.start.items():
        scheduler, sample, noisy = published(checkpoint, plan.steps), start.clone(), noisy_part(name)
        for i, timestep in enumerate(scheduler.timesteps):
            cond, uncond = (
                (value * noisy.to(value.dtype)).float()
                for value in (request.steps[i][f"{name}_{kind}"] for kind in ("velocity_cond", "velocity_uncond"))
            )
            velocity = uncond + plan.guidance * (cond - uncond) if plan.guided[i] else cond
            stepped = scheduler.step(velocity.unsqueeze(0), timestep, sample.unsqueeze(0), return_dict=False)
            sample = stepped[0].squeeze(0)
            if name == "action":
                sample[:, COLUMNS:] = 0
        found[name] = sample
    return found


def worst(a: Tensors, b: Tensors) -> float:
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in SIZES)


# ---------------------------------------------------------------------------------------------------------------------
# Equality over whole loops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", GRID_CASES)
def test_the_graph_is_the_numpy_step_and_the_published_pipeline(case: str, dtype: torch.dtype) -> None:
    """Measured over all: 0 from numpy, 2e-6 from the pipeline: 35 float32 steps with velocities unlike each other."""
    plan, request = schedule(GRID_CASES[case], 35), Request(35, dtype)
    found = on(interpreted, plan, request, dtype)
    assert worst(found, in_numpy(plan, request)) < 1e-6
    assert worst(found, in_the_pipeline(GRID_CASES[case], plan, request)) < 5e-6


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps(steps: int) -> None:
    plan, request = schedule(EDGE, steps), Request(steps)
    found = on(interpreted, plan, request)
    assert worst(found, in_the_pipeline(EDGE, plan, request)) < 1e-6


def test_steps_outside_the_interval_run_one_branch() -> None:
    plan, request = schedule(NANO, 20, "t2i"), Request(20)
    assert set(plan.guided) == {True, False}
    found = on(interpreted, plan, request)
    assert worst(found, in_the_pipeline(NANO, plan, request)) < 3e-6
    assert worst(found, in_numpy(plan, request)) < 1e-6


def test_the_distilled_graph_is_the_numpy_step() -> None:
    plan, request = resolve_schedule(FOUR_STEP, "i2v"), Request(4)
    found = on(interpreted, plan, request)
    assert worst(found, in_numpy(plan, request)) < 1e-6


@pytest.mark.parametrize("checkpoint", [NANO, FOUR_STEP], ids=["unipc", "distilled"])
def test_clean_rows_and_unused_columns_stay_bit_for_bit(checkpoint: Any) -> None:
    plan = resolve_schedule(checkpoint, "t2i")
    request = Request(plan.steps)
    found = on(interpreted, plan, request)
    for name, start in request.start.items():
        held = (noisy_part(name) == 0).expand(start.shape)
        assert torch.equal(found[name][held], start[held])
        assert not (found[name][~held] == start[~held]).any()
    assert not found["action"][:, COLUMNS:].any()


# ---------------------------------------------------------------------------------------------------------------------
# The graph itself, and what it lowers to


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("checkpoint", "mode"), [(NANO, "t2i"), (EDGE, "t2v"), (FOUR_STEP, "i2v")], ids=["interval", "guided", "distilled"]
)
def test_onnx_runtime(checkpoint: Any, mode: str, dtype: torch.dtype) -> None:
    plan = resolve_schedule(checkpoint, mode)
    request = Request(plan.steps, dtype)
    assert worst(on(in_onnx_runtime, plan, request, dtype), on(interpreted, plan, request, dtype)) <= 1e-6


@pytest.mark.parametrize("checkpoint", [NANO, FOUR_STEP], ids=["unipc", "distilled"])
def test_an_engine_builds(checkpoint: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    plan = resolve_schedule(checkpoint, "t2v")
    graph = sampler_graph(plan, latents(torch.bfloat16), guided=any(plan.guided))
    onnx.save(lower(graph, {}, "none.bin"), tmp_path / "sampler.onnx")
    dims = {"frames": 48, "height": 44, "width": 80, "sound_len": 197, "action_len": 60}
    shapes = {name: tuple(evaluate(s, dims) for s in spec_of(node).shape) for name, node in graph.inputs.items()}
    profile = {name: (shape, shape, shape) for name, shape in shapes.items() if name != COEFFICIENTS}
    report = build_engine(
        tmp_path / "sampler.onnx", tmp_path / "engine", target=load_target("rtx-pro-6000"), profiles=[profile]
    )
    assert not report.warnings and {tensor.name for tensor in report.outputs} == set(graph.outputs)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("checkpoint", [NANO, FOUR_STEP], ids=["unipc", "distilled"])
def test_contract(checkpoint: Any, guided: bool) -> None:
    plan, specs = resolve_schedule(checkpoint, "t2v"), latents(torch.bfloat16)
    graph = sampler_graph(plan, specs, guided=guided)
    carried = carried_state(plan, specs)
    assert list(graph.outputs) == list(carried.values())
    assert all(spec_of(graph.inputs[name]) == spec_of(graph.outputs[result]) for name, result in carried.items())
    assert not graph.weights and not graph.constants and graph.misplaced() is None
    for node in graph.calls():
        assert infer(node.target, node.args, node.kwargs) == spec_of(node)
    read = {name for name, node in graph.inputs.items() if node.users}
    assert read == set(graph.inputs), "an input that nothing reads"
    assert ("vision_velocity_uncond" in graph.inputs) == guided
    assert graph.inputs.keys() >= {COEFFICIENTS, "vision_mask", "action_mask", "action_columns"}
    assert str(spec_of(graph.inputs["vision_velocity_cond"])) == "bfloat16[1, 4, frames, height, width]"
    assert str(spec_of(graph.inputs["vision_sample"])) == "float32[1, 4, frames, height, width]"


def test_one_graph_serves_every_schedule_of_its_sampler() -> None:
    def text(plan: Schedule) -> str:
        return str(sampler_graph(plan, latents(), guided=True).fx)

    assert text(schedule(NANO, 35)) == text(schedule(EDGE, 4, guidance=2.0))


def test_vision_alone_has_no_inputs_of_others() -> None:
    graph = sampler_graph(resolve_schedule(NANO, "t2v"), {"vision": latents()["vision"]}, guided=True)
    assert all(name == COEFFICIENTS or name.startswith("vision_") for name in graph.inputs)


def test_nan_in_a_velocity_reaches_the_sample() -> None:
    """It must not be masked away before anyone can look."""
    plan, request = schedule(NANO, 2), Request(2)
    request.steps[0]["sound_velocity_cond"][0, 0] = float("nan")
    found = on(interpreted, plan, request)["sound"]
    assert np.isnan(found.numpy()).sum() == 1
