"""Remarks on options that do not go together and are allowed, for the end of a build."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cosmos_export.calibration.table import ScaleTable
from cosmos_export.compiler.coverage import TableCoverage, coverage_note
from cosmos_export.sampling import Schedule
from cosmos_export.targets.profiles import Profile

_DIMS = (("sound", "sound_len", "480p-121f+sound"), ("action", "action_len", "policy-droid"))
"""Modality, the dim of a profile that says how much of it a request may have, and a profile that has some."""


def opening_remarks(
    modalities: Sequence[str],
    profiles: Sequence[Profile],
    scales: ScaleTable | None,
    coverage: TableCoverage,
    mode: str,
    schedule: Schedule,
) -> tuple[str, ...]:
    """Everything that can be said of these options before the build begins."""
    found = (*unused_modalities(modalities, profiles), *other_schedule(scales, mode, schedule), coverage_note(coverage))
    return tuple(filter(None, found))


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
