"""Law: the loop as one graph = the loop on the host, with the stock model and the published schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from tiny_cosmos import Case, Compiled, Tensors, request, stock_forward

from cosmos_export.compiler.forms import close_loop
from cosmos_export.compiler.loop import loop_tables
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.family import Family
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import run_graph, run_loop, run_program
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightBinding
from cosmos_export.ir.text import print_program
from cosmos_export.passes.fuse_denoise_loop import FuseDenoiseLoop
from cosmos_export.sampling import (
    CheckpointSampling,
    Overrides,
    Schedule,
    Segment,
    SolverState,
    coefficient_table,
    guide,
    resolve_schedule,
    unipc_step,
)
from cosmos_export.targets.onnx.loop import lower_loop
from cosmos_export.targets.onnx.weights import Stored, numpy_dtype

SCHEDULER: dict[str, Any] = {
    "use_karras_sigmas": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "sigma_max": 200.0,
    "sigma_min": 0.147,
}  # fmt: skip
EDGE_SCHEDULER: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CASE = Case("everything", 3, 5, 6, 9, clean=(0,), sound=4, actions=5, clean_actions=(1,))
NEGATIVE_IDS = torch.arange(11, 34)


def schedule(steps: int = 5, guidance: float = 6.0, **changes: Any) -> Schedule:
    sampling = CheckpointSampling({"_class_name": "UniPCMultistepScheduler", **SCHEDULER})
    return resolve_schedule(sampling, "t2v", Overrides(steps=steps, guidance=guidance, **changes))


def edge_schedule(steps: int, interval: tuple[float, float]) -> Schedule:
    """Edge's own grid."""
    sampling = CheckpointSampling(
        {"_class_name": "UniPCMultistepScheduler", **EDGE_SCHEDULER}, True, family=Family.EDGE
    )
    return resolve_schedule(sampling, "policy", Overrides(steps=steps, guidance=3.0, guidance_interval=interval))


def published_scheduler(plan: Schedule) -> UniPCMultistepScheduler:
    """diffusers' scheduler, its timesteps set as its pipeline sets them."""
    if plan.grid == "karras":
        scheduler = UniPCMultistepScheduler(**SCHEDULER)
        scheduler.set_timesteps(plan.steps)
    else:
        scheduler = UniPCMultistepScheduler(**EDGE_SCHEDULER)
        scheduler.set_timesteps(plan.steps, sigmas=np.linspace(1 - 1 / 1000, 0, plan.steps + 1)[:-1])
    return scheduler


def closed(compiled: Compiled, plan: Schedule) -> Program:
    """The closed loop of a schedule that is one segment."""
    (program,) = close_loop(compiled.final, plan).values()
    return program


def case_of(compiled: Compiled) -> Case:
    return (
        CASE if compiled.config["sound_gen"] else Case("policy", 3, 5, 6, 9, clean=(0,), actions=5, clean_actions=(1,))
    )


def tables(compiled: Compiled, program: Program, plan: Schedule) -> dict[str, np.ndarray]:
    return loop_tables(program, plan, compiled.weights)


def loop_inputs(compiled: Compiled, program: Program, inputs: Tensors) -> Tensors:
    """What the loop takes: the results of the graphs before it, masks and the initial noise."""
    reasoner, conditioning = program.graphs["reasoner"], program.graphs["conditioning"]
    binding = {"frames": 3, "height": 5, "width": 6, "sound_len": 4, "action_len": 5}
    own = {n: inputs[n] for n in conditioning.inputs}
    known = run_graph(reasoner, {"input_ids": inputs["input_ids"]}, compiled.weights)
    negative = run_graph(reasoner, {"input_ids": NEGATIVE_IDS}, compiled.weights)
    known |= {f"negative_{k}": v for k, v in negative.items()}
    known |= run_graph(conditioning, own, compiled.weights, binding)
    known |= {f"{n.removesuffix('_latent')}_sample": v for n, v in inputs.items() if n.endswith("_latent")}
    known |= {n: v for n, v in inputs.items() if n.endswith("_mask")}
    known["action_columns"] = torch.ones(compiled.config["action_dim"])
    return {n: known[n] for n in program.graphs[program.loop.body].inputs if n in known}


