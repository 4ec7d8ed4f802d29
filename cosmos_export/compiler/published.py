"""A build against the published implementation: whether there is memory for that, and what is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosmos_export.bundle import BundleWriter
from cosmos_export.checkpoint import Checkpoint, TensorEntry
from cosmos_export.checkpoint.codecs import CODECS, codec_tensors
from cosmos_export.compiler.components import Codec
from cosmos_export.compiler.cuts import chains
from cosmos_export.compiler.evidence import Evidence
from cosmos_export.compiler.forms import Forms, Pieces
from cosmos_export.compiler.metering import Stages
from cosmos_export.compiler.models import model_dtype
from cosmos_export.diagnostics import FindingError
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.codecs import codec_parity
from cosmos_export.evaluation.parity import REPORT, Measured, Parity
from cosmos_export.ir.dims import product
from cosmos_export.ir.interpreter import Weights
from cosmos_export.ir.program import Program
from cosmos_export.machine.memory import available_bytes
from cosmos_export.options import ParityMode
from cosmos_export.sampling import Schedule

MEMORY_SHARE = 0.4
"""Parity loads the stock model in fp32; above this share of the available memory it is left out and said to be."""


def parity_refusal(mode: ParityMode, tensors: Mapping[str, TensorEntry]) -> str:
    """Why the model of ``tensors`` is not compared with diffusers'; empty where it is."""
    if mode == "never":
        return "not asked for (--parity never)"
    needed = 4 * sum(int(product(e.shape)) for e in tensors.values())
    if mode == "auto" and needed > MEMORY_SHARE * available_bytes():
        share = f"{MEMORY_SHARE:.0%} of the memory there is"
        return f"the stock model in fp32 takes {needed / 2**30:.1f} GiB, more than {share} (--parity always)"
    return ""


def load_published(
    checkpoint: Checkpoint,
    modalities: Sequence[str],
    outputs: Sequence[str],
    weights: Weights,
    few_cases: int | None = None,
) -> Parity:
    """The published model of ``checkpoint``. That of the first layers of a larger model is read through ``weights`` and
    compared on ``few_cases``."""
    if few_cases is None:
        return Parity(checkpoint, modalities, outputs, weights)
    found = [c for c in CASES if c.mode.representative and set(c.outputs) & set(outputs)]
    cases = [c for c in found if not c.actions or "action" in modalities][:few_cases]
    return Parity(checkpoint, modalities, outputs, weights, cases=cases, whole=False)


def compare_codecs(
    codecs: Iterable[Codec],
    checkpoint: Checkpoint,
    mode: ParityMode,
    writer: BundleWriter,
    evidence: Evidence,
    stages: Stages,
) -> None:
    """The models of every codec against the published module, where that fits in memory."""
    for codec in codecs:
        refusal = parity_refusal(mode, codec_tensors(checkpoint, codec.name))
        if refusal:
            evidence.not_compared[codec.name] = refusal
            continue
        with stages("parity", f"of {codec.name}"):
            onnx = writer.path(f"onnx/{codec.graphs[0]}{codec.suffix}", "onnx").parent
            published = checkpoint.components[CODECS[codec.name].folder]
            evidence.parity.append(codec_parity(codec.name, codec.program, published, onnx, codec.suffix))


@dataclass(frozen=True)
class Lowered:
    """The models of a bundle that is being written, as they run on a CPU."""

    forms: Forms
    pieces: Pieces
    onnx: Path
    """Folder of the models."""
    suffix: str
    quantized: bool


def compare_lowered(parity: Parity, plain: Program, lowered: Lowered) -> Iterator[Measured]:
    """Loss by the narrow type of the ``plain`` program, and every form of the step in ONNX Runtime."""
    forms, onnx, suffix = lowered.forms, lowered.onnx, lowered.suffix
    dtype = model_dtype(forms.program)
    if dtype != torch.float32:
        yield parity.precision(plain, dtype)
    cut = chains(lowered.pieces)
    compare = parity.quantized if lowered.quantized else parity.onnx
    yield compare(forms.program, onnx, suffix, chains=cut)
    for name, variant in forms.variants.items():
        yield parity.quantized(variant, onnx, suffix, body=name, chains=cut)


def compare_loop(
    parity: Parity, lowered: Lowered, schedule: Schedule, scheduler: Mapping[str, Any]
) -> tuple[Measured, ...]:
    """The closed loops as a whole; nothing where there is none, or no case can be compared."""
    forms, onnx, suffix = lowered.forms, lowered.onnx, lowered.suffix
    if not forms.closed:
        return ()
    found = parity.loop(forms.closed, schedule, scheduler, onnx, suffix, quantized=lowered.quantized)
    return () if found is None else (found,)


def require_parity(measured: Iterable[Measured]) -> None:
    """CX601: something that was ``measured`` is further from the published implementation than it may be."""
    failed = [m for m in measured if not m.passed]
    if failed:
        lines = "; ".join(f"{m.stage}: {m.value:.2e} > {m.limit:.0e} ({m.case})" for m in failed)
        raise FindingError(
            "CX601",
            f"the program does not compute what the published implementation computes: {lines}",
            REPORT,
        )
