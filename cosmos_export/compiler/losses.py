"""Gates of a quantized build: what each linear (G1), each step (G2) and a whole request (G3) loses, measured in the
mode that is built, as verdicts, as JSON and as a page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from statistics import median
from typing import Any

import numpy as np
import torch

from cosmos_export.bundle import BundleWriter, CalibrationRecord, PrecisionRecord, Verdict
from cosmos_export.calibration.table import ScaleTable
from cosmos_export.compiler.built_case import action_axes, built_case
from cosmos_export.compiler.forms import quantize_copy
from cosmos_export.compiler.job import Job
from cosmos_export.diagnostics import FindingError
from cosmos_export.evaluation.ends import END_LIMIT, EndLoss, end_losses
from cosmos_export.evaluation.gates import (
    LinearLoss,
    StepLoss,
    linear_losses,
    record_rollout,
    step_losses,
)
from cosmos_export.evaluation.parity import Measured
from cosmos_export.evaluation.prefix import first_linears, weight_bytes
from cosmos_export.evaluation.sampled import negative_ids
from cosmos_export.ir.interpreter import Weights
from cosmos_export.ir.packing import AS_STORED, ROUNDING
from cosmos_export.ir.program import Program
from cosmos_export.passes.options import PassOptions
from cosmos_export.precision.recipe import Assignment
from cosmos_export.precision.scheme import StepLimits
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED
from cosmos_export.report.losses import loss_page

REPORT_JSON, REPORT_PAGE = "report/quantization.json", "report/quantization.html"
LINEAGE = "calibration/lineage.json"
_STEPS = 6
"""Steps of the schedule that are looked at: the first, the last, and others between them."""
_NAMED = 5
_DRAWS, _SMALL_BYTES = 3, 10**8
"""Draws of rounding errors; of a model with more weights one, as it has more values to take the mean over."""
RUN_BYTES = 6 * 10**9
"""Weights of a model that the gates run whole where it is not sampled. Of a larger one they see the beginning."""
SEEN_BYTES = 2 * 10**9
"""Weights of each of its graphs that are read then: five layers of Nano, two of Super."""


@dataclass(frozen=True)
class Alike:
    """Steps that compute in one way, which are one body of a host's loop."""

    count: int
    measured: tuple[int, ...]
    """Steps whose velocity was measured, by their index in the schedule."""
    first: int


@dataclass(frozen=True)
class Losses:
    """Losses of a quantized build."""

    linears: tuple[LinearLoss, ...]
    steps: tuple[StepLoss, ...]
    limits: StepLimits
    note: str
    """The latents that it was measured on, in words."""
    alike: tuple[Alike, ...] = ()
    modalities: tuple[StepLoss, ...] = ()
    """The same steps by modality, where several are generated."""
    ends: tuple[EndLoss, ...] = ()
    """Losses at the end of a whole request; empty where none was sampled."""

    @property
    def seen(self) -> str:
        """How many steps of each kind had their velocity measured."""
        kinds = (f"{len(a.measured)} of {a.count} that compute as step {a.first + 1}" for a in self.alike)
        return f"measured: {', '.join(kinds)}"

    @property
    def worst_linears(self) -> list[LinearLoss]:
        return sorted(self.linears, key=lambda loss: loss.relative / loss.limit, reverse=True)[:_NAMED]

    @property
    def shares(self) -> list[float]:
        """Losses of the steps in shares of what rounding alone loses, where that was measured."""
        return [loss.share for loss in self.steps if loss.share is not None]

    @property
    def failed_linears(self) -> list[LinearLoss]:
        return [loss for loss in self.linears if not loss.passed]

    @property
    def step_problems(self) -> list[str]:
        """Losses of whole steps beyond the limits, of all that is generated and of each modality."""
        names = dict.fromkeys(loss.modality for loss in self.modalities)
        groups = [self.steps, *([one for one in self.modalities if one.modality == name] for name in names)]
        return [problem for group in groups for problem in _problems(group, self.limits)]

    @property
    def end_problems(self) -> list[str]:
        """Losses of a whole request beyond the limit."""
        return [problem for end in self.ends for problem in end.problems]


