"""The whole estimate: sizes, work and time of a model for targets and workloads, what fits, and what would make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cosmos_export import units
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.plan.latency import Latency, latency, missing_rates
from cosmos_export.plan.precision import PlannedPrecision, precision
from cosmos_export.plan.sizes import (
    DeviceMemory,
    Host,
    PlannedEngine,
    components,
    device,
    host,
    require_budget,
    weight_copies,
)
from cosmos_export.plan.subject import Subject
from cosmos_export.plan.work import OperationCount, passes, request_work
from cosmos_export.plan.workload import Workload
from cosmos_export.precision.recipe import DEFAULT, Recipe, load_recipe
from cosmos_export.sampling import Overrides, Schedule, resolve_schedule
from cosmos_export.targets import Target
from cosmos_export.targets.backends import backend_of
from cosmos_export.targets.profiles import DimRange, ModelLimits, check_limits

MEMORY_SHARE = 0.95
"""Share of a GPU's memory that a request may take. The driver and the allocator need the rest."""
UNIFIED_SHARE = 0.85
"""The same share where the memory is shared with the CPU."""
ADVISED, LAST = ("fp8", "memory"), "int4"
"""Recipes that are tried where one does not fit."""


@dataclass(frozen=True)
class PlanRequest:
    """The subject of the plan."""

    targets: tuple[Target, ...]
    workloads: tuple[Workload, ...]
    recipe: Recipe = field(default_factory=lambda: load_recipe(DEFAULT))
    settings: tuple[str, ...] = ()
    """Changes of the recipe, ``PLACE=SCHEME``."""
    loop: Literal["host", "device"] = "host"
    overrides: Overrides = field(default_factory=Overrides)
    memory_budget: int | None = None
    """Memory of the build in bytes. An engine that takes more is cut. None: no engine is cut."""


@dataclass(frozen=True)
class Fit:
    """One workload on one target."""

    target: str
    workload: str
    memory_bytes: int | None
    """Memory in bytes that the target offers a request; None for the CPU."""
    resident_bytes: int
    phased_bytes: int
    verdict: str
    """``fits``, ``fits in phases``, ``does not fit``, or ``not run``: the target has no kernels for the recipe."""
    advice: tuple[str, ...]
    latency: Latency | None
    no_latency: str
    """Why no time is predicted; empty where it is."""


@dataclass(frozen=True)
class Load:
    """The work of a workload, whatever the target."""

    workload: str
    mode: str
    rows: int
    prompt_tokens: int
    negative_tokens: int
    steps: int
    passes: int
    reasoner: OperationCount
    step: OperationCount
    """One step, with the guidance branches an average step has."""
    generator: OperationCount
    device: DeviceMemory
    """Memory on the first target that runs the recipe; `Fit` has each target's."""


@dataclass(frozen=True)
class Estimate:
    """The result. Field names are those of the JSON output."""

    subject: str
    variant: str
    recipe: str
    settings: tuple[str, ...]
    loop: str
    components: tuple[PlannedEngine, ...]
    loads: tuple[Load, ...]
    fits: tuple[Fit, ...]
    builds: Mapping[str, Host]
    """Cost of the build, by target."""

    def __repr__(self) -> str:
        fitting = sum(fit.verdict.startswith("fits") for fit in self.fits)
        return f"Estimate({self.subject}, {self.recipe}, {fitting} of {len(self.fits)} fit)"

    @property
    def something_fits(self) -> bool:
        return any(fit.verdict.startswith("fits") for fit in self.fits)

    def to_json(self) -> dict[str, Any]:
        document = asdict(self) | {"something_fits": self.something_fits}
        for load, entry in zip(self.loads, document["loads"], strict=True):
            entry["device"] |= {"resident_bytes": load.device.resident_bytes, "phased_bytes": load.device.phased_bytes}
        for fit, entry in zip(self.fits, document["fits"], strict=True):
            if fit.latency is not None:
                entry["latency"]["total_s"] = fit.latency.total_s
        return document


