"""Which forward passes are made, and whether they cover what the quantized model will run.

A pass is one request at one step on one branch of guidance. A cell is a part of the schedule on one branch; passes are
spread over all cells, and within a cell over its steps by a sequence of low discrepancy (van der Corput), the first and
the last step of the schedule before others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cosmos_export.calibration.requests import CalibrationRequest
from cosmos_export.diagnostics import FindingError

Branch = Literal["cond", "uncond"]
RANGES = 4
"""Parts of a schedule that are each to be seen."""


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass: the request ``work`` at ``step`` on ``branch``."""

    work: int
    step: int
    branch: Branch


def plan_samples(works: Sequence[CalibrationRequest], count: int) -> list[ForwardPass]:
    """At most ``count`` different passes, in the order of their requests.

    Requests with the same modalities have at least a pass for each of their cells where ``count`` allows it, and of the
    rest as many as is their share of the requests. Passes go round the cells, and in a cell round the requests.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, work in enumerate(works):
        groups.setdefault(modalities(work), []).append(index)
    cells = [_cells(works, members) for members in groups.values()]
    least = [len(own) for own in cells]
    found: set[ForwardPass] = set()
    left, requests = count, len(works)
    for own, needed, members in zip(cells, least, groups.values(), strict=True):
        spare = max(left - sum(least), 0)
        share = min(left, needed + round(spare * len(members) / requests))
        found |= _passes(own, share)
        left, requests, least = left - share, requests - len(members), least[1:]
    return sorted(found, key=lambda s: (s.work, s.step, s.branch))


def _passes(cells: Sequence[_Cell], count: int) -> set[ForwardPass]:
    found: set[ForwardPass] = set()
    for number in range(count):
        at, round_ = number % len(cells), number // len(cells)
        branch, requests = cells[at]
        index = list(requests)[(round_ + at) % len(requests)]
        steps = requests[index]
        # The ends of a schedule come first: nowhere do ranges differ as much.
        place = _van_der_corput(round_) if at != _last_cell(cells) else 1 - _van_der_corput(round_)
        found.add(ForwardPass(index, steps[min(int(place * len(steps)), len(steps) - 1)], branch))
    return found


_Cell = tuple[Branch, dict[int, list[int]]]
"""A branch, and the steps in a part of the schedule at which each request has it."""


def _cells(works: Sequence[CalibrationRequest], members: Sequence[int]) -> list[_Cell]:
    """Parts of the schedule in order with guidance's first branch, then with its second."""
    cells: dict[tuple[Branch, int], dict[int, list[int]]] = {}
    branches: tuple[Branch, ...] = ("cond", "uncond")
    for branch in branches:
        for quarter in range(RANGES):
            for index in members:
                schedule = works[index].request.schedule
                for step in range(schedule.steps):
                    if step * RANGES // schedule.steps == quarter and (branch == "cond" or schedule.guided[step]):
                        cells.setdefault((branch, quarter), {}).setdefault(index, []).append(step)
    return [(branch, requests) for (branch, _), requests in cells.items()]


def _last_cell(cells: Sequence[_Cell]) -> int:
    """Index of the first branch's cell with the end of the schedule."""
    return max(i for i, (branch, _) in enumerate(cells) if branch == "cond")


def _van_der_corput(number: int) -> float:
    """The next place in [0, 1) farthest from those before: 0, 1/2, 1/4, 3/4 …"""
    value, share = 0.0, 0.5
    while number:
        number, digit = divmod(number, 2)
        value += digit * share
        share /= 2
    return value


Coverage = dict[str, dict[str, dict[str, int]]]
"""Passes by modality, part of the schedule, and branch."""


def coverage(works: Sequence[CalibrationRequest], samples: Sequence[ForwardPass]) -> Coverage:
    """Cells that ``samples`` cover. Those that no request can fill are left out; empty ones that one could are 0."""
    return _covered(works, samples, modalities)


def coverage_of_modes(works: Sequence[CalibrationRequest], samples: Sequence[ForwardPass]) -> Coverage:
    """The same by mode in place of modality."""
    return _covered(works, samples, lambda work: (work.request.mode,))


def _covered(
    works: Sequence[CalibrationRequest],
    samples: Sequence[ForwardPass],
    names: Callable[[CalibrationRequest], tuple[str, ...]],
) -> Coverage:
    result: Coverage = {}
    for work in works:
        schedule = work.request.schedule
        for name in names(work):
            for step in range(schedule.steps):
                cell = result.setdefault(name, {}).setdefault(part(step, schedule.steps), {})
                for branch in ("cond", *(["uncond"] if schedule.guided[step] else [])):
                    cell.setdefault(branch, 0)
    for sample in samples:
        steps = works[sample.work].request.schedule.steps
        for name in names(works[sample.work]):
            result[name][part(sample.step, steps)][sample.branch] += 1
    return result


def part(step: int, steps: int) -> str:
    """The part of the schedule that has ``step`` of ``steps``, in per cent."""
    index = step * RANGES // steps
    return f"{index * 100 // RANGES}-{(index + 1) * 100 // RANGES} %"


def modalities(work: CalibrationRequest) -> tuple[str, ...]:
    """Modalities of the rows of ``work``."""
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
    "sound": "clips or recorded latents with sound, or --latents rollout; or leave it out with --modalities vision,…",
    "action": "robot data (LeRobot, or actions with a clip); or leave it out with --modalities vision,…",
}