def published_loop(compiled: Compiled, inputs: Tensors, plan: Schedule) -> Tensors:
    """The stock forward under diffusers' scheduler, one for each modality, as its pipeline has them."""
    names = [n.removesuffix("_latent") for n in inputs if n.endswith("_latent")]
    latents = {n: inputs[f"{n}_latent"] for n in names}
    schedulers = {n: published_scheduler(plan) for n in names}
    for t, guided in zip(schedulers["vision"].timesteps, plan.guided, strict=True):
        step = inputs | {f"{n}_latent": latents[n] for n in names} | {"timestep": torch.tensor([float(t)])}
        cond = stock_forward(compiled.model, step)
        negative = stock_forward(compiled.model, step | {"input_ids": NEGATIVE_IDS}) if guided else cond
        for n in names:
            u, c = negative[f"{n}_velocity"], cond[f"{n}_velocity"]
            velocity = u + plan.guidance * (c - u) if guided else c
            latents[n] = schedulers[n].step(velocity, t, latents[n], return_dict=False)[0]
    return latents


def host_loop(compiled: Compiled, inputs: Tensors, plan: Schedule) -> Tensors:
    """The program's own step, guidance and sampler on the host: one step a call, one branch a run."""
    names = [n.removesuffix("_latent") for n in inputs if n.endswith("_latent")]
    states = {n: SolverState.start(inputs[f"{n}_latent"].numpy()) for n in names}
    rate = {"vision": (1, 1, -1, 1, 1), "action": (-1, 1)}
    noisy = {n: inputs[f"{n}_mask"].view(shape).numpy() for n, shape in rate.items()}
    for row, t, guided in zip(coefficient_table(plan), plan.timesteps, plan.guided, strict=True):
        latents = {f"{n}_latent": torch.from_numpy(s.sample) for n, s in states.items()}
        step = {**inputs, **latents, "timestep": torch.tensor([t])}
        cond = run_program(compiled.final, step, compiled.weights)
        uncond = run_program(compiled.final, step | {"input_ids": NEGATIVE_IDS}, compiled.weights) if guided else {}
        for n in names:
            c, u = cond[f"{n}_velocity"].numpy(), uncond.get(f"{n}_velocity")
            velocity = guide(c, None if u is None else u.numpy(), plan.guidance)
            states[n] = unipc_step(row, states[n], velocity, noisy.get(n))
    return {n: torch.from_numpy(s.sample) for n, s in states.items()}


def run_segments(compiled: Compiled, segments: dict[str, Program], inputs: Tensors, plan: Schedule) -> Tensors:
    """One loop after the other in the interpreter, each on what the one before returned."""
    state: Tensors = {}
    for program in segments.values():
        rows = {n: torch.from_numpy(v) for n, v in tables(compiled, program, plan).items()}
        known = loop_inputs(compiled, program, inputs) | state
        state = run_loop(program, known, rows, compiled.weights)
    return {n.removesuffix("_sample"): v for n, v in state.items()}


