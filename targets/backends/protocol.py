"""The questions that a backend answers itself, so that nothing outside of this folder compares with its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, runtime_checkable

from cosmos_export.diagnostics import CosmosExportError, UnsupportedError, UserError
from cosmos_export.targets.description import Target
from cosmos_export.targets.profiles import Profile

if TYPE_CHECKING:
    from cosmos_export.bundle import BundleFiles, BundleWriter, EngineCheck, Manifest
    from cosmos_export.ir.graph import Graph
    from cosmos_export.ir.program import Loop
    from cosmos_export.ir.spec import WeightBinding
    from cosmos_export.progress import Progress
    from cosmos_export.targets.onnx.weights import Stored
    from cosmos_export.targets.sessions import Array, Executor
    from cosmos_export.targets.trt.checks import WantedEngine
    from cosmos_export.targets.trt.common import EngineReport
    from cosmos_export.targets.trt.engine_inspector import EngineSummary
    from cosmos_export.targets.trt.engines import EngineOrder


@dataclass(frozen=True)
class Requirement:
    """A distribution that a backend needs."""

    distribution: str
    extra: str
    """This project's extra that installs it."""


@dataclass(frozen=True)
class BuildAsked:
    """A build request, as far as it is known before the checkpoint is opened."""

    external_weights: bool = False
    kernels: tuple[str, ...] = ()
    memory_budget: bool = False


@dataclass(frozen=True)
class PrecisionAsked:
    """The precision of a build, for one checkpoint."""

    recipe: str
    schemes: frozenset[str]
    checkpoint: Path
    checkpoint_dtype: str
    """``bf16`` or ``fp32``."""
    loop: str
    """``host`` or ``device``."""
    steps: int
    weight_only_steps: int
    """Steps that multiply narrow weights by wide activations."""
    profiles: Sequence[Profile]


@dataclass(frozen=True)
class LoweredGraph:
    """A graph of the bundle whose weights are written, with the closed loop over it where it is the body of one."""

    name: str
    graph: Graph
    weights_file: str
    """Name of its file of weights beside the models."""
    places: Mapping[WeightBinding, Stored]
    """Where each weight is in that file."""
    loop: Loop | None = None
    tables: Mapping[str, Array] = field(default_factory=dict)
    """Rows of the loop for all steps, [steps, …]."""


class Engines(Protocol):
    """How the engines of a backend are built from models, and told from others."""

    built_here: bool
    """They are built on any machine; False: on the GPU that they run on, from requests that the bundle waits with."""
    module: str
    """The builder's Python module, under which the manifest has its version (``tools``)."""

    def require(self) -> None:
        """UnsupportedError CX404 where the builder is not installed. Does not import it."""

    def require_gpu(self, target: Target) -> None:
        """UnsupportedError CX405 where this machine cannot build for ``target``."""

    def key(self) -> Mapping[str, str]:
        """Facts that decide the bytes of an engine besides its model, target, profiles and settings."""

    def build(
        self, model: Path, output: Path, order: EngineOrder, target: Target, progress: Progress | None = None
    ) -> EngineReport:
        """Build ``model`` for ``target`` and write the engine to ``output``, or nothing. ToolError where it fails."""

    def inspect(self, path: Path) -> EngineSummary | None:
        """Contents of the engine at ``path``, read from the file; None where its format is not known."""

    def checks(self, wanted: WantedEngine, report: EngineReport, found: EngineSummary | None) -> list[EngineCheck]:
        """The part of ``wanted`` that can be compared with the engine, from its builder's report and from what was
        ``found`` in it; one check at least."""

    def problem(self, file: BinaryIO, path: str, manifest: Manifest) -> str | None:
        """Why the engine ``path``, which ``file`` reads from its beginning, is not one of ``manifest``; None: nothing
        that its header tells. Loads no builder."""


@runtime_checkable
class Backend(Protocol):
    """Software that runs graphs: what is written for it, what it cannot do, and how it is opened.

    To add one, write ``targets/backends/NAME.py`` with a class that inherits from this one and ``BACKEND``, its
    instance, and name it in a target's TOML. The facts without a value here must be given; what a method does by
    default follows from them. Methods import what is heavy, late: a machine that only runs bundles has neither torch
    nor onnx.
    """

    name: str
    title: str
    """Name as its makers write it."""
    devices: tuple[str, ...]
    """Kinds of devices that it runs on, its default first: ``cuda``, ``cpu``."""
    requirements: tuple[Requirement, ...]

    needs_gpu: bool = True
    """It is for the GPU that a target describes."""
    compiles_when_run: bool = False
    """Kernels are compiled when a bundle is first run: that needs PyTorch for the device, and a C++ compiler."""
    shares_weights: bool = False
    """One copy of a weight on the device serves every graph that reads it; otherwise each engine has its own."""
    separates_weight_only_steps: bool = False
    """In a loop on the device a step that multiplies narrow weights by wide activations is an engine of its own."""
    takes_kernels: bool = False
    """This project's kernels can be part of its engines, as plugins."""
    engines: Engines | None = None
    """None: it runs the models or graphs that a bundle has."""

    @property
    def builds_here(self) -> bool:
        """Whether a build makes engines; otherwise there are none, or they are built on the GPU."""
        return self.engines is not None and self.engines.built_here

    @property
    def finished_here(self) -> bool:
        """Whether a build, on whatever machine, leaves nothing to do for the one that runs the bundle."""
        return not self.compiles_when_run and (self.engines is None or self.engines.built_here)

    def refusals(self, asked: BuildAsked, target: Target) -> Iterator[CosmosExportError]:
        """Why ``asked`` is not possible, each with what is possible instead."""
        if asked.external_weights and self.engines is None:
            yield UnsupportedError(
                "CX452",
                f"`--weights external` is about engines, and target `{target.name}` has none with {self.name}",
                "leave it out: the bundle has the weights once without it",
            )
        if asked.kernels and not self.takes_kernels:
            yield UnsupportedError(
                "CX459",
                f"`--kernels` makes plugins of TensorRT, and target `{target.name}` is built with {self.name}",
                "`--backend tensorrt` where the target has it; with inductor kernels are chosen when it runs "
                "(`bench --kernels`)",
            )
        if asked.memory_budget and not self.builds_here:
            yield UserError(
                "CX456",
                f"a memory budget bounds the builder of engines, and for target `{target.name}` with {self.name} none "
                "are built here",
                "leave `--memory-budget` out",
            )

    def precision_refusals(self, asked: PrecisionAsked) -> Iterator[UnsupportedError]:
        """Why ``asked`` cannot be computed, of schemes that the target has kernels for."""
        yield from ()

    def write(self, lowered: LoweredGraph, writer: BundleWriter) -> None:
        """Write what this backend runs ``lowered`` from, besides the ONNX models that every bundle has."""
        return None  # noqa: RET501 (a protocol's method without a statement would be abstract)

    def open(self, files: BundleFiles, device: str | None) -> Executor:
        """A device with the bundle ``files``, which is verified: ``cuda[:N]`` or ``cpu``, None: the default.

        UnsupportedError CX503: not installed, or in another version than the bundle is for; CX505: it has no device
        that runs this bundle.
        """