def _problems(steps: Sequence[StepLoss], limits: StepLimits) -> list[str]:
    """Losses of ``steps`` of one modality, or of all together, beyond ``limits``."""
    if not steps:
        return []
    where = f" ({steps[0].modality})" if steps[0].modality else ""
    middle = median(loss.relative for loss in steps)
    worst = max(steps, key=lambda loss: loss.relative)
    apart = min(steps, key=lambda loss: loss.cosine)
    problems = []
    shares = {loss.step: loss.share for loss in steps if loss.share is not None}
    if shares and limits.median_share is not None and limits.largest_share is not None:
        at, largest = max(shares.items(), key=lambda one: one[1])
        if not median(shares.values()) <= limits.median_share:
            problems.append(
                f"the median step{where} loses {median(shares.values()):.2f} times what rounding to FP8 alone does, "
                f"allowed {limits.median_share}"
            )
        if not largest <= limits.largest_share:
            problems.append(
                f"step {at + 1}{where} loses {largest:.2f} times what rounding to FP8 alone does, allowed "
                f"{limits.largest_share}"
            )
    if not middle <= limits.median:
        problems.append(f"the median step{where} is {middle:.2%} off, allowed {limits.median:.0%}")
    if not worst.relative <= limits.largest:
        problems.append(f"step {worst.step + 1}{where} is {worst.relative:.2%} off, allowed {limits.largest:.0%}")
    if not apart.cosine >= limits.cosine:
        problems.append(f"step {apart.step + 1}{where} has a cosine of {apart.cosine:.5f}, wanted {limits.cosine}")
    return problems


def measure_losses(plain: Program, job: Job, passes: PassOptions, weights: Weights, *, unsampled: str = "") -> Losses:
    """Measure both gates on one request. ``plain`` is labelled and not quantized; ``passes`` say how it would be.

    The latents of each step come from the unquantized model's own sampling. Where that is ``unsampled``, for that
    reason, there is the first step of every way in which steps compute, on noise in place of its latents. A model of
    more than `RUN_BYTES` is not run then: the linears of its first layers are measured on those steps, and no step as a
    whole.
    """
    config, schedule = job.checkpoint.geometry.config, job.schedule
    case = built_case(job)
    inputs = case.inputs(config, job.modalities)
    keys = job.precision.step_keys()
    first = {keys.index(key) for key in keys}
    final: dict[str, torch.Tensor] = {}
    if unsampled:
        chosen = sorted(first)
        recorded = [(at, {**inputs, "timestep": torch.tensor([float(schedule.timesteps[at])])}) for at in chosen]
    else:
        spread = {round(float(i)) for i in np.linspace(0, schedule.steps - 1, min(schedule.steps, _STEPS))}
        chosen = sorted(spread | {at for at in first if not any(keys[i] == keys[at] for i in spread)})
        recorded, final = record_rollout(plain, inputs, negative_ids(config), schedule, chosen, weights)
    numbers = ", ".join(str(i + 1) for i in chosen)
    note = f"steps {numbers} of {schedule.steps} of an unquantized rollout, {case.name}"
    if unsampled:
        note = (
            f"steps {numbers} of {schedule.steps}, the first of each way in which they compute, on noise in place of "
            f"their latents ({case.name}); nothing was sampled, as the transformer was not compared: {unsampled}"
        )
    seen_of = None
    if unsampled and weight_bytes(plain) > RUN_BYTES:
        seen_of = first_linears(plain, SEEN_BYTES)
        note = (
            f"the first {seen_of.linears} of {seen_of.of} linears at the first step ({case.name}), whose latents are "
            "noise; reading all weights several times would take longer than building from them, and no whole step is "
            "seen"
        )
    watched = plain if seen_of is None else seen_of.program
    programs: dict[int, Program] = {}

    def quantized(step: int) -> Program:
        if keys[step] not in programs:
            programs[keys[step]] = quantize_copy(plain, passes, step)
        return programs[keys[step]]

    # Steps that compute alike are seen on their own latents, except those of a model that is read as seldom as can be.
    groups = (
        [(sorted(first), recorded[:1])]
        if seen_of is not None
        else [([at], [(index, given) for index, given in recorded if keys[index] == keys[at]]) for at in sorted(first)]
    )
    linears: dict[tuple[str, str], LinearLoss] = {}
    for steps_of, on in groups:
        forms, latents = {step: quantized(step) for step in steps_of}, [given for _, given in on]
        for loss in linear_losses(watched, forms, latents, weights, whole=seen_of is None):
            linears.setdefault((loss.site, loss.scheme), loss)
    stated = (SCHEMES[name].steps for name in sorted(job.precision.schemes))
    limits = StepLimits.loosest([limit for limit in stated if limit is not None])
    draws = 0 if limits.median_share is None else _DRAWS if weight_bytes(plain) <= _SMALL_BYTES else 1
    found = [] if seen_of is not None else step_losses(plain, quantized, recorded, weights, draws)
    steps = [loss for loss in found if not loss.modality]
    alike = tuple(
        Alike(keys.count(keys[at]), tuple(loss.step for loss in steps if keys[loss.step] == keys[at]), at)
        for at in sorted(first)
    )
    ends: Sequence[EndLoss] = ()
    if final:
        negative = negative_ids(config)
        ends = end_losses(plain, quantized, final, inputs, negative, schedule, weights, action_axes(job))
    modalities = tuple(loss for loss in found if loss.modality)
    return Losses(tuple(linears.values()), tuple(steps), limits, note, alike, modalities, tuple(ends))


