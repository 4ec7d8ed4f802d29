"""What `plan` says of a build, beside what the build found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cosmos_export.build.options import Plan
from cosmos_export.bundle import Planned
from cosmos_export.plan.precision import precision
from cosmos_export.plan.sizes import Component, components, host
from cosmos_export.plan.subject import Subject, from_checkpoint
from cosmos_export.plan.workload import Workload

if TYPE_CHECKING:
    from cosmos_export.build.artifacts import Engine

_BODIES = ("denoise", "generator")
"""What the names of engines that compute steps begin with; each has the generator's weights."""


def planned(plan: Plan, engines: Sequence[Engine], peak_anonymous_bytes: int) -> Mapping[str, Planned]:
    """Bytes of every engine and of memory that no file backs. Empty where there are no engines, and for weights that
    are not bf16 or not in the engines: plans are made for those."""
    if not engines or plan.checkpoint.dtype != "bf16" or plan.options.weights == "external":
        return {}
    parts = {part.name: part for part in _parts(plan)}
    found = {}
    for engine in engines:
        part = parts.get("generator" if engine.graph.startswith(_BODIES) else engine.graph)
        if part is not None:
            found[f"engine {engine.graph}"] = Planned(part.engine_bytes, engine.report.size_bytes)
    peak = host(_subject(plan), list(parts.values()), 1, tensorrt=True).peak_anonymous_bytes
    return {**found, "peak anonymous memory": Planned(peak, peak_anonymous_bytes)}


def _subject(plan: Plan) -> Subject:
    """The checkpoint with the modalities and components that are built."""
    subject = from_checkpoint(plan.checkpoint)
    geometry = replace(subject.geometry, sound_gen="sound" in plan.modalities, action_gen="action" in plan.modalities)
    codecs = {name: count for name, count in subject.codecs.items() if name in plan.components}
    return replace(subject, geometry=geometry, codecs=codecs)


def _parts(plan: Plan) -> list[Component]:
    workloads = [Workload(p.name, plan.options.mode, p, 1, 1) for p in plan.profiles]
    subject, steps = _subject(plan), plan.schedule.steps
    distilled = subject.sampling.distilled_sigmas is not None
    chosen = precision(plan.recipe, plan.precision.overrides, plan.target, subject.geometry, steps, distilled=distilled)
    guided = plan.options.loop == "device" and any(plan.schedule.guided)
    return components(subject, workloads, chosen, 2 if guided else 1)
