"""A build request, and the job that it becomes once it has been found possible. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from cosmos_export.calibration.table import ScaleTable
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.options import BuildOptions
from cosmos_export.precision.recipe import Assignment, Recipe
from cosmos_export.sampling import Schedule, Segment
from cosmos_export.stamps import Inputs, require_unchanged
from cosmos_export.targets import Target
from cosmos_export.targets.backends import Backend, backend_of
from cosmos_export.targets.profiles import Profile


@dataclass(frozen=True)
class Job:
    """A request that has been found possible."""

    options: BuildOptions
    checkpoint: Checkpoint
    target: Target
    profiles: tuple[Profile, ...]
    modalities: tuple[str, ...]
    outputs: tuple[str, ...]
    components: tuple[str, ...]
    schedule: Schedule
    recipe: Recipe
    precision: Assignment
    scales: ScaleTable | None
    memory_budget: int | None = None
    """Memory budget in bytes; None where no engine is built here."""
    scale_files: Inputs = field(default_factory=lambda: Inputs("the scale table", ()))
    """The files of ``scales`` as they were when it was read."""
    part_of: int | None = None
    """Layers of the whole model, where ``checkpoint`` is its first ones; None: it is the whole."""

    @property
    def inputs(self) -> tuple[Inputs, ...]:
        """All that is read from files during the build."""
        return self.checkpoint.inputs, self.scale_files

    def require_inputs(self) -> None:
        """CX118 where an input has changed since it was opened."""
        require_unchanged(self.inputs, "the build")

    @property
    def layers(self) -> int:
        return self.checkpoint.geometry.num_hidden_layers

    @property
    def quantized(self) -> bool:
        return bool(self.precision.schemes)

    @property
    def generator_engines(self) -> int:
        """Engines that have the generator's weights: one for each way in which steps compute, or for each segment."""
        return len(self.segments) if self.options.loop == "device" else len(set(self.precision.step_keys()))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Steps that one engine of a loop on the device computes: alike by guidance and by precision."""
        return self.schedule.segments_by(self.precision.segment_keys(separate=self.backend.separates_weight_only_steps))

    @property
    def backend(self) -> Backend:
        return backend_of(self.target)

    @property
    def closed_segments(self) -> tuple[Segment, ...]:
        """The segments whose loops run on the device by themselves; none where the host runs the loop."""
        return self.segments if self.options.loop == "device" else ()
