"""A build request, and the job that it becomes once it has been found possible. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_export.bundle import RequestRecord
from cosmos_export.calibration.table import ScaleTable
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.compiler.coverage import TableCoverage
from cosmos_export.compiler.planned import Prediction
from cosmos_export.options import LoopMode, ParityMode, QualityMode, WeightsMode
from cosmos_export.plan.sizes import largest_part
from cosmos_export.precision.recipe import Assignment
from cosmos_export.sampling import Schedule, Segment
from cosmos_export.stamps import Inputs, require_unchanged
from cosmos_export.targets import Target
from cosmos_export.targets.backends import Backend, backend_of
from cosmos_export.targets.profiles import Profile


@dataclass(frozen=True)
class Job:
    """A request that has been found possible: what its options resolved to, under their names, and all that follows
    from them before work begins. Each of it is computed once, in `cosmos_export.compiler.options.resolve`."""

    checkpoint: Checkpoint
    target: Target
    profiles: tuple[Profile, ...]
    modalities: tuple[str, ...]
    outputs: tuple[str, ...]
    components: tuple[str, ...]
    mode: str
    loop: LoopMode
    weights: WeightsMode
    kernels: tuple[str, ...]
    parity: ParityMode
    quality: QualityMode
    until: str | None
    dump: Path | None
    cache: Path | None
    graphs: Path | None
    created_by: str | None
    memory_budget: int | None
    """In bytes; None where no engine is built here."""

    schedule: Schedule
    precision: Assignment
    scales: ScaleTable | None
    calibration: Path | None
    """The directory of ``scales``."""
    scale_files: Inputs
    """The files of ``scales`` as they were when it was read."""
    request: RequestRecord
    """For those who will make requests; without the prompt, whose pieces are compiled during the build."""
    plan: Prediction
    coverage: TableCoverage
    notes: tuple[str, ...]
    """Notes on the checkpoint, for before the build and after it."""
    remarks: tuple[str, ...]
    """Remarks on options that do not go together and are allowed, for the end of the build."""
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
    def largest_part(self) -> int | None:
        """Memory that the weights of one engine may take in the builder, in bytes; None: as much as they need."""
        return None if self.memory_budget is None else largest_part(self.memory_budget, self.layers)

    @property
    def external(self) -> bool:
        """Whether engines take their large weights as inputs."""
        return self.weights == "external"

    @property
    def backend(self) -> Backend:
        return backend_of(self.target)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The steps that one engine of a loop on the device computes, alike by guidance and by precision; none where
        the host runs the loop."""
        if self.loop == "host":
            return ()
        apart = self.backend.separates_weight_only_steps
        return self.schedule.segments_by(self.precision.segment_keys(separate=apart))
