"""Requests through a bundle that is complete except for its place, made as a user makes them.

This covers all that is between a request and the models: edges, tables, the request record, what runs for which prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmos_export.bundle import Manifest, Verdict
from cosmos_export.compiler.cuts import chains
from cosmos_export.compiler.published import Lowered
from cosmos_export.diagnostics import FindingError
from cosmos_export.evaluation.parity import REPORT, Measured, Parity
from cosmos_export.evaluation.requested import TABLE_LIMIT, StepModels, schedule_problems, table_problems
from cosmos_export.ir.program import Program
from cosmos_export.runtime import load_bundle
from cosmos_export.sampling import CheckpointSampling, Schedule
from cosmos_export.targets.backends import reference_backend


def sampling_verdict(
    root: Path, staged: Manifest, schedule: Schedule, mode: str, stated: CheckpointSampling
) -> Verdict:
    """CX621: the bundle at ``root`` would be sampled otherwise than ``schedule`` and the checkpoint say."""
    problems = [
        *schedule_problems(staged, schedule, mode, stated),
        *table_problems(root, schedule, stated.scheduler),
    ]
    if problems:
        raise FindingError("CX621", f"the bundle is not sampled as the checkpoint says: {'; '.join(problems)}", REPORT)
    metric = "timesteps, coefficients and time embeddings"
    return Verdict("schedule", "tables", metric, TABLE_LIMIT, "pass", f"{schedule.steps} steps")


def compare_guided(
    parity: Parity, plain: Program, lowered: Lowered, schedule: Schedule, scheduler: Mapping[str, Any]
) -> tuple[Measured, ...]:
    """The unquantized program under guidance, where the bundle is quantized and a case can be compared."""
    found = parity.guided(plain, schedule, scheduler) if lowered.quantized else None
    return () if found is None else (found,)


def compare_requests(
    parity: Parity, root: Path, lowered: Lowered, schedule: Schedule, scheduler: Mapping[str, Any]
) -> tuple[Measured, ...]:
    """A request of every mode through the bundle at ``root``; nothing where no case can be compared.

    A quantized bundle loses what its recipe does, and is held to its own models.
    """
    models = None
    if lowered.quantized:
        forms, cut = lowered.forms, chains(lowered.pieces)
        models = StepModels(forms.program, root / "onnx", lowered.suffix, forms.bodies, cut)
    bundle = load_bundle(root, backend=reference_backend().name, device="cpu")
    found = parity.requests(bundle, schedule, scheduler, models)
    return () if found is None else (found,)


def not_requested(why: str) -> Verdict:
    """The verdict where no request was compared."""
    return Verdict("request", "bundle", "relative L2", None, "not-measured", why)


def require_requests(measured: Sequence[Measured]) -> None:
    """CX622: a request gave something else than the published implementation does."""
    failed = [one for one in measured if not one.passed]
    if failed:
        what = "; ".join(f"{m.stage} of mode {m.case}: {m.value:.1e}, allowed {m.limit:.0e}" for m in failed)
        raise FindingError(
            "CX622", f"the bundle does not compute what the published implementation computes: {what}", REPORT
        )
