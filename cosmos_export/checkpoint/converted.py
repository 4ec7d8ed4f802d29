"""A checkpoint in the one type that builds take: tensors of other types are converted by blocks, and it is said.

fp16 becomes bf16, whose range is larger and whose fraction is shorter; norms that are kept in fp32 beside bf16 weights
become bf16, as the published model has them. The time embedder may be fp32, and keeps that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cosmos_export.checkpoint.dtypes import numpy_dtype
from cosmos_export.checkpoint.layout import QUANTIZED_DTYPE, SCALES, TensorPart
from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.replaced import BLOCK_BYTES, with_tensors
from cosmos_export.checkpoint.safetensors_header import TensorEntry, read_exactly
from cosmos_export.checkpoint.safetensors_writer import TensorHeader
from cosmos_export.progress import Progress

BUILDABLE = ("bf16", "fp32")


def conversions(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Tensors of ``checkpoint`` that a build converts, and the type that they get; empty for bf16 and for fp32."""
    if checkpoint.dtype in BUILDABLE:
        return {}
    found = {}
    for name, want in checkpoint.expected.items():
        stored = checkpoint.tensors[name].dtype
        kept = ("BF16", "F32") if want.part is TensorPart.TIME else ("BF16", QUANTIZED_DTYPE)
        if stored not in kept:
            found[name] = "F32" if want.part is TensorPart.TIME else "BF16"
    return found


def buildable_dtype(checkpoint: Checkpoint) -> str:
    """The type that `converted` gives ``checkpoint``."""
    return checkpoint.dtype if checkpoint.dtype in BUILDABLE else "bf16"


def conversion_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The conversions of a build, in words; empty where there are none."""
    counts: dict[tuple[str, str], int] = {}
    for name, dtype in conversions(checkpoint).items():
        pair = (checkpoint.tensors[name].dtype, dtype)
        counts[pair] = counts.get(pair, 0) + 1
    return tuple(
        f"{count} tensors are {stored} and are converted to {dtype}"
        + (", whose fraction is 3 bits shorter" if (stored, dtype) == ("F16", "BF16") else "")
        for (stored, dtype), count in counts.items()
    )


def converted(checkpoint: Checkpoint, output: Path | None, progress: Progress | None = None) -> Checkpoint:
    """``checkpoint`` as a build takes it; itself where nothing has to be converted. The converted tensors are written
    beside ``output``, and go with the returned checkpoint. CX129: too little disk space."""
    wanted = conversions(checkpoint)
    if not wanted:
        return checkpoint
    specs = [TensorHeader(name, dtype, checkpoint.tensors[name].shape) for name, dtype in wanted.items()]
    replaced = with_tensors(
        checkpoint,
        specs,
        lambda spec: _blocks(checkpoint.tensors[spec.name], spec.dtype),
        name="converted",
        what="the converted weights",
        task="convert weights",
        output=output,
        progress=progress,
    )
    return replace(
        replaced,
        dtype="bf16",
        precision="bf16" if checkpoint.quantization is None else checkpoint.precision,
        notes=(*checkpoint.notes, *conversion_notes(checkpoint)),
    )


def _blocks(entry: TensorEntry, dtype: str) -> Iterator[memoryview]:
    """The bytes of ``entry`` in ``dtype``, rounded once, in blocks."""
    stored, wanted = entry.numpy_dtype(), numpy_dtype(dtype)
    assert wanted is not None and entry.name.rpartition(".")[2] not in SCALES
    step = BLOCK_BYTES // 4 * stored.itemsize
    for start in range(0, entry.size_bytes, step):
        size = min(step, entry.size_bytes - start)
        values = read_exactly(entry.file, entry.offset + start, size).view(stored)
        yield values.astype("float32").astype(wanted).view("uint8").data
