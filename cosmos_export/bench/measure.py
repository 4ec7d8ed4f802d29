"""Measurements of a geometry's graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_export.bench.baseline import NO_FP8, BaselineRequest, measure_baselines, require_diffusers
from cosmos_export.bench.clock import CardWatch, timed
from cosmos_export.bench.result import Baseline, MeasuredPart, Measurement, machine
from cosmos_export.diagnostics import UnsupportedError, UserError, shown
from cosmos_export.ir.formats import E4M3
from cosmos_export.options import WORKLOAD
from cosmos_export.plan import Workload, parse_workload, published_subject
from cosmos_export.precision.recipe import DEFAULT, Assignment, load_recipe, resolve_recipe
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED
from cosmos_export.progress import Progress
from cosmos_export.sampling import Overrides, Schedule, resolve_schedule
from cosmos_export.targets import load_target
from cosmos_export.verb_options import FEWEST_RUNS

if TYPE_CHECKING:
    import torch

    from cosmos_export.bench.geometry import GeometryGraphs
    from cosmos_export.ir.graph import Graph

TARGET = "h100"
"""The target whose schemes a recipe of a geometry may use: those of the inductor backend, on whatever card it runs."""
REASONER = "reasoner"
"""The workload of one prompt alone: the official caption of a video."""
_DROID = Overrides(grid="flow", steps=4, shift=5.0, guidance=3.0)
"""The published sampling of the DROID policies; no size has it of itself."""


@dataclass(frozen=True)
class GeometryRequest:
    """A measurement of the published size ``size``. What `BenchOptions` has too is explained there."""

    size: str
    workload: str
    recipe: str = DEFAULT
    device: str = "cuda"
    runs: int = FEWEST_RUNS
    warm_up: int = 1
    overrides: Overrides = field(default_factory=Overrides)
    """Changes of the schedule."""
    graphs: Path | None = None
    attention: str | None = None
    places: tuple[str, ...] = ()
    kernels: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    """Components to measure; none: all that the request has."""
    compiled: bool = True
    """False: one operation runs after another."""
    baselines: bool = False
    dry_run: bool = False


def check_runs(runs: int, warm_up: int, dry_run: bool) -> None:
    """UserError CX672 for too few runs to say anything of, or where one of them would capture a graph."""
    if runs < (1 if dry_run else FEWEST_RUNS) or warm_up < (0 if dry_run else 1):
        said = f"{runs} runs after {warm_up}, allowed from {FEWEST_RUNS} after 1"
        raise UserError("CX672", said, "a median needs some, and the first two compile and capture")


def geometry_schedule(request: GeometryRequest) -> tuple[Workload, Schedule]:
    """The workload and its schedule: that of the published table unless overridden."""
    from cosmos_export.bench.published import document

    workload = parse_workload(WORKLOAD if request.workload == REASONER else request.workload)
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
    from cosmos_export.targets.inductor.functions import ATTENTIONS

    check_runs(request.runs, request.warm_up, request.dry_run)
    unknown = request.kernels - set(KERNELS)
    if unknown:
        raise UserError("CX672", f"kernels {', '.join(sorted(unknown))} are not among {', '.join(KERNELS)}")
    if request.attention is not None and request.attention not in ATTENTIONS:
        raise UserError("CX672", f"attention `{request.attention}` is not one of {', '.join(ATTENTIONS)}")
    subject = published_subject(request.size)
    workload, schedule = geometry_schedule(request)
    if request.baselines:
        if request.workload == REASONER:
            raise UserError("CX672", "diffusers runs no reasoner without a generator", "leave --baselines out")
        require_diffusers()
    device = _device(request.device)
    if device.type == "cpu":
        _interpret_kernels(request)
    modalities = geometries.modalities_of(workload, subject.geometry)
    geometry = geometries.tiny_geometry(subject.geometry) if request.dry_run else subject.geometry
    assignment = resolve_recipe(
        load_recipe(request.recipe), request.places, load_target(TARGET), layers=geometry.num_hidden_layers,
        steps=schedule.steps, distilled=schedule.sampler == "distilled-sde",
    )  # fmt: skip
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    progress.begin("graphs")
    if request.graphs is not None:
        found = geometries.read_graphs(request.graphs)
        _require_graphs(found, request.graphs, assignment, schedule)
    else:
        found = geometries.capture_graphs(subject.geometry, modalities, schedule, tiny=request.dry_run)
    progress.end("graphs")
    dims = geometries.dims_of(workload, tiny=request.dry_run)
    parts = list(_parts(found, assignment, schedule, dims, request))
    components: list[MeasuredPart] = []
    progress.begin("measure", len(parts))
    with CardWatch(device.index or 0 if device.type == "cuda" else None) as watch:
        watch.keeps = False
        for number, part in enumerate(parts):
            run = _Graph(part.graph, device, request, kernels=request.kernels if part.in_loop else frozenset())
            try:
                for name, (length, count) in part.runs.items():
                    samples = run.samples({**dims, "und_len": length}, watch)
                    components.append(MeasuredPart(name, tuple(samples), count))
            finally:
                run.close()
            progress.update("measure", number + 1)
    progress.end("measure")
    memory = _peak_bytes(device)
    baselines: tuple[Baseline, ...] = ()
    if request.baselines:
        beside = BaselineRequest(
            geometry=geometry, modalities=modalities, dims=dims, schedule=schedule,
            scheduler=subject.sampling.scheduler, device=device, runs=request.runs, warm_up=request.warm_up,
            compiler="eager" if request.dry_run else "inductor",
        )  # fmt: skip
        baselines = measure_baselines(beside, progress)
    size = "tiny" if request.dry_run else request.size
    guided = 0 if request.workload == REASONER else sum(schedule.guided)
    steps = 0 if request.workload == REASONER else schedule.steps
    kinds = sum(part.in_loop for part in parts)
    return Measurement(
        subject=f"geometry:{size}, random weights",
        model=request.size,
        workload=request.workload,
        recipe=" ".join([request.recipe, *(f"--set {place}" for place in request.places)]),
        backend="inductor",
        device=str(device),
        card=_card(device),
        components=tuple(components),
        steps=steps,
        forwards=steps + guided,
        extrapolated=f"one step of {kinds} kinds measured, times their number of the {steps}" if steps else "",
        covers="reasoner, conditioning and every step; no codec" if steps else "keys and values of one prompt",
        kernels=tuple(sorted(request.kernels)),
        dry_run=request.dry_run,
        memory_bytes=memory,
        machine=machine(),
        during=watch.summary(),
        command=command,
        baselines=baselines,
        baselines_left_out=(NO_FP8,) if request.baselines and any(map(_in_fp8, assignment.schemes)) else (),
    )


def _require_graphs(found: GeometryGraphs, folder: Path, assignment: Assignment, schedule: Schedule) -> None:
    """UserError CX671 where graphs that were captured elsewhere are not those of the request."""
    from cosmos_export.bench.geometry import GUIDED, PLAIN

    bodies = {GUIDED if guided else PLAIN for guided in schedule.guided}
    missing = sorted({REASONER, *bodies} - found.graphs.keys())
    hint = "write them for this size with `python benchmarks/geometry.py -o DIR`"
    if found.layers != assignment.layers:
        raise UserError(
            "CX671", f"{folder} has graphs of {found.layers} layers, the size has {assignment.layers}", hint
        )
    if missing:
        raise UserError("CX671", f"{folder} has no {' and no '.join(missing)}, which the workload runs", hint)


def _in_fp8(scheme: str) -> bool:
    """Whether a weight, or an operand of attention, is in FP8."""
    weight = SCHEMES[scheme].weight
    return SCHEMES[scheme].attention is not None if weight is None else weight.values == E4M3


@dataclass(frozen=True)
class _Part:
    """A graph of the request, and what is measured of it."""

    graph: Graph
    runs: Mapping[str, tuple[int, int]]
    """Component → length of the prompt, and how often the request runs it."""
    in_loop: bool = False


def _parts(
    found: GeometryGraphs, assignment: Assignment, schedule: Schedule, dims: Mapping[str, int], request: GeometryRequest
) -> Iterator[_Part]:
    """Everything that a request runs, quantized by its recipe; a body of the loop for each way in which steps compute.

    The body of most of the guided (plain) steps has the plain name, others also that of their schemes.
    """
    from cosmos_export.bench import geometry as geometries
    from cosmos_export.passes.fold_schedule import SCHEDULE

    alone, length = request.workload == REASONER, dims["und_len"]
    first = geometries.quantize_geometry(next(iter(found.programs.values())), assignment, 0)
    for name, graph in first.graphs.items():
        if name in (SCHEDULE, first.loop.body):
            continue
        runs = {name: (length, 1)}
        if name == REASONER and any(schedule.guided) and not alone:
            runs["reasoner-negative"] = (dims["negative_und_len"], 1)
        runs = {label: run for label, run in runs.items() if not request.only or label in request.only}
        if runs and (name == REASONER or not alone):
            yield _Part(graph, runs)
    steps: dict[str, dict[int, list[int]]] = {}
    for step, (guided, key) in enumerate(zip(schedule.guided, assignment.step_keys(), strict=True)):
        name = geometries.GUIDED if guided else geometries.PLAIN
        steps.setdefault(name, {}).setdefault(key, []).append(step)
    for name, by_key in {} if alone else steps.items():
        usual = max(by_key.values(), key=len)
        for same in by_key.values():
            label = name if same is usual else f"{name}/{_schemes_at(assignment, same[0])}"
            if not request.only or label in request.only:
                program = geometries.quantize_geometry(found.programs[name], assignment, same[0])
                yield _Part(program.graphs[program.loop.body], {label: (length, len(same))}, in_loop=True)


def _schemes_at(assignment: Assignment, step: int) -> str:
    used = {assignment.scheme(*site, step) for site in assignment.sites() if site[0] == "gen"} - {UNQUANTIZED}
    return "+".join(sorted(used)) or UNQUANTIZED


class _Graph:
    """A graph with random weights on a device."""

    def __init__(self, graph: Graph, device: torch.device, request: GeometryRequest, kernels: frozenset[str]) -> None:
        from cosmos_export.bench import geometry as geometries
        from cosmos_export.kernels.description import W4A16
        from cosmos_export.passes.pipeline import fuse_kernels
        from cosmos_export.targets.inductor.executable import Executable
        from cosmos_export.targets.inductor.specialise import CompileSettings

        settings = CompileSettings(
            attention=request.attention or "sdpa", compiled=request.compiled, kernels=kernels & {W4A16},
            open_dims=geometries.PROMPT_DIMS,
        )  # fmt: skip
        graph = fuse_kernels(graph, kernels)
        self._executable = Executable(graph, geometries.random_weights(graph, device), device, settings)
        self._graph, self._device, self._request = graph, device, request

    def samples(self, dims: Mapping[str, int], watch: CardWatch) -> list[float]:
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


def _interpret_kernels(request: GeometryRequest) -> None:
    """Kernels run on a CPU where Triton interprets them, which a tiny geometry alone is small enough for."""
    if request.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when the first kernel is imported
    elif request.kernels or request.attention == "triton":
        said = "this project's kernels run on a GPU, and the device is cpu"
        raise UnsupportedError("CX505", said, "`--dry-run` tries them on the CPU, interpreted, at a tiny size")


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError("CX672", f"device {shown(name)} is not one of PyTorch's", "cuda, cuda:N or cpu") from error
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
