"""Predicted time of a request: a roofline with one measured efficiency for each kind of operation on each GPU.

A kind of operation takes the longer of its arithmetic at ``efficiency × peak`` and of reading its weights once. Nothing
overlaps. What an inference engine does besides (`Habits`) is the engine's, not the GPU's.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_export.plan.precision import Mix, PlannedPrecision
from cosmos_export.plan.subject import Subject, graph_parameters
from cosmos_export.plan.work import (
    OperationCount,
    codec_work,
    decodes,
    encoded_frames,
    generator_pass,
    reasoner_pass,
)
from cosmos_export.plan.workload import Workload
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED
from cosmos_export.sampling import Schedule
from cosmos_export.targets import Target

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the nominal bandwidth at which weights are read."""
_WIDE = SCHEMES[UNQUANTIZED].computes
"""Type in which codecs compute, and products whose operands were widened."""


@dataclass(frozen=True)
class Habits:
    """How an engine runs a request. The defaults are those of a bundle: reasoner once, loop on the device, codecs once.

    ``launch_s_per_layer``: host time to launch one layer's kernels, which bounds a pass from below; ``computed_steps``:
    share of the steps whose generator runs, the others being taken from a cache; ``emulates_fp8``: FP8 weights are
    widened before 16-bit products.
    """

    launch_s_per_layer: float = 0.0
    reasoner_every_pass: bool = False
    encodes_whole_clip: bool = False
    codecs: bool = True
    computed_steps: float = 1.0
    emulates_fp8: bool = False


def missing_rates(chosen: PlannedPrecision, target: Target) -> tuple[str, ...]:
    """Types that ``chosen`` computes in and that the target's description has no rate for; codecs compute in bf16."""
    return tuple(sorted((chosen.computes | {_WIDE}) - set(target.peak_flops)))


@dataclass(frozen=True)
class Latency:
    """Seconds of one request by part. ``step_s``: one step with both guidance branches."""

    reasoner_s: float
    generator_s: float
    linear_s: float
    """The part of the generator's time that its linears take."""
    attention_s: float
    codec_s: float
    step_s: float

    @property
    def total_s(self) -> float:
        return self.reasoner_s + self.generator_s + self.codec_s


def latency(
    subject: Subject,
    workload: Workload,
    schedule: Schedule,
    chosen: PlannedPrecision,
    target: Target,
    habits: Habits | None = None,
) -> Latency | None:
    """The prediction; None where the target has no efficiency, or no rate for a type the recipe computes in."""
    habits, efficiency, peak = habits or Habits(), target.efficiency, target.peak_flops
    if efficiency is None or missing_rates(chosen, target):
        return None
    geometry, layers = subject.geometry, subject.geometry.num_hidden_layers
    parameters = graph_parameters(geometry)
    read = BANDWIDTH_EFFICIENCY * (target.bandwidth_bytes_per_s or 0)
    launch = layers * habits.launch_s_per_layer

    def linear_s(work: OperationCount, mix: Mix, graph: str) -> float:
        rates = {name: peak[_WIDE if habits.emulates_fp8 else SCHEMES[name].computes] for name in mix.linears}
        arithmetic = sum(share * work.linear / (efficiency.linear * rates[n]) for n, share in mix.linears.items())
        return max(arithmetic, parameters[graph] * mix.bits / 8 / read)

    def attention_s(work: OperationCount, mix: Mix) -> float:
        rates = {name: efficiency.attention * peak[SCHEMES[name].computes] for name in mix.attention}
        return sum(share * work.attention / rates[name] for name, share in mix.attention.items())

    branches = [(workload.prompt_tokens, [True] * schedule.steps)]
    if any(schedule.guided):
        branches.append((workload.negative_tokens, list(schedule.guided)))
    linear = attention = generator = reasoner = 0.0
    for prompt, runs in branches:
        work = reasoner_pass(geometry, prompt)
        once = linear_s(work, chosen.reasoner, "reasoner") + attention_s(work, chosen.reasoner)
        count = sum(runs) * habits.computed_steps if habits.reasoner_every_pass else 1
        reasoner += count * max(once, launch)
        work = generator_pass(geometry, workload.rows, prompt)
        for index, (mix, _) in enumerate(chosen.steps):
            own = sum(run and of == index for run, of in zip(runs, chosen.of_step, strict=True)) * habits.computed_steps
            parts = linear_s(work, mix, "generator"), attention_s(work, mix)
            linear += own * parts[0]
            attention += own * parts[1]
            generator += own * max(sum(parts), launch)
    codec_s = 0.0
    if habits.codecs:
        operations = _codec_operations(subject, workload, habits)
        codec_s = operations / (efficiency.codec * peak[_WIDE])
    return Latency(reasoner, generator, linear, attention, codec_s, generator / max(1, schedule.steps))


def _codec_operations(subject: Subject, workload: Workload, habits: Habits) -> float:
    frames = workload.dim("frames") if habits.encodes_whole_clip else encoded_frames(workload)
    total = codec_work(subject, "vae-encoder", workload, frames) if "vae-encoder" in subject.codecs else 0.0
    if decodes(workload):
        decoders = [name for name in ("vae-decoder", "sound-decoder") if name in subject.codecs]
        total += sum(codec_work(subject, name, workload) for name in decoders)
    return total