def require_losses(losses: Losses, loops: Sequence[Measured], *, enforce: bool) -> None:
    """CX361: a linear loses more than its scheme does; CX362: whole steps or ``loops`` do, unless only reported."""
    failed = losses.failed_linears
    if failed:
        worst = "; ".join(f"{f.site} ({f.scheme}): {f.relative:.3f}, allowed {f.limit:.3f}" for f in failed[:_NAMED])
        raise FindingError(
            "CX361",
            f"{len(failed)} linears lose more than their scheme should: {worst}",
            f"calibrate again, or leave them unquantized: {_hints(failed)}",
        )
    problems = [*losses.step_problems, *losses.end_problems]
    problems += [f"{m.stage}: {m.metric} is {m.value:.3f}, allowed {m.limit}" for m in loops if not m.passed]
    if problems and enforce:
        raise FindingError(
            "CX362",
            f"the quantized model is too far from the unquantized one: {'; '.join(problems)}",
            f"give the worst linears more bits: {_hints(losses.worst_linears)}; or accept it with `--quality report`",
        )


def _hints(losses: list[LinearLoss]) -> str:
    """``--set`` for each of the sites that lose most."""
    places = dict.fromkeys(f"{f.tower}.{f.kind}[{f.layer}:{f.layer + 1}]" for f in losses[:_NAMED])
    return " ".join(f"--set '{place}={UNQUANTIZED}'" for place in places)


def loss_verdicts(losses: Losses) -> tuple[Verdict, ...]:
    """The gates as a manifest has them."""
    worst = losses.worst_linears
    named = ", ".join(f"{loss.site} {loss.relative:.3f} of {loss.limit:.3f}" for loss in worst)
    problems = losses.step_problems
    over = f"worst of {len(losses.linears)}: {named}"
    if not losses.steps:
        over += f"; {losses.note}"
    linears = Verdict(
        "G1", "linears", "relative error / limit", 1.0, "fail" if losses.failed_linears else "pass", over
    )  # fmt: skip
    metric = "relative L2 of the velocity, median"
    if not losses.steps:
        steps = Verdict("G2", "steps", metric, losses.limits.median, "not-measured", losses.note)
    else:
        said = "; ".join([*problems, *_shares(losses), losses.seen, losses.note])
        steps = Verdict("G2", "steps", metric, losses.limits.median, "fail" if problems else "pass", said)
    return linears, steps, *_end_verdicts(losses)


def _end_verdicts(losses: Losses) -> Iterator[Verdict]:
    metric = "relative L2 of the end of a request"
    if not losses.ends:
        yield Verdict("G3", "request", metric, END_LIMIT, "not-measured", losses.note)
    for end in losses.ends:
        said = f"{end.relative:.4f}, of the unquantized model in its own precision {end.floor:.4f}"
        if end.columns:
            worst = max(end.columns, key=lambda column: column.share)
            said += f"; most {worst.name}: {worst.rms:.4g} {worst.unit}, {worst.floor:.4g} in its own precision"
        note = "; ".join([*end.problems, said])
        yield Verdict("G3", end.modality, metric, END_LIMIT, "fail" if end.problems else "pass", note)


