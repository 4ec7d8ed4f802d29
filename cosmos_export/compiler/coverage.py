"""Parts of a build's work that its scale table never saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosmos_export.bundle import Verdict
from cosmos_export.calibration.coverage import part
from cosmos_export.compiler.job import Job
from cosmos_export.diagnostics import FindingError
from cosmos_export.sampling import Schedule
from cosmos_export.targets.profiles import Profile

_ROWS = {"sound": "sound_len", "action": "action_len"}
"""Modality → the dim of a profile that says how many rows of it a request may have."""
_METRIC = "what the build runs and the table never saw"


@dataclass(frozen=True)
class TableCoverage:
    """Parts of a build's work that its scale table never saw."""

    missing: tuple[str, ...] | None
    """Modalities that requests may have, the mode that is built for, and quarters of its schedule and branches of
    guidance there; None where the table does not say what it saw, or there is none."""
    table: bool
    """Whether the build has a scale table."""


def table_coverage(job: Job) -> TableCoverage:
    """The parts of the work of ``job`` that its scale table never saw."""
    lineage = {} if job.scales is None else job.scales.lineage
    seen = lineage.get("coverage")
    if not isinstance(seen, Mapping):
        return TableCoverage(None, job.scales is not None)
    found = list(_unseen(seen, job.modalities, job.profiles, job.schedule))
    made = lineage.get("schedules")
    modes = {str(text).partition(":")[0] for text in made} if isinstance(made, (list, tuple)) else set[str]()
    if modes and job.options.mode not in modes:
        found.append(f"mode {job.options.mode} (it saw {', '.join(sorted(modes))})")
    return TableCoverage(tuple(found), True)


def _unseen(
    seen: Mapping[str, Any], modalities: Sequence[str], profiles: Sequence[Profile], schedule: Schedule
) -> Iterator[str]:
    needed: dict[str, set[str]] = {}
    for step, guided in enumerate(schedule.guided):
        needed.setdefault(part(step, schedule.steps), set()).update(("cond", "uncond") if guided else ("cond",))
    for modality in modalities:
        dim = _ROWS.get(modality)
        if dim is not None and not any(profile.dims[dim].max for profile in profiles):
            continue  # no request has any
        parts = seen.get(modality)
        if not isinstance(parts, Mapping):
            yield modality
            continue
        for quarter, branches in needed.items():
            cells = parts.get(quarter)
            missing = sorted(b for b in branches if not isinstance(cells, Mapping) or not cells.get(b))
            if missing:
                yield f"{modality} at {quarter} of the steps ({', '.join(missing)})"


def require_coverage(coverage: TableCoverage) -> None:
    """CX327: the scale table never saw what the build runs."""
    if coverage.missing:
        raise FindingError(
            "CX327",
            f"the scale table never saw {'; '.join(coverage.missing)}, which this build runs",
            "calibrate on data of that kind, or leave it out (--modalities, --profile); or accept it with `--quality "
            "report`",
        )


def coverage_note(coverage: TableCoverage) -> str:
    """A note on it for a reader of the result; empty where the table saw everything."""
    missing = coverage.missing
    return f"the scale table never saw {'; '.join(missing)}: ranges there are a guess" if missing else ""


def coverage_verdicts(coverage: TableCoverage) -> tuple[Verdict, ...]:
    """Verdicts on it for the manifest."""
    if not coverage.table:
        return ()
    if coverage.missing is None:
        return (Verdict("coverage", "scale table", _METRIC, 0.0, "not-measured", "the table does not say what it saw"),)
    note = coverage_note(coverage)
    return (Verdict("coverage", "scale table", _METRIC, 0.0, "fail" if coverage.missing else "pass", note),)