def run_onnx(model: onnx.ModelProto, folder: Path, inputs: Tensors) -> dict[str, torch.Tensor]:
    path = folder / "denoise.onnx"
    onnx.save(model, path)
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    found = session.run(names, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
    return {n.removesuffix("_final"): torch.from_numpy(v) for n, v in zip(names, found, strict=True)}


def write(compiled: Compiled, program: Program, folder: Path) -> dict[WeightBinding, Stored]:
    """Weights beside the model; they come from a module here, so the file is written from its values."""
    stored: dict[WeightBinding, Stored] = {}
    with (folder / "loop.weights").open("wb") as file:
        for node in program.graphs[program.loop.body].weights.values():
            binding = node.meta["weight"]
            data = compiled.weights(binding).contiguous().numpy().astype(numpy_dtype(binding.dtype)).tobytes()
            stored[binding] = Stored(file.tell(), len(data))
            file.write(data)
    return stored


@pytest.mark.parametrize("guidance", [6.0, 1.0])
def test_the_loop_equals_the_published_pipeline(compiled: Compiled, guidance: float, tmp_path: Path) -> None:
    plan = schedule(guidance=guidance)
    program = closed(compiled, plan)
    inputs = request(compiled.config, case_of(compiled))
    rows = tables(compiled, program, plan)
    known = loop_inputs(compiled, program, inputs)
    expected = published_loop(compiled, inputs, plan)

    found = run_loop(program, known, {n: torch.from_numpy(v) for n, v in rows.items()}, compiled.weights)
    model = lower_loop(
        program.graphs["generator"], program.loop, rows, write(compiled, program, tmp_path), "loop.weights"
    )
    lowered = run_onnx(model, tmp_path, known)
    for name, latent in expected.items():
        scale = latent.norm()
        assert (found[f"{name}_sample"] - latent).norm() / scale <= 1e-4
        assert (lowered[f"{name}_sample"] - latent).norm() / scale <= 1e-4
        assert (lowered[f"{name}_sample"] - found[f"{name}_sample"]).norm() / scale <= 1e-5


def test_explicit_attention_is_attention(omni: Compiled, tmp_path: Path) -> None:
    plan = schedule(steps=2)
    program = closed(omni, plan)
    inputs = loop_inputs(omni, program, request(omni.config, CASE))
    graph, rows, stored = program.graphs["generator"], tables(omni, program, plan), write(omni, program, tmp_path)
    results = []
    for explicit in (False, True):
        model = lower_loop(graph, program.loop, rows, stored, "loop.weights", explicit_attention=explicit)
        (loop,) = [n for n in model.graph.node if n.op_type == "Loop"]
        kinds = {n.op_type for n in loop.attribute[0].g.node}
        assert ("Softmax" in kinds, "Attention" in kinds) == (explicit, not explicit)
        results.append(run_onnx(model, tmp_path, inputs))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-5)


def test_the_loop_counts_and_nothing_constant_is_in_it(omni: Compiled, tmp_path: Path) -> None:
    """No condition input and a constant trip count, or a CUDA graph cannot capture it."""
    plan = schedule(steps=7)
    program = closed(omni, plan)
    model = lower_loop(
        program.graphs["generator"], program.loop, tables(omni, program, plan), write(omni, program, tmp_path), "w"
    )
    (loop,) = [n for n in model.graph.node if n.op_type == "Loop"]
    assert loop.input[1] == ""
    (trips,) = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == loop.input[0]]
    assert trips == 7
    inside = {n.op_type for n in loop.attribute[0].g.node}
    assert not inside & {"Shape", "Range", "ConstantOfShape", "Cos", "Sin"}


def test_clean_rows_stay_what_they_are(omni: Compiled) -> None:
    plan = schedule(steps=3)
    program = closed(omni, plan)
    inputs = request(omni.config, CASE)
    rows = {n: torch.from_numpy(v) for n, v in tables(omni, program, plan).items()}
    found = run_loop(program, loop_inputs(omni, program, inputs), rows, omni.weights)
    assert torch.equal(found["vision_sample"][:, :, 0], inputs["vision_latent"][:, :, 0])
    assert torch.equal(found["action_sample"][1], inputs["action_latent"][1])
    assert not torch.equal(found["vision_sample"][:, :, 1], inputs["vision_latent"][:, :, 1])


