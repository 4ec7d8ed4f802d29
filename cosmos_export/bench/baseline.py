"""The baseline of a measurement of a geometry, in the same run: diffusers' own transformer on the same request.

The same geometry with random weights, the same shapes, steps, guidance and clock. A step is what diffusers' pipeline
does in one: its transformer for every branch, guidance, its scheduler for every modality. What the pipeline packs on
the host is packed before. Its transformer runs the reasoner in every forward, so none stands apart from the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cosmos_export.bench.clock import timed
from cosmos_export.bench.result import Baseline, MeasuredPart
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.progress import Progress
from cosmos_export.sampling import Schedule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cosmos_export.checkpoint.geometry import Geometry

NO_FP8 = (
    "diffusers in FP8: without another package it has no FP8 product (layerwise casting and its reading of FP8 "
    "checkpoints widen the weights and multiply in bf16), so its bf16 stands here"
)
_FPS = 24.0


@dataclass(frozen=True)
class BaselineRequest:
    """The request of a geometry, as a baseline needs it."""

    geometry: Geometry
    modalities: tuple[str, ...]
    dims: Mapping[str, int]
    """Values of the dims of `bench.geometry.dims_of`."""
    schedule: Schedule
    scheduler: Mapping[str, Any]
    """The checkpoint's scheduler, as diffusers configures it."""
    device: torch.device
    runs: int
    warm_up: int
    compiler: str = "inductor"
    """Compiler of the repeated blocks; ``eager`` in a dry run, where they are traced and run uncompiled."""


def require_diffusers() -> None:
    """UnsupportedError CX802 where it is not installed."""
    if find_spec("diffusers") is None:
        raise UnsupportedError(
            "CX802", "baselines are diffusers', which is not installed here", 'pip install ".[compile]" in the checkout'
        )


def measure_baselines(request: BaselineRequest, progress: Progress) -> tuple[Baseline, ...]:
    """diffusers eager, and with regional `torch.compile`, both in bf16; the weights are made once."""
    import torch

    progress.begin("baselines", 2)
    model = random_transformer(request.geometry, request.device, torch.bfloat16)
    found = [_measure("diffusers, eager", model, request)]
    progress.update("baselines", 1)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=request.compiler)  # type: ignore[operator]
    name = "diffusers, regional torch.compile"
    if request.compiler != "inductor":
        name += f" ({request.compiler})"
    found.append(_measure(name, model, request))
    progress.update("baselines", 2)
    progress.end("baselines")
    del model
    if request.device.type == "cuda":
        torch.cuda.empty_cache()
    return tuple(found)


def random_transformer(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """diffusers' transformer with random weights on ``device``, in the types in which it computes a ``dtype`` model."""
    import torch

    from cosmos_export.bench.geometry import random_weight
    from cosmos_export.capture.model import build_empty_model, compute_dtypes, real_buffers

    model = build_empty_model(geometry.config)
    generator = torch.Generator(device).manual_seed(0)
    types = compute_dtypes(model, {name: dtype for name, _ in model.named_parameters()})
    values = {name: random_weight(p.shape, types[name], generator) for name, p in model.named_parameters()}
    model.load_state_dict(values, strict=True, assign=True)
    for name, buffer in real_buffers(geometry.config).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    return model.requires_grad_(False).eval()


def _measure(name: str, model: nn.Module, request: BaselineRequest) -> Baseline:
    guided = sum(request.schedule.guided)
    plain = request.schedule.steps - guided
    components = []
    for label, calls, branches in (("step-guided", guided, 2), ("step-plain", plain, 1)):
        if calls:
            step = stock_step(model, request, branches)
            samples = timed(step, request.device, request.runs, request.warm_up)
            components.append(MeasuredPart(label, tuple(samples), calls))
    covers = "the transformer, whose every forward runs the reasoner, guidance and the scheduler; no codec"
    return Baseline(name, "bf16", tuple(components), 2 * guided + plain, covers)


def stock_step(model: nn.Module, request: BaselineRequest, branches: int) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that does one step, by diffusers' code alone; its results are the latents it arrives at."""
    import torch

    from cosmos_export.evaluation.cases import Case
    from cosmos_export.evaluation.reference import Reference

    dims = request.dims
    stock = Reference.of(model, torch.bfloat16)
    arguments = []
    for prompt in (dims["und_len"], dims["negative_und_len"])[:branches]:
        case = Case(
            "bench", prompt, dims["frames"], dims["height"], dims["width"], sound=dims.get("sound_len", 0),
            actions=dims.get("action_len", 0),
        )  # fmt: skip
        inputs = case.inputs(request.geometry.config, request.modalities)
        arguments.append(stock.arguments(inputs, _FPS))
    shown = {n.removesuffix("_latent"): v for n, v in inputs.items() if n.endswith("_latent") and v.numel()}
    latents = {name: value.to(request.device) for name, value in shown.items()}
    drivers = {name: _scheduler_steps(request) for name in latents}

    def step() -> dict[str, torch.Tensor]:
        runs = [stock.velocities(one) for one in arguments]
        moved = {}
        for name, latent in latents.items():
            velocity = runs[0][f"{name}_velocity"]
            if branches == 2:
                other = runs[1][f"{name}_velocity"]
                velocity = other + request.schedule.guidance * (velocity - other)
            driver, at = next(drivers[name])
            moved[name] = driver.step(velocity, at, latent, return_dict=False)[0]
        return moved

    return step


def _scheduler_steps(request: BaselineRequest) -> Iterator[tuple[Any, torch.Tensor]]:
    """A scheduler and its next timestep, through trajectory after trajectory."""
    from cosmos_export.evaluation.sampled import stock_scheduler

    while True:
        driver = stock_scheduler(request.scheduler, request.schedule)
        driver.timesteps = driver.timesteps.to(request.device)
        for at in driver.timesteps:
            yield driver, at