def _shares(losses: Losses) -> Iterator[str]:
    if losses.shares:
        limits = losses.limits
        yield (
            f"median {median(losses.shares):.2f} and largest {max(losses.shares):.2f} times what rounding alone loses, "
            f"allowed {limits.median_share} and {limits.largest_share}"
        )


def loss_values(losses: Losses) -> dict[str, float]:
    """The numbers behind the verdicts, without those that are infinite or were not measured."""
    values = {
        "G1": max((loss.relative / loss.limit for loss in losses.linears), default=0.0),
        "G2": median(loss.relative for loss in losses.steps) if losses.steps else inf,
        "G2, shares of rounding alone": median(shares) if (shares := losses.shares) else inf,
        **{f"G3, {end.modality}": end.worst for end in losses.ends},
    }
    return {name: value for name, value in values.items() if isfinite(value)}


def loss_document(losses: Losses, precision: Assignment) -> dict[str, Any]:
    """The report as JSON."""
    return {
        "recipe": precision.recipe,
        "overrides": list(precision.overrides),
        "measured_on": losses.note,
        "limits": {"steps": asdict(losses.limits)},
        "alike": [
            {"first": a.first, "steps": a.count, "measured": list(a.measured)} for a in losses.alike
        ],
        "linears": [
            {
                "tower": loss.tower, "kind": loss.kind, "layer": loss.layer, "scheme": loss.scheme,
                "relative": _finite(loss.relative), "sqnr_db": _finite(round(loss.sqnr_db, 2)), "limit": loss.limit,
                "passed": loss.passed,
            }
            for loss in losses.linears
        ],
        "steps": [_step(loss) for loss in losses.steps],
        "modalities": [_step(loss) for loss in losses.modalities],
        "ends": [
            {
                "modality": end.modality, "relative": _finite(end.relative), "floor": _finite(end.floor),
                "limit": END_LIMIT, "frames": [_finite(frame) for frame in end.frames],
                "columns": [
                    {name: _finite(value) if isinstance(value, float) else value for name, value in asdict(one).items()}
                    for one in end.columns
                ],
            }
            for end in losses.ends
        ],
        "problems": [*losses.step_problems, *losses.end_problems],
    }  # fmt: skip


def _step(loss: StepLoss) -> dict[str, Any]:
    return asdict(loss) | {
        "relative": _finite(loss.relative),
        "rounding": None if loss.rounding is None else _finite(loss.rounding),
        "share": None if loss.share is None else _finite(loss.share),
    }


def _finite(value: float) -> float | None:
    """``value`` as JSON has it: nothing there stands for an infinite one."""
    return value if isfinite(value) else None


def loss_texts(losses: Losses, precision: Assignment) -> tuple[str, str]:
    """The report as JSON and as a page."""
    document = loss_document(losses, precision)
    return json.dumps(document, indent=1, allow_nan=False) + "\n", loss_page(document)


def write_losses(losses: Losses, precision: Assignment, scales: ScaleTable | None, writer: BundleWriter) -> None:
    """The report in both forms, and a copy of the calibration's lineage."""
    document, page = loss_texts(losses, precision)
    writer.path(REPORT_JSON, "report").write_text(document, encoding="utf-8")
    writer.path(REPORT_PAGE, "report").write_text(page, encoding="utf-8")
    if scales is not None:
        writer.path(LINEAGE, "calibration").write_bytes(scales.document)


def precision_record(precision: Assignment, scales: ScaleTable | None, *, stored: bool) -> PrecisionRecord:
    """The manifest's record of a quantized build. ``stored``: the checkpoint itself is quantized."""
    return PrecisionRecord(
        recipe=precision.recipe,
        overrides=precision.overrides,
        table=precision.table(),
        rounding=AS_STORED if stored else ROUNDING,
        calibration=_calibration(scales),
        report=REPORT_JSON,
    )


def _calibration(scales: ScaleTable | None) -> CalibrationRecord | None:
    if scales is None:
        return None
    return CalibrationRecord(
        scales.checkpoint, scales.scales_sha256, hashlib.sha256(scales.document).hexdigest(), LINEAGE
    )
