"""Whole trajectories: the stock model under diffusers' scheduler, and the bundle's loop, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos_export.evaluation.models import OnnxModel, Value
from cosmos_export.evaluation.reference import Reference
from cosmos_export.ir.program import Program
from cosmos_export.passes.fold_schedule import SCHEDULE
from cosmos_export.sampling import Schedule, coefficient_table
from cosmos_export.sampling.solvers import SolverState, distilled_step, guide, unipc_step

_NEGATIVE_LEN = 23
_NOISE_SEED = 7


def negative_ids(config: Mapping[str, Any]) -> torch.Tensor:
    """A negative prompt of a length that no case's prompt has."""
    return torch.randint(0, config["vocab_size"], (_NEGATIVE_LEN,), generator=torch.Generator().manual_seed(1))


def step_noise(samples: Mapping[str, torch.Tensor], schedule: Schedule) -> dict[str, torch.Tensor]:
    """[steps, …] noise of a stochastic sampler for every sample, drawn as its scheduler draws it; empty for others."""
    if schedule.sampler != "distilled-sde":
        return {}
    return {
        name.replace("_sample", "_noise"): torch.stack(
            [torch.randn(value.shape, generator=generator) for _ in range(schedule.steps)]
        )
        for name, value in samples.items()
        for generator in [torch.Generator().manual_seed(_NOISE_SEED)]
    }


