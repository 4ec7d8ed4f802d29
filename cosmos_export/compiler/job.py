"""What a build is asked for, and the job that it becomes once it has been found possible. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cosmos_export.calibration.table import ScaleTable
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.precision.recipe import Assignment, Recipe
from cosmos_export.sampling import DEFAULT_MODE, Schedule, Segment
from cosmos_export.stamps import Inputs, require_unchanged
from cosmos_export.targets import Target
from cosmos_export.targets.backends import Backend, backend_of
from cosmos_export.targets.profiles import Profile

ParityMode = Literal["auto", "always", "never"]
LoopMode = Literal["host", "device"]
QualityMode = Literal["enforce", "report"]
WeightsMode = Literal["embedded", "external"]


@dataclass(frozen=True)
class BuildOptions:
    """A build request as the user gives it. ``output`` is None with ``until``: dumps only."""

    checkpoint: Path
    output: Path | None = None
    target: str = "cpu"
    backend: str | None = None
    """None: the target's own."""
    profiles: tuple[str, ...] = ("480p-121f",)
    modalities: tuple[str, ...] | None = None
    """None: all that the checkpoint generates."""
    outputs: tuple[str, ...] | None = None
    """Velocities to compute; None: all of the modalities."""
    components: tuple[str, ...] | None = None
    """Besides the transformer: `cosmos_export.compiler.selection.COMPONENTS`, or ``all`` or ``none``; None: all."""
    mode: str = DEFAULT_MODE
    """What the schedule's defaults are for: `cosmos_export.sampling.MODES`."""
    steps: int | None = None
    grid: str | None = None
    shift: float | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    loop: LoopMode = "host"
    """``device``: guidance, sampler and every step inside engines, one for each segment of the schedule; ``host``: one
    step a call."""
    recipe: str | None = None
    """What each product computes in: `cosmos_export.precision.recipe.recipe_names`, or ``auto``: what
    `cosmos_export.plan.choose` takes for the target, the profiles and the mode. None: as the checkpoint is."""
    overrides: tuple[str, ...] = ()
    """``PLACE=SCHEME``, over the recipe's own rules."""
    calibration: Path | None = None
    """A scale table, where the recipe or an override quantizes activations."""
    kernels: tuple[str, ...] = ()
    """This project's kernels that TensorRT is to run as plugins: `cosmos_export.kernels.description.PLUGINS`."""
    weights: WeightsMode = "embedded"
    """``external``: large weights are inputs of the engines, which stay small; they lie in the bundle once."""
    quality: QualityMode = "enforce"
    """Whether a loss of whole steps beyond its limit (gate G2) ends the build."""
    parity: ParityMode = "auto"
    until: str | None = None
    dump: Path | None = None
    force: bool = False
    resume: bool = False
    """Go on from what an interrupted build of the same output has finished."""
    memory_budget: str | None = None
    """Memory that no file backs which the build may take, ``16GiB`` or ``16GB``; an engine that needs more is cut into
    several. None: what this machine has free, and a margin less."""
    ignore_adapters: bool = False
    """Build the weights without the adapters that lie beside them."""
    cache: Path | None = None
    """Directory that knows engines of other bundles (`cosmos_export.compiler.cache`); None: every engine is built."""
    graphs: Path | None = None
    """Directory of captured graphs, which may be the same; None: every graph is captured."""


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
    """In bytes; None where no engine is built here."""
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