def estimate(subject: Subject, request: PlanRequest, limits: ModelLimits | None = None) -> Estimate:
    """Plan ``subject``.

    Raises what a build would raise: UserError for shapes, schedules and recipes that there are not, and where no target
    runs the recipe, or an engine cannot be built within the memory budget, the UnsupportedError that says why.
    """
    for workload in request.workloads:
        check_limits(workload.profile, limits or _limits(subject))
    planner = _Planner(subject, request)
    parts = planner.parts(request.workloads, planner.runs[0])
    if request.memory_budget is not None and any(backend_of(t).builds_here for t in planner.runs):
        require_budget(parts, subject.geometry.num_hidden_layers, request.memory_budget, loop=request.loop)
    loads = tuple(planner.load(workload) for workload in request.workloads)
    segments = max(planner.engines(workload, planner.runs[0]) for workload in request.workloads)
    return Estimate(
        subject=subject.name,
        variant=subject.variant,
        recipe=request.recipe.name,
        settings=request.settings,
        loop=request.loop,
        components=tuple(parts),
        loads=loads,
        fits=tuple(
            planner.fit(target, workload, load)
            for target in request.targets
            for workload, load in zip(request.workloads, loads, strict=True)
        ),
        builds={
            t.name: host(
                subject,
                parts,
                segments,
                backend_of(t).engines is not None,
                request.memory_budget,
                bool(request.recipe.schemes or request.settings),
            )
            for t in planner.runs
        },
    )


def offered_bytes(target: Target) -> int | None:
    """Memory in bytes that ``target`` offers a request; None for the CPU."""
    if target.memory_bytes is None:
        return None
    return int(target.memory_bytes * (UNIFIED_SHARE if target.unified_memory else MEMORY_SHARE))


def _limits(subject: Subject) -> ModelLimits:
    geometry = subject.geometry
    return ModelLimits(
        max_position=geometry.family.facts.max_position,
        temporal_margin=geometry.unified_3d_mrope_temporal_modality_margin,
        sound=geometry.sound_gen,
        action=geometry.action_gen,
    )


