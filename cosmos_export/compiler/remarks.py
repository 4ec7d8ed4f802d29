"""Remarks on options that do not go together and are allowed, for the end of a build."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cosmos_export.calibration.table import ScaleTable
from cosmos_export.compiler.coverage import coverage_note, table_coverage
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.request_record import checkpoint_notes
from cosmos_export.sampling import Schedule
from cosmos_export.targets.profiles import Profile

_DIMS = (("sound", "sound_len", "480p-121f+sound"), ("action", "action_len", "policy-droid"))
"""Modality, the dim of a profile that says how much of it a request may have, and a profile that has some."""


def opening_remarks(job: Job) -> list[str]:
    """Everything that can be said of ``job`` before it begins."""
    found = [*checkpoint_notes(job.checkpoint), *unused_modalities(job.modalities, job.profiles)]
    found += other_schedule(job.scales, job.options.mode, job.schedule)
    return [*found, *filter(None, [coverage_note(table_coverage(job))])]


def unused_modalities(modalities: Sequence[str], profiles: Sequence[Profile]) -> Iterator[str]:
    """Modalities that no profile has any of."""
    for modality, dim, profile in _DIMS:
        if modality in modalities and not any(p.dims[dim].max for p in profiles):
            yield (
                f"no profile has {modality}, so no request can: add one that does, as `--profile {profile}`, or leave "
                f"{modality} out of `--modalities`"
            )


def other_schedule(scales: ScaleTable | None, mode: str, schedule: Schedule) -> Iterator[str]:
    """A scale table that was made for ``mode``, and not on ``schedule``."""
    asked = schedule.text(mode)
    made = scales.lineage.get("schedules", ()) if scales is not None else ()
    if any(text.startswith(f"{mode}:") for text in made) and asked not in made:
        yield f"the scale table was made on `{'`, `'.join(made)}`, and this build is for `{asked}`: ranges may be off"
