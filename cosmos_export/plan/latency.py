"""Predicted time of a request: a roofline with one measured efficiency for each kind of operation on each GPU.

A kind of operation takes the longer of its arithmetic at ``efficiency × peak`` and of reading its weights once. Nothing
overlaps. What an inference engine does besides (`Habits`) is the engine's, not the GPU's.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_export.plan.precision import SCHEMES, Precision, Scheme
from cosmos_export.plan.subject import Subject, graph_parameters
from cosmos_export.plan.work import (
    Work,
    codec_work,
    decodes,
    encoded_frames,
    generator_pass,
    passes,
    reasoner_pass,
)
from cosmos_export.plan.workload import Workload
from cosmos_export.sampling import Schedule
from cosmos_export.targets import Target

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the nominal bandwidth at which weights are read."""


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


@dataclass(frozen=True)
class Latency:
    """Seconds of one request by part. ``step_s``: one step with both guidance branches."""

    reasoner_s: float
    generator_s: float
    linear_s: float
    """Of the generator's time: linears."""
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
    chosen: Precision,
    target: Target,
    habits: Habits | None = None,
) -> Latency | None:
    """The prediction; None where the target has no efficiency or no published rate for a type the recipe computes in."""
    habits, efficiency, peak = habits or Habits(), target.efficiency, target.peak_flops
    schemes = [SCHEMES[chosen.reasoner], SCHEMES[chosen.generator], chosen.wide()]
    needed = {scheme.computes for scheme in schemes} | {"bf16", chosen.attention}
    if efficiency is None or not needed <= set(peak):
        return None
    geometry, layers = subject.geometry, subject.geometry.num_hidden_layers
    weights = graph_parameters(geometry)
    read = BANDWIDTH_EFFICIENCY * (target.bandwidth_bytes_per_s or 0)

    def linear_s(work: Work, scheme: Scheme, graph: str) -> float:
        computes = "bf16" if habits.emulates_fp8 else scheme.computes
        return max(work.linear / (efficiency.linear * peak[computes]), weights[graph] * scheme.bits / 8 / read)

    def attention_s(work: Work) -> float:
        return work.attention / (efficiency.attention * peak[chosen.attention])

    launch = layers * habits.launch_s_per_layer

    def generator_s(prompt: int, scheme: Scheme) -> tuple[float, float]:
        work = generator_pass(geometry, workload.rows, prompt)
        return linear_s(work, scheme, "generator"), attention_s(work)

    def reasoner_s(prompt: int) -> float:
        work = reasoner_pass(geometry, prompt)
        return max(linear_s(work, SCHEMES[chosen.reasoner], "reasoner") + attention_s(work), launch)

    conditional, unconditional = passes(schedule)
    wide = min(2 * chosen.wide_steps, conditional)
    branches = [(workload.prompt_tokens, conditional, wide)]
    if unconditional:
        branches.append((workload.negative_tokens, unconditional, min(wide, unconditional)))
    linear = attention = generator = reasoner = 0.0
    for prompt, count, widened in branches:
        once = reasoner_s(prompt)
        reasoner += once * (count * habits.computed_steps if habits.reasoner_every_pass else 1)
        for scheme, steps in ((SCHEMES[chosen.generator], count - widened), (chosen.wide(), widened)):
            parts = generator_s(prompt, scheme)
            steps = steps * habits.computed_steps
            linear += steps * parts[0]
            attention += steps * parts[1]
            generator += steps * max(sum(parts), launch)
    codec = 0.0
    if habits.codecs:
        frames = workload.dim("frames") if habits.encodes_whole_clip else encoded_frames(workload)
        work = codec_work(subject, "vae-encoder", workload, frames) if "vae-encoder" in subject.codecs else 0.0
        for name in ("vae-decoder", "sound-decoder"):
            if name in subject.codecs and decodes(workload):
                work += codec_work(subject, name, workload)
        codec = work / (efficiency.codec * peak["bf16"])
    return Latency(reasoner, generator, linear, attention, codec, generator / max(1, schedule.steps))
