"""The recipe for a model, a target and workloads: the fastest by prediction of those that run and fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.plan.latency import latency, missing_rates
from cosmos_export.plan.precision import PlannedPrecision, precision
from cosmos_export.plan.sizes import components, device, weight_copies
from cosmos_export.plan.subject import Subject
from cosmos_export.plan.workload import Workload
from cosmos_export.precision.recipe import DEFAULT, Recipe, load_recipe, recipe_names
from cosmos_export.sampling import Schedule
from cosmos_export.targets import Target
from cosmos_export.targets.description import Efficiency

AUTO = "auto"
"""Name that asks for the choice, in the place of a recipe's."""
NEAR = 1.05
"""Times within this of the fastest count as equal: then the recipe with the most bits is chosen."""
_ALIKE = Efficiency(linear=0.6, attention=0.6, codec=0.3, basis="none: for comparing recipes on one target")
"""Where a target has no measured efficiency: recipes are compared with each other, and no time is said."""


@dataclass(frozen=True)
class Tried:
    """A recipe on a target. What is not known is None."""

    recipe: Recipe
    refusal: str
    """Why it is not for this target or these workloads; empty where it is."""
    weights_bytes: int | None = None
    """Size of all weights, each counted once, however many engines hold it."""
    fit: str | None = None
    """``resident``: everything at once; ``phases``: what a phase needs; ``no``."""
    relative_s: float | None = None
    """Predicted time of all workloads together; without a measured efficiency only good for comparing."""
    measured: bool = False
    """The target's efficiency is measured, so that the time is a prediction."""


def choose(
    subject: Subject,
    target: Target,
    workloads: Sequence[Workload],
    schedules: Sequence[Schedule],
    offered: int | None,
    loop: str = "host",
    refusal: Callable[[Recipe], str] = lambda recipe: "",
) -> tuple[Recipe, list[Tried]]:
    """The recipe to take, and what was tried. ``offered``: device memory; None for as much as there is. ``loop``: who
    runs it, the host or the device. ``refusal``: why whoever asks cannot have a recipe; empty where it can.

    Experimental recipes are left to those who ask for them by name. Of recipes that fit (resident before in phases) the
    fastest is taken, and of those as fast as it the one with the most bits. Where nothing fits, the smallest; where all
    are refused, the default.
    """
    tried = [
        _try(load_recipe(name), subject, target, workloads, schedules, offered, loop, refusal)
        for name in recipe_names()
    ]
    possible = [one for one in tried if not one.refusal]
    for fit in ("resident", "phases"):
        fitting = [one for one in possible if one.fit == fit]
        if fitting:
            fastest = min(_time(one) for one in fitting)
            equal = [one for one in fitting if _time(one) <= NEAR * fastest]
            return max(equal, key=lambda one: one.weights_bytes or 0).recipe, tried
    if not possible:
        return load_recipe(DEFAULT), tried
    return min(possible, key=lambda one: one.weights_bytes or 0).recipe, tried


def _time(one: Tried) -> float:
    return float("inf") if one.relative_s is None else one.relative_s


def _try(
    recipe: Recipe,
    subject: Subject,
    target: Target,
    workloads: Sequence[Workload],
    schedules: Sequence[Schedule],
    offered: int | None,
    loop: str,
    refusal: Callable[[Recipe], str],
) -> Tried:
    if recipe.experimental:
        return Tried(recipe, "experimental")
    unwise = [w.mode for w in workloads if w.mode in recipe.not_for]
    if unwise:
        return Tried(recipe, f"not for {unwise[0]}")
    distilled = subject.sampling.distilled_sigmas is not None
    try:
        chosen = [precision(recipe, (), target, subject.geometry, s.steps, distilled=distilled) for s in schedules]
    except UnsupportedError as error:
        return Tried(recipe, error.message)
    if refused := refusal(recipe):
        return Tried(recipe, refused)
    branches = 2 if loop == "device" and any(any(schedule.guided) for schedule in schedules) else 1
    parts = components(subject, workloads, chosen[0], branches)
    pairs = list(zip(workloads, schedules, strict=True))
    engines = max(one.engines(schedule, target, loop) for one, schedule in zip(chosen, schedules, strict=True))
    share, copies = chosen[0].cache_share, weight_copies(target, engines)
    devices = [device(subject, workload, parts, any(schedule.guided), copies, share) for workload, schedule in pairs]
    fit = "resident"
    if offered is not None and max(d.resident_bytes for d in devices) > offered:
        fit = "phases" if max(d.phased_bytes for d in devices) <= offered else "no"
    times = [_seconds(subject, w, s, c, target) for (w, s), c in zip(pairs, chosen, strict=True)]
    seconds = sum(t for t in times if t is not None) if None not in times else None
    weights = sum(part.weight_bytes for part in parts)
    return Tried(recipe, "", weights, fit, seconds, target.efficiency is not None)


def _seconds(
    subject: Subject, workload: Workload, schedule: Schedule, chosen: PlannedPrecision, target: Target
) -> float | None:
    if missing_rates(chosen, target):
        return None
    known = replace(target, efficiency=target.efficiency or _ALIKE)
    found = latency(subject, workload, schedule, chosen, known)
    return None if found is None else found.total_s