INTERVALS = {
    "t2i": ("omni", schedule(8, 7.0, guidance_interval=(400.0, 1000.0)), (7, 1)),
    "both-ends": ("omni", schedule(8, guidance_interval=(500.0, 900.0)), (4, 2, 2)),
    "droid": ("edge", edge_schedule(4, (960.0, 1001.0)), (1, 3)),
}
"""Backbone, schedule, and the steps of its segments."""
every_interval = pytest.mark.parametrize(("backbone", "plan", "steps"), INTERVALS.values(), ids=INTERVALS)


@every_interval
def test_the_chain_of_segments_equals_the_loop_on_the_host(
    compile_tiny: Any, backbone: str, plan: Schedule, steps: tuple[int, ...], tmp_path: Path
) -> None:
    """And diffusers' pipeline, which leaves the unconditional pass out where the step is not in the interval."""
    compiled = compile_tiny(backbone)
    segments = close_loop(compiled.final, plan)
    assert tuple(p.loop.steps for p in segments.values()) == steps
    inputs = request(compiled.config, case_of(compiled))
    found = run_segments(compiled, segments, inputs, plan)
    host, expected = host_loop(compiled, inputs, plan), published_loop(compiled, inputs, plan)

    state: Tensors = {}
    for program in segments.values():
        rows, stored = tables(compiled, program, plan), write(compiled, program, tmp_path)
        model = lower_loop(program.graphs["generator"], program.loop, rows, stored, "loop.weights")
        assert [o.name for o in model.graph.output] == [f"{n}_final" for n in program.loop.returned]
        state = run_onnx(model, tmp_path, loop_inputs(compiled, program, inputs) | state)
    for name, latent in expected.items():
        scale = latent.norm()
        assert (found[name] - latent).norm() / scale <= 1e-4
        assert (found[name] - host[name]).norm() / scale <= 1e-6
        assert (state[f"{name}_sample"] - found[name]).norm() / scale <= 1e-5


@every_interval
def test_segments_share_weights_and_hand_the_whole_state_on(
    compile_tiny: Any, backbone: str, plan: Schedule, steps: tuple[int, ...]
) -> None:
    compiled = compile_tiny(backbone)
    segments = close_loop(compiled.final, plan)
    assert list(segments) == [f"denoise_{i}" for i in range(1, len(steps) + 1)]
    own = {n.meta["weight"] for n in compiled.final.graphs["generator"].weights.values()}
    everything = tuple(n for n in segments["denoise_1"].loop.carried)
    samples = tuple(n for n in everything if n.endswith("_sample"))
    assert len(everything) == 4 * len(samples)
    for program, segment in zip(segments.values(), plan.segments, strict=True):
        body, loop = program.graphs["generator"], program.loop
        assert {n.meta["weight"] for n in body.weights.values()} == own
        assert loop.taken == (everything if segment.start else samples)
        assert loop.returned == (samples if segment == plan.segments[-1] else everything)
        assert any(name.startswith("negative_") for name in body.inputs) == segment.guided
        assert any(e.instance for e in program.edges) == segment.guided


def test_state_that_is_not_handed_on_is_missed(omni: Compiled) -> None:
    """Neither the reference nor the model begins a later segment with zeros of its own accord."""
    _, plan, _ = INTERVALS["t2i"]
    program = close_loop(omni.final, plan)["denoise_2"]
    known = loop_inputs(omni, program, request(omni.config, CASE))
    rows = {n: torch.from_numpy(v) for n, v in tables(omni, program, plan).items()}
    with pytest.raises(ValueError, match="vision_last"):
        run_loop(program, known, rows, omni.weights)


