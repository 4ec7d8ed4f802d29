"""Arithmetic of a request in floating-point operations, two for each multiplication with its addition.

Formulas follow from the shapes of the matrix products; norms, rotary embeddings and samplers are left out (below 1 %).
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.plan.subject import PUBLISHED_CODECS, Subject
from cosmos_export.plan.workload import Workload
from cosmos_export.sampling import MODES, Schedule


@dataclass(frozen=True)
class OperationCount:
    """Operations of linears and of attention."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: OperationCount) -> OperationCount:
        return OperationCount(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, count: float) -> OperationCount:
        return OperationCount(self.linear * count, self.attention * count)

    @property
    def total(self) -> float:
        return self.linear + self.attention


def layer_linear(geometry: Geometry) -> int:
    """Operations of one row through the linears of one layer of a tower."""
    hidden, query, keys = geometry.hidden_size, geometry.query_width, geometry.key_value_width
    mlp = (len(geometry.family.facts.mlp_inputs) + 1) * hidden * geometry.intermediate_size
    return 2 * (2 * hidden * query + 2 * hidden * keys + mlp)


def generator_pass(geometry: Geometry, rows: int, prompt: int) -> OperationCount:
    """One pass of the generator: every row attends to all rows and to the prompt's keys."""
    layers = geometry.num_hidden_layers
    heads = 2 * 2 * geometry.patch_latent_dim * geometry.hidden_size * rows
    attention = 4 * layers * geometry.query_width * rows * (prompt + rows)
    return OperationCount(layers * layer_linear(geometry) * rows + heads, attention)


def reasoner_pass(geometry: Geometry, prompt: int) -> OperationCount:
    """One prompt through the reasoner: causal attention, and of the last layer keys and values only."""
    layers = geometry.num_hidden_layers - 1
    last = 2 * 2 * geometry.hidden_size * geometry.key_value_width
    attention = 2 * layers * geometry.query_width * prompt * prompt
    return OperationCount((layers * layer_linear(geometry) + last) * prompt, attention)


_CODEC_WORK = {
    # (first latent frame, each further) of one latent row and column; the sound decoder's of one sound latent.
    "vae-decoder": (21.0e12 / 3600, 67.9e12 / 3600),
    "vae-encoder": (4.31e12 / 3600, 12.9e12 / 3600),
    "sound-decoder": (5.6e12 / 197, 5.6e12 / 197),
}
"""Counted on the published codecs at 720p (45 × 80 latents) and at 197 sound latents, where it is what convolutions of
every size add up to; codecs of other widths are taken to do as much for each parameter."""


def codec_work(subject: Subject, name: str, workload: Workload, frames: int | None = None) -> float:
    """Operations of codec ``name`` on ``frames`` latent frames, by default all of the workload's."""
    first, further = (x * subject.codecs[name] / PUBLISHED_CODECS[name] for x in _CODEC_WORK[name])
    if name == "sound-decoder":
        return first * workload.dim("sound_len")
    count = workload.dim("frames") if frames is None else frames
    return workload.dim("height") * workload.dim("width") * (first + further * (count - 1)) if count else 0.0


def encoded_frames(workload: Workload) -> int:
    """Latent frames of the request that are given, so that they are encoded."""
    return MODES[workload.mode].given_frames(workload.dim("frames"))


def decodes(workload: Workload) -> bool:
    """Whether the request ends with frames; a policy's end with actions."""
    return "vision" in MODES[workload.mode].decoded


def passes(workload: Workload, schedule: Schedule) -> tuple[int, int]:
    """Passes of the generator on the prompt, and on the prompts of the other branches of guidance."""
    others = len(MODES[workload.mode].guidance.branches) - 1
    return schedule.steps, others * sum(schedule.guided)


def request_work(subject: Subject, workload: Workload, schedule: Schedule) -> tuple[OperationCount, OperationCount]:
    """Operations of the reasoner, once per request, and of the generator over all steps."""
    geometry, rows = subject.geometry, workload.rows
    conditional, unconditional = passes(workload, schedule)
    reasoner = reasoner_pass(geometry, workload.prompt_tokens)
    generator = generator_pass(geometry, rows, workload.prompt_tokens) * conditional
    if unconditional:
        reasoner += reasoner_pass(geometry, workload.negative_tokens)
        generator += generator_pass(geometry, rows, workload.negative_tokens) * unconditional
    return reasoner, generator