def sampled(
    stock: Reference,
    inputs: Mapping[str, torch.Tensor],
    negative: torch.Tensor,
    fps: float,
    schedule: Schedule,
    scheduler: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Final ``*_sample_final`` of every modality with rows.

    The stock model on both branches, guidance ``u + g·(c − u)`` in fp32, and a diffusers scheduler of the checkpoint's
    class for each modality, on the sigmas of ``schedule``. Clean rows are put back after each step: the scheduler's own
    arithmetic moves them by rounding (UniPC) or drowns them in noise (distilled).
    """
    names = [n.removesuffix("_latent") for n, v in inputs.items() if n.endswith("_latent") and v.numel()]
    drivers = {name: stock_scheduler(scheduler, schedule) for name in names}
    draws = {name: torch.Generator().manual_seed(_NOISE_SEED) for name in names}
    latents = {name: inputs[f"{name}_latent"].clone() for name in names}
    for i, t in enumerate(schedule.timesteps):
        now = {**inputs, **{f"{n}_latent": v for n, v in latents.items()}, "timestep": torch.tensor([float(t)])}
        cond = stock.step(now, fps)
        uncond = stock.step({**now, "input_ids": negative}, fps) if schedule.guided[i] else cond
        for name in names:
            u, c = uncond[f"{name}_velocity"], cond[f"{name}_velocity"]
            velocity = u + schedule.guidance * (c - u) if schedule.guided[i] else c
            extra = {"generator": draws[name]} if schedule.sampler == "distilled-sde" else {}
            step = drivers[name].timesteps[i]
            moved = drivers[name].step(velocity, step, latents[name], return_dict=False, **extra)[0]
            latents[name] = torch.where(generated(inputs, name), moved, inputs[f"{name}_latent"])
    return {f"{name}_sample_final": value for name, value in latents.items()}


def sampled_by(
    step: Callable[[int, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    carried: Mapping[str, str],
    inputs: Mapping[str, torch.Tensor],
    negative: torch.Tensor,
    noise: Mapping[str, torch.Tensor],
    schedule: Schedule,
) -> dict[str, torch.Tensor]:
    """Final ``*_sample_final`` of ``carried`` latents with rows, by a host's guidance and sampler.

    ``step`` gives the velocities of the step of that number for its inputs; ``noise`` is `step_noise`.
    """
    table = coefficient_table(schedule)
    states = {n: SolverState.start(inputs[n].numpy()) for n in carried if inputs[n].numel()}
    for i, t in enumerate(schedule.timesteps):
        latents = {n: torch.from_numpy(np.ascontiguousarray(s.sample)) for n, s in states.items()}
        now = {**inputs, **latents, "timestep": torch.tensor([float(t)])}
        found = [step(i, now)]
        if schedule.guided[i]:
            found.append(step(i, {**now, "input_ids": negative}))
        for name, state in states.items():
            cond, *others = (one[carried[name]].numpy() for one in found)
            velocity = guide(cond, others[0] if others else None, schedule.guidance)
            modality = name.removesuffix("_latent")
            mask = generated(inputs, modality).numpy().astype(np.float32)
            if schedule.sampler == "unipc":
                states[name] = unipc_step(table[i], state, velocity, mask)
            else:
                drawn = noise[f"{modality}_noise"][i].numpy()
                states[name] = SolverState.start(distilled_step(table[i], state.sample, velocity, drawn, mask))
    return {n.replace("_latent", "_sample_final"): torch.from_numpy(s.sample) for n, s in states.items()}


def noisy_modalities(inputs: Mapping[str, torch.Tensor]) -> set[str]:
    """The modalities that have a row to generate."""
    names = [n.removesuffix("_latent") for n, v in inputs.items() if n.endswith("_latent") and v.numel()]
    return {name for name in names if bool(generated(inputs, name).any())}


def generated(inputs: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """True where a modality is generated, broadcastable to the latent: its noisy rows, and of actions the columns in
    use."""
    if name == "sound":
        return torch.tensor(True)
    mask = inputs[f"{name}_mask"] != 0
    if name == "vision":
        return mask.view(1, 1, -1, 1, 1)
    return mask.view(-1, 1) & (inputs["action_columns"] != 0 if "action_columns" in inputs else torch.tensor(True))


def stock_scheduler(config: Mapping[str, Any], schedule: Schedule) -> Any:
    """diffusers' scheduler on the schedule's own grid: its arithmetic is the reference, the grid has its own tests."""
    import diffusers

    driver = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if schedule.sampler == "distilled-sde":
        driver.set_timesteps(sigmas=list(schedule.sigmas[:-1]))
    else:
        driver.set_timesteps(schedule.steps)
    driver.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    driver.timesteps = torch.tensor(schedule.timesteps, dtype=driver.timesteps.dtype)
    return driver


def run_loop_model(
    closed: Mapping[str, Program], inputs: Mapping[str, torch.Tensor], folder: Path, suffix: str
) -> dict[str, torch.Tensor]:
    """The bundle's models in ONNX Runtime, one feeding the next, the segments of the loop last.

    ``closed`` has the segments in order, by the name of their models. ``inputs`` holds the noise of every step.
    """
    first = next(iter(closed.values()))
    results: dict[tuple[str, str], dict[str, Value]] = {}
    for name in first.graphs:
        if name in (SCHEDULE, first.loop.body):
            continue  # the table of the one is in the models of the other
        model = OnnxModel(folder / f"{name}{suffix}")
        fed = {e.input: results[e.source, e.instance][e.output] for e in first.edges_into(name)}
        for instance in dict.fromkeys(i for segment in closed.values() for i in segment.instances(name)):
            prefix = f"{instance}_" if instance else ""
            own = {n: inputs[prefix + n].numpy() for n in model.inputs if n not in fed}
            results[name, instance] = model(own | fed)
    known = {name: value.numpy() for name, value in inputs.items()}
    for name, segment in closed.items():
        loop = segment.loop
        model = OnnxModel(folder / f"{name}{suffix}")
        edges = (e for e in segment.edges_into(loop.body) if e.source != SCHEDULE)
        fed = {e.input: results[e.source, e.instance][e.output] for e in edges}
        rows = {n: known[n][loop.span] for n in loop.rows if n in known}
        final = model(known | fed | rows)
        known |= {n: final[f"{n}_final"] for n in loop.returned}
    return {name: torch.from_numpy(value) for name, value in final.items()}
