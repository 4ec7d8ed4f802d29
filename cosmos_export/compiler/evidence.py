"""The measurements of a build as it goes, and the result that is made of it at the end, or where a finding ends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cosmos_export.bundle import Manifest, Verdict
from cosmos_export.compiler.artifacts import Engine
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.losses import Losses
from cosmos_export.compiler.metering import Costs, Meter
from cosmos_export.evaluation.parity import Measured
from cosmos_export.ir.program import Program
from cosmos_export.passes.pipeline import Report

TRANSFORMER = "transformer"


@dataclass(frozen=True)
class Evidence:
    """Measurements and remarks in the order in which the stages make them. Entries are added and never removed, so a
    finding that ends a build does not lose what was measured before it."""

    passes: list[Report] = field(default_factory=list)
    parity: list[Measured] = field(default_factory=list)
    quality: list[Measured] = field(default_factory=list)
    """How far results of quantized loops are from the unquantized model's."""
    losses: list[Losses] = field(default_factory=list)
    """Losses by quantization; empty where nothing is quantized."""
    not_compared: dict[str, str] = field(default_factory=dict)
    """Component → why it was not compared with diffusers'."""
    verdicts: list[Verdict] = field(default_factory=list)
    """Verdicts of checks that have no number."""
    notes: list[str] = field(default_factory=list)
    """Notes that a reader of the result should know and would not expect."""
    engines: list[Engine] = field(default_factory=list)
    dumps: list[Path] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True)
class BuildResult:
    """Work and measurements of a build. ``manifest`` is None where it stopped at a pass, or a finding ended it."""

    job: Job
    program: Program | None
    """The program that every form is made from; None where a finding ended the build."""
    passes: tuple[Report, ...]
    parity: tuple[Measured, ...]
    quality: tuple[Measured, ...]
    losses: Losses | None
    not_compared: Mapping[str, str]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    engines: tuple[Engine, ...]
    dumps: tuple[Path, ...]
    costs: Costs
    manifest: Manifest | None = None


def result_of(
    job: Job, evidence: Evidence, program: Program | None = None, manifest: Manifest | None = None
) -> BuildResult:
    """The result of ``job`` as far as ``evidence`` goes."""
    return BuildResult(
        job=job,
        program=program,
        passes=tuple(evidence.passes),
        parity=tuple(evidence.parity),
        quality=tuple(evidence.quality),
        losses=evidence.losses[-1] if evidence.losses else None,
        not_compared=dict(evidence.not_compared),
        verdicts=tuple(evidence.verdicts),
        notes=tuple(evidence.notes),
        engines=tuple(evidence.engines),
        dumps=tuple(evidence.dumps),
        costs=evidence.meter.costs(),
        manifest=manifest,
    )
