"""Measurements of a geometry's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_export.bench.baseline import NO_FP8, BaselineRequest, measure_baselines, require_diffusers
from cosmos_export.bench.clock import Watch, timed
from cosmos_export.bench.result import Baseline, Component, Measurement, machine
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.plan import Workload, parse_workload, published_subject
from cosmos_export.progress import Progress
from cosmos_export.sampling import Overrides, Schedule, resolve_schedule

if TYPE_CHECKING:
    import torch

RECIPES = ("bf16", "fp8", "fp8-attention")
"""Of a geometry: ``fp8`` has W8A8 linears in the generator; ``fp8-attention`` FP8 attention as well."""
FEWEST_RUNS = 5
REASONER = "reasoner"
"""The workload of one prompt alone: the official caption of a video."""
_DROID = Overrides(grid="flow", steps=4, shift=5.0, guidance=3.0)
"""The published sampling of the DROID policies; no size has it of itself."""


@dataclass(frozen=True)
class GeometryRequest:
    """What `bench --geometry` is asked for."""

    size: str
    workload: str
    recipe: str = "bf16"
    device: str = "cuda"
    runs: int = FEWEST_RUNS
    warm_up: int = 1
    overrides: Overrides = field(default_factory=Overrides)
    graphs: Path | None = None
    """Graphs that were captured elsewhere; None: captured here."""
    attention: str | None = None
    """Implementation of attention; None: the recipe's."""
    kernels: frozenset[str] = frozenset()
    """Kernels of `targets.inductor_fusions` that compute in the generator; none: the compiler's code."""
    only: frozenset[str] = frozenset()
    """Graphs to measure; none: all that the request has."""
    compiled: bool = True
    baselines: bool = False
    """Also diffusers' own transformer, eager and with its repeated blocks compiled, in the same run."""
    dry_run: bool = False


def check_runs(runs: int, warm_up: int, dry_run: bool) -> None:
    """UserError CX672 for too few runs to say anything of, or where one of them would capture a graph."""
    if runs < (1 if dry_run else FEWEST_RUNS) or warm_up < (0 if dry_run else 1):
        said = f"{runs} runs after {warm_up}, allowed from {FEWEST_RUNS} after 1"
        raise UserError("CX672", said, "a median needs some, and the first two compile and capture")


def geometry_schedule(request: GeometryRequest) -> tuple[Workload, Schedule]:
    """The workload and its schedule: that of the published table unless overridden."""
    from cosmos_export.bench.published import document

    workload = parse_workload("t2v-480p-189f" if request.workload == REASONER else request.workload)
    given = request.overrides
    if request.workload == "policy-droid" and given == Overrides():
        given = _DROID
    for entry in document()["workloads"].values():
        if entry["workload"] == request.workload and given == Overrides():
            own = dict(entry["overrides"])
            interval = own.get("guidance_interval")
            own["guidance_interval"] = tuple(interval) if interval else None
            given = Overrides(**own)
            break
    return workload, resolve_schedule(published_subject(request.size).sampling, workload.mode, given)


