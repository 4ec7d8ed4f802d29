"""Law: the loop as one graph = the loop on the host, with the stock model and the published schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Compiled
from diffusers import UniPCMultistepScheduler
from tiny_cosmos import Case, Tensors, request, stock_forward

from cosmos_export.build.schedule import schedule_table
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import run_graph, run_loop
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightBinding
from cosmos_export.ir.text import print_program
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.batch_guidance import BatchGuidance
from cosmos_export.passes.fuse_denoise_loop import FuseDenoiseLoop
from cosmos_export.sampling import CheckpointSampling, Overrides, Schedule, coefficient_table, resolve_schedule
from cosmos_export.targets.onnx_loop import lower_loop
from cosmos_export.targets.weights import Stored, numpy_dtype

SCHEDULER: dict[str, Any] = {
    "use_karras_sigmas": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "sigma_max": 200.0,
    "sigma_min": 0.147,
}  # fmt: skip
CASE = Case("everything", 3, 5, 6, 9, clean=(0,), sound=4, actions=5, clean_actions=(1,))
NEGATIVE_IDS = torch.arange(11, 34)


def schedule(steps: int = 5, guidance: float = 6.0, **changes: Any) -> Schedule:
    sampling = CheckpointSampling({"_class_name": "UniPCMultistepScheduler", **SCHEDULER}, False, None, False, None)
    return resolve_schedule(sampling, "t2v", Overrides(steps=steps, guidance=guidance, **changes))


def closed(compiled: Compiled, plan: Schedule) -> Program:
    program = compiled.final.copy()
    if plan.guided[0]:
        BatchGuidance().run(program)
    FuseDenoiseLoop(plan).run(program)
    verify(program)
    return program


def case_of(compiled: Compiled) -> Case:
    return (
        CASE if compiled.config["sound_gen"] else Case("policy", 3, 5, 6, 9, clean=(0,), actions=5, clean_actions=(1,))
    )


def tables(compiled: Compiled, program: Program, plan: Schedule) -> dict[str, np.ndarray]:
    steps = torch.tensor(plan.timesteps, dtype=torch.float32)
    rows = schedule_table(program, steps, compiled.weights)["time_embedding"]
    return {"time_embedding": rows.numpy()[:, None, :], "coefficients": coefficient_table(plan).astype(np.float32)}


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
    schedulers = {n: UniPCMultistepScheduler(**SCHEDULER) for n in names}
    for scheduler in schedulers.values():
        scheduler.set_timesteps(plan.steps)
    for t in schedulers["vision"].timesteps:
        step = inputs | {f"{n}_latent": latents[n] for n in names} | {"timestep": torch.tensor([float(t)])}
        cond = stock_forward(compiled.model, step)
        negative = stock_forward(compiled.model, step | {"input_ids": NEGATIVE_IDS}) if plan.guided[0] else cond
        for n in names:
            u, c = negative[f"{n}_velocity"], cond[f"{n}_velocity"]
            velocity = u + plan.guidance * (c - u)
            latents[n] = schedulers[n].step(velocity, t, latents[n], return_dict=False)[0]
    return latents


def run_onnx(model: onnx.ModelProto, folder: Path, inputs: Tensors) -> dict[str, torch.Tensor]:
    path = folder / "denoise.onnx"
    onnx.save(model, path)
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    found = session.run(names, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
    return {n.removesuffix("_sample_final"): torch.from_numpy(v) for n, v in zip(names, found, strict=True)}


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
        assert (lowered[name] - latent).norm() / scale <= 1e-4
        assert (lowered[name] - found[f"{name}_sample"]).norm() / scale <= 1e-5


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


def test_a_schedule_with_an_interval_is_refused(omni: Compiled) -> None:
    plan = schedule(steps=8, guidance_interval=(900.0, 1000.0))
    assert len(set(plan.guided)) == 2
    with pytest.raises(UnsupportedError, match="of 8 steps are guided"):
        FuseDenoiseLoop(plan).run(omni.final.copy())


def test_a_guided_schedule_needs_both_branches(omni: Compiled) -> None:
    with pytest.raises(UnsupportedError, match="one branch"):
        FuseDenoiseLoop(schedule()).run(omni.final.copy())


def test_twice_is_once(omni: Compiled) -> None:
    plan = schedule()
    program = closed(omni, plan)
    text = print_program(program)
    assert not FuseDenoiseLoop(plan).run(program).modified
    assert print_program(program) == text


def test_the_state_is_fp32_whatever_the_model_computes_in(omni: Compiled) -> None:
    program = closed(omni, schedule())
    body = program.graphs[program.loop.body]
    assert {spec_of(body.inputs[n]).dtype for n in program.loop.carried} == {torch.float32}


def test_the_distilled_loop_takes_its_noise_as_an_input(omni: Compiled, tmp_path: Path) -> None:
    """x ← (1 − σ')·x0 + σ'·ε with the checkpoint's own sigmas, one branch, clean frames pinned in every step."""
    sigmas = (1.0, 0.9375, 0.8333333333333334, 0.625)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True, "shift": 1.0}
    plan = resolve_schedule(CheckpointSampling(config, False, sigmas, False, None), "i2v")
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
    lowered = run_onnx(model, tmp_path, known | noise)["vision"]
    assert (lowered - latent).norm() / latent.norm() <= 1e-4
