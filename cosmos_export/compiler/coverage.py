"""Parts of a build's work that its scale table never saw."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosmos_export.bundle import Verdict
from cosmos_export.calibration.coverage import part
from cosmos_export.calibration.table import ScaleTable
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


def table_coverage(
    scales: ScaleTable | None,
    modalities: Sequence[str],
    profiles: Sequence[Profile],
    schedule: Schedule,
    mode: str,
) -> TableCoverage:
    """The parts of a build that its scale table never saw."""
    lineage = {} if scales is None else scales.lineage
    seen = lineage.get("coverage")
    if not isinstance(seen, Mapping):
        return TableCoverage(None, scales is not None)
    needed = _needed(schedule)
    found = list(_unseen(seen, modalities, profiles, needed))
    found += _unseen_mode(lineage, mode, needed)
    return TableCoverage(tuple(found), True)


_Needed = Mapping[str, Collection[str]]
"""Parts of a schedule, and the branches of guidance that run there."""


def _needed(schedule: Schedule) -> _Needed:
    needed: dict[str, set[str]] = {}
    for step, guided in enumerate(schedule.guided):
        needed.setdefault(part(step, schedule.steps), set()).update(("cond", "uncond") if guided else ("cond",))
    return needed


def _unseen(
    seen: Mapping[str, Any], modalities: Sequence[str], profiles: Sequence[Profile], needed: _Needed
) -> Iterator[str]:
    for modality in modalities:
        dim = _ROWS.get(modality)
        if dim is not None and not any(profile.dims[dim].max for profile in profiles):
            continue  # no request has any
        parts = seen.get(modality)
        if not isinstance(parts, Mapping):
            yield modality
            continue
        yield from _unseen_parts(modality, parts, needed)


def _unseen_mode(lineage: Mapping[str, Any], mode: str, needed: _Needed) -> Iterator[str]:
    """The mode that is built for, or parts of its schedule; of tables that do not say what they saw by mode, the mode
    alone."""
    seen, made = lineage.get("modes"), lineage.get("schedules")
    if isinstance(seen, Mapping):
        modes = {str(name) for name in seen}
    else:
        modes = {str(text).partition(":")[0] for text in made} if isinstance(made, (list, tuple)) else set[str]()
    if modes and mode not in modes:
        yield f"mode {mode} (it saw {', '.join(sorted(modes))})"
    elif isinstance(seen, Mapping) and isinstance(parts := seen.get(mode), Mapping):
        yield from _unseen_parts(f"mode {mode}", parts, needed)


def _unseen_parts(what: str, parts: Mapping[str, Any], needed: _Needed) -> Iterator[str]:
    for quarter, branches in needed.items():
        cells = parts.get(quarter)
        missing = sorted(b for b in branches if not isinstance(cells, Mapping) or not cells.get(b))
        if missing:
            yield f"{what} at {quarter} of the steps ({', '.join(missing)})"


def require_coverage(coverage: TableCoverage) -> None:
    """CX327: the scale table never saw what the build runs."""
    if coverage.missing:
        raise FindingError(
            "CX327",
            f"the scale table never saw {'; '.join(coverage.missing)}, which this build runs",
            "calibrate on data of that kind and with more --samples, or leave it out (--modalities, --profile); or "
            "accept it with `--quality report`",
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
