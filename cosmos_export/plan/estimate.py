"""The whole estimate: sizes, work and time of a model for targets and workloads, what fits, and what would make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cosmos_export.plan.latency import Latency, latency
from cosmos_export.plan.precision import PRECISIONS, SCHEMES, Precision, require_schemes
from cosmos_export.plan.sizes import Component, Device, Host, components, device, host
from cosmos_export.plan.subject import Subject
from cosmos_export.plan.work import Work, passes, request_work
from cosmos_export.plan.workload import Workload
from cosmos_export.sampling import Overrides, Schedule, resolve_schedule
from cosmos_export.targets import Target
from cosmos_export.targets.profiles import ModelLimits, check_limits

MEMORY_SHARE = 0.95
"""Of a GPU's memory that a request may take; the rest is the driver's and the allocator's. Of memory that is shared with
the CPU the system needs more."""
UNIFIED_SHARE = 0.85


@dataclass(frozen=True)
class Request:
    """What is planned."""

    targets: tuple[Target, ...]
    workloads: tuple[Workload, ...]
    precision: Precision
    loop: Literal["host", "device"] = "host"
    overrides: Overrides = field(default_factory=Overrides)


@dataclass(frozen=True)
class Fit:
    """One workload on one target."""

    target: str
    workload: str
    memory_bytes: int | None
    """What the target offers a request; None for the CPU."""
    resident_bytes: int
    phased_bytes: int
    verdict: str
    """``fits``, ``fits in phases`` or ``does not fit``."""
    advice: tuple[str, ...]
    latency: Latency | None
    no_latency: str
    """Why no time is predicted; empty where it is."""


@dataclass(frozen=True)
class Load:
    """What a workload asks for, whatever the target."""

    workload: str
    mode: str
    rows: int
    prompt_tokens: int
    negative_tokens: int
    steps: int
    passes: int
    reasoner: Work
    step: Work
    """One step, with the guidance branches an average step has."""
    generator: Work
    device: Device


@dataclass(frozen=True)
class Estimate:
    """The result. Field names are those of the JSON output."""

    subject: str
    variant: str
    recipe: str
    loop: str
    components: tuple[Component, ...]
    loads: tuple[Load, ...]
    fits: tuple[Fit, ...]
    builds: Mapping[str, Host]
    """By target."""

    @property
    def something_fits(self) -> bool:
        return any(fit.verdict != "does not fit" for fit in self.fits)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"something_fits": self.something_fits}


def estimate(subject: Subject, request: Request, limits: ModelLimits | None = None) -> Estimate:
    """Plan ``subject``. Raises what a build would raise: UserError for shapes and schedules that the model does not have,
    UnsupportedError CX483 for a recipe that a target does not run."""
    for target in request.targets:
        if target.compute_capability is not None:
            require_schemes(request.precision, target)
    for workload in request.workloads:
        check_limits(workload.profile, limits or _limits(subject))
    schedules = {w.name: resolve_schedule(subject.sampling, w.mode, request.overrides) for w in request.workloads}
    parts = _components(subject, request, request.workloads, schedules)
    loads = tuple(_load(subject, w, schedules[w.name], request, schedules) for w in request.workloads)
    segments = max(len(s.segments) for s in schedules.values()) if request.loop == "device" else 1
    return Estimate(
        subject=subject.name,
        variant=subject.variant,
        recipe=request.precision.name,
        loop=request.loop,
        components=tuple(parts),
        loads=loads,
        fits=tuple(
            _fit(subject, w, load, schedules, request, target)
            for target in request.targets
            for w, load in zip(request.workloads, loads, strict=True)
        ),
        builds={t.name: host(subject, parts, segments, t.backend != "onnxruntime") for t in request.targets},
    )


def _limits(subject: Subject) -> ModelLimits:
    geometry = subject.geometry
    return ModelLimits(
        max_position=262_144 if geometry.gated else 131_072,
        temporal_margin=geometry.unified_3d_mrope_temporal_modality_margin,
        sound=geometry.sound_gen,
        action=geometry.action_gen,
    )


def _components(
    subject: Subject, request: Request, workloads: Sequence[Workload], schedules: Mapping[str, Schedule]
) -> list[Component]:
    guided = any(any(schedules[w.name].guided) for w in workloads)
    return components(subject, workloads, request.precision, 2 if guided and request.loop == "device" else 1)


def _load(
    subject: Subject, workload: Workload, schedule: Schedule, request: Request, schedules: Mapping[str, Schedule]
) -> Load:
    """Of one workload; the device holds engines made for it alone."""
    reasoner, generator = request_work(subject, workload, schedule)
    conditional, unconditional = passes(schedule)
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
        device=_device(subject, workload, request, schedules),
    )


def _device(subject: Subject, workload: Workload, request: Request, schedules: Mapping[str, Schedule]) -> Device:
    guided = any(schedules[workload.name].guided)
    return device(subject, workload, _components(subject, request, [workload], schedules), guided)


def _fit(
    subject: Subject,
    workload: Workload,
    load: Load,
    schedules: Mapping[str, Schedule],
    request: Request,
    target: Target,
) -> Fit:
    schedule = schedules[workload.name]
    predicted = latency(subject, workload, schedule, request.precision, target)
    why = ""
    if predicted is None:
        missing = {SCHEMES[s].computes for s in (request.precision.reasoner, request.precision.generator)}
        missing -= set(target.peak_flops)
        why = f"no published rate for {', '.join(sorted(missing))}" if missing else "no measured efficiency"
    offered = None
    verdict, advice = "fits", []
    resident, phased = load.device.resident_bytes, load.device.phased_bytes
    if target.memory_bytes is not None:
        offered = int(target.memory_bytes * (UNIFIED_SHARE if target.unified_memory else MEMORY_SHARE))
        if resident > offered:
            verdict = "fits in phases" if phased <= offered else "does not fit"
            if verdict == "fits in phases":
                advice.append("drop the reasoner after prefill, and load the codecs when the loop is done")
            advice += _advice(subject, workload, request, schedules, target, offered, verdict)
    return Fit(target.name, workload.name, offered, resident, phased, verdict, tuple(advice), predicted, why)


def _advice(
    subject: Subject,
    workload: Workload,
    request: Request,
    schedules: Mapping[str, Schedule],
    target: Target,
    offered: int,
    verdict: str,
) -> list[str]:
    """Changes that make it fit, each tried on the same arithmetic."""
    found = []
    for other in PRECISIONS.values():
        needed = {SCHEMES[s].needs for s in (other.reasoner, other.generator)}
        if other.name == request.precision.name or not needed <= set(target.precisions):
            continue
        tried = _device(subject, workload, Request((target,), (workload,), other, request.loop), schedules)
        if tried.resident_bytes <= offered:
            found.append(f"--recipe {other.name}: {tried.resident_bytes / 1e9:.1f} GB with everything on the device")
        elif verdict == "does not fit" and tried.phased_bytes <= offered:
            found.append(f"--recipe {other.name}: {tried.phased_bytes / 1e9:.1f} GB in phases")
    if verdict == "does not fit":
        frames = _most_frames(subject, workload, request, schedules, offered)
        if frames is not None:
            found.append(f"at most {4 * (frames - 1) + 1} pixel frames at this size (in phases)")
    return found


def _most_frames(
    subject: Subject, workload: Workload, request: Request, schedules: Mapping[str, Schedule], offered: int
) -> int | None:
    """The longest clip, in latent frames, that fits in phases."""
    from dataclasses import replace

    from cosmos_export.targets.profiles import DimRange

    for frames in range(workload.dim("frames") - 1, 0, -1):
        dims = {**workload.profile.dims, "frames": DimRange(frames, frames, frames)}
        shorter = replace(workload, profile=replace(workload.profile, dims=dims))
        if _device(subject, shorter, request, schedules).phased_bytes <= offered:
            return frames
    return None
