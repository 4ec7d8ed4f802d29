"""Which forward passes are made, and whether they cover what the quantized model will run.

A pass is one request at one step on one branch of guidance. Steps are spread over the whole schedule by a sequence of
low discrepancy (van der Corput), different for each request, and the first and the last step are always among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cosmos_export.calibration.requests import Work
from cosmos_export.diagnostics import FindingError

Branch = Literal["cond", "uncond"]
RANGES = 4
"""Parts of a schedule that are each to be seen."""
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Sample:
    """A forward pass: the request ``work`` at ``step`` on ``branch``."""

    work: int
    step: int
    branch: Branch


def plan_samples(works: Sequence[Work], count: int) -> list[Sample]:
    """At most ``count`` different passes, equally many of each request; in the order of their requests."""
    found: dict[Sample, None] = {}
    for number in range(count):
        index, round_ = number % len(works), number // len(works)
        schedule = works[index].request.schedule
        place = (_van_der_corput(round_) + index * _GOLDEN) % 1
        step = int(place * schedule.steps)
        uncond = schedule.guided[step] and (round_ + index) % 2 == 1
        found[Sample(index, step, "uncond" if uncond else "cond")] = None
    samples = list(found)
    for step, choose in ((0, min), (-1, max)):
        at = choose(range(len(samples)), key=lambda i: samples[i].step / works[samples[i].work].request.schedule.steps)
        steps = works[samples[at].work].request.schedule.steps
        samples[at] = replace(samples[at], step=step % steps)
    guided = [replace(s, branch="cond") if not works[s.work].request.schedule.guided[s.step] else s for s in samples]
    return sorted(set(guided), key=lambda s: (s.work, s.step, s.branch))


def _van_der_corput(number: int, base: int = 3) -> float:
    """The base is not 2: whether ``number`` is even decides the branch, and must not decide the step as well."""
    value, share = 0.0, 1 / base
    while number:
        number, digit = divmod(number, base)
        value += digit * share
        share /= base
    return value


Coverage = dict[str, dict[str, dict[str, int]]]
"""Passes by modality, part of the schedule, and branch."""


def coverage(works: Sequence[Work], samples: Sequence[Sample]) -> Coverage:
    """What ``samples`` cover. Cells that no request can fill are left out; those that could be and are not are 0."""
    result: Coverage = {}
    for work in works:
        schedule = work.request.schedule
        for modality in modalities(work):
            for step in range(schedule.steps):
                cell = result.setdefault(modality, {}).setdefault(part(step, schedule.steps), {})
                for branch in ("cond", *(["uncond"] if schedule.guided[step] else [])):
                    cell.setdefault(branch, 0)
    for sample in samples:
        steps = works[sample.work].request.schedule.steps
        for modality in modalities(works[sample.work]):
            result[modality][part(sample.step, steps)][sample.branch] += 1
    return result


def part(step: int, steps: int) -> str:
    """The part of the schedule that ``step`` of ``steps`` lies in, in per cent."""
    index = step * RANGES // steps
    return f"{index * 100 // RANGES}-{(index + 1) * 100 // RANGES} %"


def modalities(work: Work) -> tuple[str, ...]:
    """What ``work`` has rows of."""
    request = work.request
    return ("vision", *(["sound"] if request.sound else []), *(["action"] if request.action is not None else []))


def require_coverage(found: Coverage, wanted: Sequence[str]) -> None:
    """Every modality of ``wanted`` is seen in every part of the schedule and on every branch; CX322."""
    for modality in wanted:
        if modality not in found:
            raise FindingError("CX322", f"nothing covers {modality}, which the checkpoint generates", _HINTS[modality])
    empty = [
        f"{modality} at {steps} of the steps ({branch})"
        for modality in wanted
        for steps, cells in found[modality].items()
        for branch, count in cells.items()
        if not count
    ]
    if empty:
        shown = "; ".join(empty[:4]) + (f" and {len(empty) - 4} more" if len(empty) > 4 else "")
        raise FindingError("CX322", f"too few passes: none of {shown}", "more --samples, or more --data")


_HINTS = {
    "vision": "add --data with clips, prompts or latents",
    "sound": "recorded latents with `sound`, or --rollout; or leave it out with --modalities vision,…",
    "action": "robot data (LeRobot, or actions with a clip); or leave it out with --modalities vision,…",
}
