"""The prediction of `plan` for a build, beside the build's own numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cosmos_export.bundle import Planned
from cosmos_export.compiler.job import Job
from cosmos_export.plan.precision import precision
from cosmos_export.plan.sizes import BUILDER_BYTES, PlannedEngine, builder_bytes, components, gates_bytes, host
from cosmos_export.plan.subject import Subject, from_checkpoint
from cosmos_export.plan.workload import Workload

if TYPE_CHECKING:
    from cosmos_export.compiler.artifacts import Engine

_BLOCK_BYTES = 512
"""Size of a block in the counter of blocks that a file has on the disk."""
_BODIES = ("denoise", "generator")
"""Beginning of the names of engines that compute steps; each has the generator's weights."""


def planned(job: Job, engines: Sequence[Engine], peak_anonymous_bytes: int) -> Mapping[str, Planned]:
    """Bytes of every engine and of memory that no file backs. Empty where there are no engines, and for weights that
    are not bf16 or not in the engines: plans are made for those."""
    if not engines or job.checkpoint.dtype != "bf16" or job.options.weights == "external":
        return {}
    known = {part.name: part for part in parts(job)}
    found = {}
    for engine in engines:
        graph, _, number = engine.graph.partition("_part_")
        part = known.get("generator" if graph.startswith(_BODIES) else graph)
        if part is None:
            continue
        # The bodies of a host's loop are numbered by how many steps have them, from the second on.
        body = int(graph.removeprefix("generator").removeprefix("_") or 1) if graph.startswith("generator") else 1
        form, index = part.forms[body - 1], int(number or 1) - 1
        if bool(number) == (len(form) > 1) and index < len(form):
            found[f"engine {engine.graph}"] = Planned(form[index], engine.report.size_bytes)
    built = host(_subject(job), list(known.values()), job.generator_engines, True, job.memory_budget, job.quantized)
    peak = built.peak_anonymous_bytes
    return {**found, "peak anonymous memory": Planned(peak, peak_anonymous_bytes)}


def bundle_bytes(job: Job) -> int:
    """Disk that the bundle takes: models with their weights, and engines; without what are holes in the checkpoint and
    therefore here."""
    size = host(_subject(job), parts(job), job.generator_engines, with_engines=job.backend.builds_here).disk_bytes
    files = [path.stat() for path in job.checkpoint.files()]
    there = sum(status.st_blocks * _BLOCK_BYTES for status in files) / max(1, sum(s.st_size for s in files))
    wide = 2 if job.checkpoint.dtype == "fp32" else 1
    return int(wide * size * min(1.0, there))


def builder_memory(job: Job) -> Callable[[str], int]:
    """Expected memory of the builder of an engine, by the name of its graph."""
    known = {part.name: builder_bytes(part) for part in parts(job)}

    def of(graph: str) -> int:
        name = graph.partition("_part_")[0]
        return known.get("generator" if name.startswith(_BODIES) else name, BUILDER_BYTES)

    return of


def gates_memory(job: Job) -> int:
    """Expected memory of measuring a quantized model, beside the builders."""
    return gates_bytes(job.checkpoint.geometry) if job.quantized else 0


def _subject(job: Job) -> Subject:
    """The checkpoint with the modalities and components that are built."""
    subject = from_checkpoint(job.checkpoint)
    geometry = replace(subject.geometry, sound_gen="sound" in job.modalities, action_gen="action" in job.modalities)
    codecs = {name: count for name, count in subject.codecs.items() if name in job.components}
    return replace(subject, geometry=geometry, codecs=codecs)


def parts(job: Job) -> list[PlannedEngine]:
    """Every engine of the build, as it is planned."""
    workloads = [Workload(p.name, job.options.mode, p, 1, 1) for p in job.profiles]
    subject, steps = _subject(job), job.schedule.steps
    distilled = subject.sampling.distilled_sigmas is not None
    chosen = precision(job.recipe, job.precision.overrides, job.target, subject.geometry, steps, distilled=distilled)
    guided = job.options.loop == "device" and any(job.schedule.guided)
    external = job.options.weights == "external"
    return components(subject, workloads, chosen, 2 if guided else 1, job.memory_budget, external=external)