def test_segments_of_a_stochastic_sampler_take_noise_for_their_own_steps(omni: Compiled, tmp_path: Path) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True, "shift": 1.0}
    plan = resolve_schedule(CheckpointSampling(config, False, (1.0, 0.9, 0.8, 0.6)), "i2v")
    inputs = request(omni.config, Case("i2v", 3, 5, 6, 9, clean=(0,)))
    whole = closed(omni, plan)
    known = loop_inputs(omni, whole, inputs)
    noise = {n: torch.randn(4, *known[n.replace("_noise", "_sample")].shape) for n in whole.loop.rows if "noise" in n}
    rows = {n: torch.from_numpy(v) for n, v in tables(omni, whole, plan).items()}
    expected = run_loop(whole, known, rows | noise, omni.weights)
    state: Tensors = {}
    for segment in (Segment(0, 1, guided=False), Segment(1, 3, guided=False)):
        program = omni.final.copy()
        FuseDenoiseLoop(plan, segment).run(program)
        own = {n: v[program.loop.span] for n, v in noise.items()}
        model = lower_loop(
            program.graphs["generator"], program.loop, tables(omni, program, plan), write(omni, program, tmp_path),
            "loop.weights",
        )  # fmt: skip
        dims = {i.name: i.type.tensor_type.shape.dim[0].dim_value for i in model.graph.input}
        assert dims["vision_noise"] == segment.steps
        state = run_onnx(model, tmp_path, known | own | state)
    assert (state["vision_sample"] - expected["vision_sample"]).norm() / expected["vision_sample"].norm() <= 1e-5


def test_a_guided_segment_needs_both_branches(omni: Compiled) -> None:
    plan = schedule()
    with pytest.raises(UnsupportedError, match="one branch"):
        FuseDenoiseLoop(plan, plan.segments[0]).run(omni.final.copy())


def test_twice_is_once(omni: Compiled) -> None:
    plan = schedule()
    program = closed(omni, plan)
    text = print_program(program)
    assert not FuseDenoiseLoop(plan, plan.segments[0]).run(program).modified
    assert print_program(program) == text


def test_the_state_is_fp32_whatever_the_model_computes_in(omni: Compiled) -> None:
    program = closed(omni, schedule())
    body = program.graphs[program.loop.body]
    assert {spec_of(body.inputs[n]).dtype for n in program.loop.carried} == {torch.float32}


def test_the_distilled_loop_takes_its_noise_as_an_input(omni: Compiled, tmp_path: Path) -> None:
    """x ← (1 − σ')·x0 + σ'·ε with the checkpoint's own sigmas, one branch, clean frames pinned in every step."""
    sigmas = (1.0, 0.9375, 0.8333333333333334, 0.625)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True, "shift": 1.0}
    plan = resolve_schedule(CheckpointSampling(config, False, sigmas), "i2v")
    program = closed(omni, plan)
    case = Case("i2v", 3, 5, 6, 9, clean=(0,))
    inputs = request(omni.config, case)
    known = loop_inputs(omni, program, inputs)
    body = program.graphs[program.loop.body]
    names = [n for n in body.inputs if n.endswith("_noise")]
    noise = {n: torch.randn(4, *known[n.replace("_noise", "_sample")].shape) for n in names}
    rows = tables(omni, program, plan)

    latent = inputs["vision_latent"]
    for i, sigma in enumerate(sigmas):
        step = inputs | {"vision_latent": latent, "timestep": torch.tensor([sigma * 1000])}
        clean = latent - sigma * stock_forward(omni.model, step)["vision_velocity"]
        following = (*sigmas, 0.0)[i + 1]
        moved = (1 - following) * clean + following * noise["vision_noise"][i]
        mask = inputs["vision_mask"].view(1, 1, -1, 1, 1)
        latent = mask * moved + (1 - mask) * latent

    tensors = {n: torch.from_numpy(v) for n, v in rows.items()}
    found = run_loop(program, known, tensors | noise, omni.weights)["vision_sample"]
    assert (found - latent).norm() / latent.norm() <= 1e-5
    model = lower_loop(body, program.loop, rows, write(omni, program, tmp_path), "loop.weights")
    lowered = run_onnx(model, tmp_path, known | noise)["vision_sample"]
    assert (lowered - latent).norm() / latent.norm() <= 1e-4
