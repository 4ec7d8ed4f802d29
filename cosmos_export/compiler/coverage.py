"""What a build runs and its scale table never saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cosmos_export.bundle import Verdict
from cosmos_export.calibration.coverage import part
from cosmos_export.compiler.job import Job
from cosmos_export.diagnostics import FindingError

_ROWS = {"sound": "sound_len", "action": "action_len"}
"""Modality → the dim of a profile that says how many rows of it a request may have."""
_METRIC = "what the build runs and the table never saw"


def uncovered(job: Job) -> list[str] | None:
    """What of the job its table has not seen: modalities that requests may have, the mode it is built for, quarters of
    its schedule and branches of guidance there. None where the table does not say what it saw."""
    lineage = {} if job.scales is None else job.scales.lineage
    seen = lineage.get("coverage")
    if not isinstance(seen, Mapping):
        return None
    found = list(_unseen(job, seen))
    made = lineage.get("schedules")
    modes = {str(text).partition(":")[0] for text in made} if isinstance(made, (list, tuple)) else set[str]()
    if modes and job.options.mode not in modes:
        found.append(f"mode {job.options.mode} (it saw {', '.join(sorted(modes))})")
    return found


def _unseen(job: Job, seen: Mapping[str, Any]) -> Iterator[str]:
    schedule = job.schedule
    needed: dict[str, set[str]] = {}
    for step, guided in enumerate(schedule.guided):
        needed.setdefault(part(step, schedule.steps), set()).update(("cond", "uncond") if guided else ("cond",))
    for modality in job.modalities:
        dim = _ROWS.get(modality)
        if dim is not None and not any(profile.dims[dim].max for profile in job.profiles):
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


def require_coverage(job: Job) -> None:
    """CX327: the scale table never saw what the build runs, unless that is only reported."""
    missing = uncovered(job)
    if missing and job.options.quality == "enforce":
        raise FindingError(
            "CX327",
            f"the scale table never saw {'; '.join(missing)}, which this build runs",
            "calibrate on data of that kind, or leave it out (--modalities, --profile); or accept it with `--quality "
            "report`",
        )


def coverage_note(job: Job) -> str:
    """The same for a reader of the result; empty where the table saw everything."""
    missing = uncovered(job)
    return f"the scale table never saw {'; '.join(missing)}: ranges there are a guess" if missing else ""


def coverage_verdicts(job: Job) -> tuple[Verdict, ...]:
    """The same as a manifest has it."""
    if job.scales is None:
        return ()
    missing = uncovered(job)
    if missing is None:
        return (Verdict("coverage", "scale table", _METRIC, 0.0, "not-measured", "the table does not say what it saw"),)
    return (Verdict("coverage", "scale table", _METRIC, 0.0, "fail" if missing else "pass", coverage_note(job)),)