def measure_geometry(request: GeometryRequest, progress: Progress, command: str = "") -> Measurement:
    """Every graph of one request of the geometry, with random weights; the request follows by its number of steps.

    UserError for what cannot be asked for; UnsupportedError CX505 where the device is not there.
    """
    from cosmos_export.bench import geometry as geometries
    from cosmos_export.kernels.description import KERNELS

    check_runs(request.runs, request.warm_up, request.dry_run)
    if request.recipe not in RECIPES:
        raise UserError("CX672", f"recipe `{request.recipe}` is none of {', '.join(RECIPES)}")
    unknown = request.kernels - set(KERNELS)
    if unknown:
        raise UserError("CX672", f"kernels {', '.join(sorted(unknown))} are none of {', '.join(KERNELS)}")
    subject = published_subject(request.size)
    workload, schedule = geometry_schedule(request)
    if request.baselines:
        if request.workload == REASONER:
            raise UserError("CX672", "diffusers runs no reasoner without a generator", "leave --baselines out")
        require_diffusers()
    device = _device(request.device)
    modalities = geometries.modalities_of(workload, subject.geometry)
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    progress.begin("graphs")
    if request.graphs is not None:
        found = geometries.read_graphs(request.graphs)
    else:
        found = geometries.capture_graphs(subject.geometry, modalities, schedule, tiny=request.dry_run)
    progress.end("graphs")
    dims = geometries.dims_of(workload, tiny=request.dry_run)
    guided = 0 if request.workload == REASONER else sum(schedule.guided)
    steps = 0 if request.workload == REASONER else schedule.steps
    plain = steps - guided
    calls = {geometries.GUIDED: guided, geometries.PLAIN: plain, "conditioning": 1}
    components: list[Component] = []
    graphs = {name: g for name, g in found.graphs.items() if _measured(name, request)}
    progress.begin("measure", len(graphs))
    with Watch(device.index or 0 if device.type == "cuda" else None) as watch:
        watch.keeps = False
        for number, (name, graph) in enumerate(graphs.items()):
            lengths = {REASONER: dims["und_len"], "reasoner-negative": dims["negative_und_len"]}
            if name != REASONER:
                lengths = {name: dims["und_len"]}
            elif not guided or request.workload == REASONER:
                lengths.pop("reasoner-negative")
            run = _Graph(name, graph, device, request)
            try:
                for label, length in lengths.items():
                    count = calls.get(label, 1)
                    if count:
                        samples = run.samples({**dims, "und_len": length}, watch)
                        components.append(Component(label, tuple(samples), count))
            finally:
                run.close()
            progress.update("measure", number + 1)
    progress.end("measure")
    memory = _peak_bytes(device)
    baselines: tuple[Baseline, ...] = ()
    if request.baselines:
        beside = BaselineRequest(
            geometry=geometries.tiny_geometry(subject.geometry) if request.dry_run else subject.geometry,
            modalities=modalities, dims=dims, schedule=schedule, scheduler=subject.sampling.scheduler, device=device,
            runs=request.runs, warm_up=request.warm_up, compiler="eager" if request.dry_run else "inductor",
        )  # fmt: skip
        baselines = measure_baselines(beside, progress)
    size = "tiny" if request.dry_run else request.size
    return Measurement(
        subject=f"geometry:{size}, random weights",
        model=request.size,
        workload=request.workload,
        recipe=request.recipe,
        backend="inductor",
        device=str(device),
        card=_card(device),
        components=tuple(components),
        steps=steps,
        forwards=2 * guided + plain,
        extrapolated=f"one step of each kind measured, times {guided} guided and {plain} others" if steps else "",
        covers="reasoner, conditioning and every step; no codec" if steps else "keys and values of one prompt",
        kernels=tuple(sorted(request.kernels)),
        dry_run=request.dry_run,
        memory_bytes=memory,
        machine=machine(),
        during=watch.summary(),
        command=command,
        baselines=baselines,
        baselines_left_out=(NO_FP8,) if request.baselines and request.recipe != "bf16" else (),
    )


def _measured(name: str, request: GeometryRequest) -> bool:
    if request.workload == REASONER:
        return name == REASONER
    return not request.only or name in request.only


class _Graph:
    """A graph with random weights on a device."""

    def __init__(self, name: str, graph: Any, device: torch.device, request: GeometryRequest) -> None:
        from cosmos_export.bench import geometry as geometries
        from cosmos_export.targets.inductor import Executable, Settings

        step = name in (geometries.GUIDED, geometries.PLAIN)
        narrow = geometries.linear_weights(graph) if step and request.recipe != "bf16" else frozenset()
        kind = request.attention or ("triton-fp8" if step and request.recipe == "fp8-attention" else "sdpa")
        kernels = request.kernels if step else frozenset()
        settings = Settings(
            attention=kind, compiled=request.compiled, narrow=narrow, kernels=kernels,
            open_dims=geometries.PROMPT_DIMS,
        )  # fmt: skip
        weights = geometries.random_weights(graph, device, narrow)
        self._executable = Executable(graph, weights, device, settings)
        self._graph, self._device, self._request = graph, device, request

    def samples(self, dims: Mapping[str, int], watch: Watch) -> list[float]:
        from cosmos_export.bench import geometry as geometries

        inputs = geometries.random_inputs(self._graph, dims, self._device)
        tokens = {name: object() for name in inputs}
        runs, warm_up = self._request.runs, self._request.warm_up
        return timed(lambda: self._executable(inputs, tokens), self._device, runs, warm_up, watch)

    def close(self) -> None:
        import torch

        del self._executable
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _device(name: str) -> torch.device:
    import torch

    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        said = f"no CUDA device {device.index or 0} that PyTorch {torch.__version__} can use"
        raise UnsupportedError("CX505", said, "`--dry-run` tries everything on the CPU, at a tiny size")
    return device


def _card(device: torch.device) -> str | None:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _peak_bytes(device: torch.device) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


__all__ = ["GeometryRequest", "measure_geometry"]
