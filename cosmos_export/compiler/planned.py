"""The prediction of `plan` for a build: made once, before any work, and held against the build's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cosmos_export.bundle import Planned
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.compiler.overall import expected_seconds
from cosmos_export.compiler.selection import tokenizer_bytes
from cosmos_export.options import LoopMode
from cosmos_export.plan.precision import added_up
from cosmos_export.plan.sizes import BUILDER_BYTES, PlannedEngine, builder_bytes, components, gates_bytes, host
from cosmos_export.plan.subject import Subject, from_checkpoint
from cosmos_export.plan.workload import Workload
from cosmos_export.precision.recipe import Assignment
from cosmos_export.sampling import Schedule
from cosmos_export.targets import Target
from cosmos_export.targets.backends import backend_of

if TYPE_CHECKING:
    from cosmos_export.compiler.artifacts import Engine

_BLOCK_BYTES = 512
"""Size of a block in the counter of blocks that a file has on the disk."""
_DISK_MARGIN = 1.05
"""Share of the predicted size."""
_BODIES = ("denoise", "generator")
"""Beginning of the names of engines that compute steps; each has the generator's weights."""


@dataclass(frozen=True)
class Prediction:
    """The sizes, memory and times that are expected of a build."""

    engines: Mapping[str, PlannedEngine]
    """Every engine of the build by its name in plans: the bodies of a loop are one, ``generator``."""
    peak_anonymous_bytes: int
    """Memory that no file backs."""
    copies: int
    """Engines that have the generator's weights: one for each way in which steps compute, or for each segment."""
    bundle_bytes: int
    """Disk that the bundle takes: models with their weights, and engines."""
    tokenizer_bytes: int
    gates_bytes: int
    """Memory of measuring a quantized model, beside the builders."""
    seconds: Mapping[str, float]
    """Seconds of each task of the build, by its name, in the order in which they come."""
    comparable: bool
    """Whether plans are made for such weights: bf16 ones, in the engines."""

    @property
    def required_bytes(self) -> int:
        """Disk that the bundle is to find, with a margin."""
        return int(self.bundle_bytes * _DISK_MARGIN) + self.tokenizer_bytes

    def builder_bytes(self, graph: str) -> int:
        """Memory of the builder of the engine of ``graph``."""
        part = self._of(graph.partition("_part_")[0])
        return BUILDER_BYTES if part is None else builder_bytes(part)

    def _of(self, graph: str) -> PlannedEngine | None:
        return self.engines.get("generator" if graph.startswith(_BODIES) else graph)

    def beside(self, built: Sequence[Engine], peak_anonymous_bytes: int) -> Mapping[str, Planned]:
        """Bytes of every engine that was ``built`` and of memory that no file backs, each beside what was found. Empty
        where there are no engines, and where plans are not `comparable`."""
        if not built or not self.comparable:
            return {}
        found = {}
        for engine in built:
            graph, _, number = engine.graph.partition("_part_")
            part = self._of(graph)
            if part is None:
                continue
            # The bodies of a host's loop are numbered by how many steps have them, from the second on.
            body = int(graph.removeprefix("generator").removeprefix("_") or 1) if graph.startswith("generator") else 1
            form, index = part.forms[body - 1], int(number or 1) - 1
            if bool(number) == (len(form) > 1) and index < len(form):
                found[f"engine {engine.graph}"] = Planned(form[index], engine.report.size_bytes)
        return {**found, "peak anonymous memory": Planned(self.peak_anonymous_bytes, peak_anonymous_bytes)}


def predict(
    checkpoint: Checkpoint,
    modalities: Sequence[str],
    parts: Sequence[str],
    target: Target,
    workloads: Sequence[Workload],
    assigned: Assignment,
    schedule: Schedule,
    loop: LoopMode,
    *,
    memory_budget: int | None,
    external: bool,
) -> Prediction:
    """The prediction for ``checkpoint`` with the ``modalities`` and components (``parts``) that are built.

    ``memory_budget`` in bytes; None: nothing is cut. ``external``: engines take their large weights as inputs.
    """
    subject, quantized, here = _subject(checkpoint, modalities, parts), bool(assigned.schemes), backend_of(target)
    chosen, on_device = added_up(assigned, subject.geometry), loop == "device"
    branches = 2 if on_device and any(schedule.guided) else 1
    engines = components(subject, workloads, chosen, branches, memory_budget, external=external)
    copies = chosen.engines(schedule, target, loop)
    built = host(subject, engines, copies, True, memory_budget, quantized)
    disk = built if here.builds_here else host(subject, engines, copies, False)
    loops = len(schedule.segments) if on_device else 0
    return Prediction(
        engines={part.name: part for part in engines},
        peak_anonymous_bytes=built.peak_anonymous_bytes,
        copies=copies,
        bundle_bytes=_without_holes(disk.disk_bytes, checkpoint),
        tokenizer_bytes=tokenizer_bytes(checkpoint, parts),
        gates_bytes=gates_bytes(checkpoint.geometry) if quantized else 0,
        seconds=expected_seconds(checkpoint, parts, loops if here.builds_here else None),
        comparable=checkpoint.dtype == "bf16" and not external,
    )


def _subject(checkpoint: Checkpoint, modalities: Sequence[str], parts: Sequence[str]) -> Subject:
    """The subject that ``checkpoint`` is with what is built of it."""
    subject = from_checkpoint(checkpoint)
    geometry = replace(subject.geometry, sound_gen="sound" in modalities, action_gen="action" in modalities)
    codecs = {name: count for name, count in subject.codecs.items() if name in parts}
    return replace(subject, geometry=geometry, codecs=codecs)


def _without_holes(size_bytes: int, checkpoint: Checkpoint) -> int:
    """Disk that a bundle of ``size_bytes`` in bf16 takes: what are holes in the checkpoint are holes in it."""
    files = [path.stat() for path in checkpoint.files()]
    there = sum(status.st_blocks * _BLOCK_BYTES for status in files) / max(1, sum(s.st_size for s in files))
    wide = 2 if checkpoint.dtype == "fp32" else 1
    return int(wide * size_bytes * min(1.0, there))