class _Planner:
    """Inputs that all parts share. ``runs``: targets that run the recipe; ``refused``: why the others do not."""

    def __init__(self, subject: Subject, request: PlanRequest) -> None:
        self.subject = subject
        self.request = request
        self.schedules = {
            w.name: resolve_schedule(subject.sampling, w.mode, request.overrides) for w in request.workloads
        }
        self.runs: list[Target] = []
        self.refused: dict[str, UnsupportedError] = {}
        for target in request.targets:
            try:
                for workload in request.workloads:
                    self.precision(workload, target)
                self.runs.append(target)
            except UnsupportedError as error:
                self.refused[target.name] = error
        if not self.runs:
            raise next(iter(self.refused.values()))

    def precision(self, workload: Workload, target: Target, recipe: Recipe | None = None) -> PlannedPrecision:
        settings = self.request.settings if recipe is None else ()
        steps, distilled = self.schedules[workload.name].steps, self.subject.sampling.distilled_sigmas is not None
        geometry = self.subject.geometry
        return precision(recipe or self.request.recipe, settings, target, geometry, steps, distilled=distilled)

    def engines(self, workload: Workload, target: Target, recipe: Recipe | None = None) -> int:
        """Engines that have the generator's weights."""
        chosen = self.precision(workload, target, recipe)
        return chosen.engines(self.schedules[workload.name], target, self.request.loop)

    def parts(self, workloads: Sequence[Workload], target: Target, recipe: Recipe | None = None) -> list[PlannedEngine]:
        guided = any(any(self.schedules[w.name].guided) for w in workloads)
        branches = 2 if guided and self.request.loop == "device" else 1
        budget = self.request.memory_budget if backend_of(target).builds_here else None
        return components(self.subject, workloads, self.precision(workloads[0], target, recipe), branches, budget)

    def device(self, workload: Workload, target: Target, recipe: Recipe | None = None) -> DeviceMemory:
        """The estimate with engines made for ``workload`` alone."""
        guided = any(self.schedules[workload.name].guided)
        share = self.precision(workload, target, recipe).cache_share
        copies = weight_copies(target, self.engines(workload, target, recipe))
        return device(self.subject, workload, self.parts([workload], target, recipe), guided, copies, share)

    def load(self, workload: Workload) -> Load:
        schedule: Schedule = self.schedules[workload.name]
        reasoner, generator = request_work(self.subject, workload, schedule)
        conditional, unconditional = passes(workload, schedule)
        return Load(
            workload=workload.name,
            mode=workload.mode,
            rows=workload.rows,
            prompt_tokens=workload.prompt_tokens,
            negative_tokens=workload.negative_tokens if unconditional else 0,
            steps=schedule.steps,
            passes=conditional + unconditional,
            reasoner=reasoner,
            step=generator * (1 / schedule.steps),
            generator=generator,
            device=self.device(workload, self.runs[0]),
        )

    def fit(self, target: Target, workload: Workload, load: Load) -> Fit:
        offered = offered_bytes(target)
        resident, phased = load.device.resident_bytes, load.device.phased_bytes
        if target.name in self.refused:
            error = self.refused[target.name]
            return Fit(
                target.name, workload.name, offered, resident, phased, "not run", (error.message,), None, error.message
            )
        own = self.device(workload, target)
        resident, phased = own.resident_bytes, own.phased_bytes
        verdict, advice = "fits", []
        if offered is not None and resident > offered:
            verdict = "fits in phases" if phased <= offered else "does not fit"
            advice = self._advice(target, workload, offered, verdict)
        chosen = self.precision(workload, target)
        predicted = latency(self.subject, workload, self.schedules[workload.name], chosen, target)
        why = "" if predicted is not None else "no measured efficiency"
        if predicted is None and missing_rates(chosen, target):
            why = f"no published rate for {', '.join(missing_rates(chosen, target))}"
        return Fit(target.name, workload.name, offered, resident, phased, verdict, tuple(advice), predicted, why)

    def _advice(self, target: Target, workload: Workload, offered: int, verdict: str) -> list[str]:
        """Changes that make it fit, each tried on the same arithmetic."""
        found = []
        if verdict == "fits in phases":
            found.append("drop the reasoner after prefill, and load the codecs when the loop is done")
        for recipe in (*ADVISED, LAST):
            if recipe == LAST and any(line.startswith("--recipe") for line in found):
                continue  # it loses the most
            if recipe == self.request.recipe.name or workload.mode in load_recipe(recipe).not_for:
                continue
            try:
                tried = self.device(workload, target, load_recipe(recipe))
            except UnsupportedError:
                continue
            if tried.resident_bytes <= offered:
                found.append(f"--recipe {recipe}: {units.size(tried.resident_bytes, 2)} with everything on the device")
            elif verdict == "does not fit" and tried.phased_bytes <= offered:
                found.append(f"--recipe {recipe}: {units.size(tried.phased_bytes, 2)} in phases")
        frames = self._most_frames(target, workload, offered) if verdict == "does not fit" else None
        if frames is not None:
            found.append(f"at most {4 * (frames - 1) + 1} pixel frames at this size (in phases)")
        return found

    def _most_frames(self, target: Target, workload: Workload, offered: int) -> int | None:
        """The longest clip, in latent frames, that fits in phases."""
        for frames in range(workload.dim("frames") - 1, 0, -1):
            dims = {**workload.profile.dims, "frames": DimRange(frames, frames, frames)}
            shorter = replace(workload, profile=replace(workload.profile, dims=dims))
            if self.device(shorter, target).phased_bytes <= offered:
                return frames
        return None
