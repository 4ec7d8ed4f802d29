"""The first layers of a model that is too large to be compared whole, as a checkpoint and a job of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from types import MappingProxyType

from cosmos_export.bundle import BundleWriter
from cosmos_export.checkpoint import Checkpoint, TensorEntry
from cosmos_export.checkpoint.layout import SCALES, ExpectedTensor, expected_tensors
from cosmos_export.checkpoint.strict_json import read_object
from cosmos_export.compiler.allocator import return_freed_memory
from cosmos_export.compiler.evidence import Evidence
from cosmos_export.compiler.job import Job
from cosmos_export.compiler.published import MEMORY_SHARE
from cosmos_export.diagnostics import FindingError
from cosmos_export.machine.memory import available_bytes
from cosmos_export.targets import load_target

FIRST_BYTES = 1_500_000_000
"""Weights of a part, unless its one layer has more: 1.9 GB in Super."""
_VOCABULARY = 4096
"""Rows of the embedding, of which a prompt reads as many as it has tokens."""
_FP32_BYTES = 4


def first_layers(checkpoint: Checkpoint, folder: Path, weight_bytes: int, memory_bytes: int) -> Checkpoint | None:
    """The first layers of both towers, as many as have ``weight_bytes`` and at least one, and the first rows of the
    embedding, by reference into the files of ``checkpoint``. Only the configuration is written, into ``folder``.

    None where not even one layer is within ``memory_bytes`` as fp32.
    """
    for layers in range(checkpoint.geometry.num_hidden_layers, 0, -1):
        vocabulary = min(checkpoint.geometry.vocab_size, _VOCABULARY)
        geometry = replace(checkpoint.geometry, num_hidden_layers=layers, vocab_size=vocabulary)
        expected = expected_tensors(geometry)
        tensors = _tensors(checkpoint, expected)
        stored = sum(entry.size_bytes for entry in tensors.values())
        wide = _FP32_BYTES * sum(tensor.elements for tensor in expected.values())
        if wide <= memory_bytes and (stored <= weight_bytes or layers == 1):
            transformer = folder / "transformer"
            transformer.mkdir()
            config = read_object(checkpoint.components["transformer"] / "config.json")
            config |= {"num_hidden_layers": layers, "vocab_size": vocabulary}
            (transformer / "config.json").write_text(json.dumps(config), encoding="utf-8")
            return replace(
                checkpoint,
                geometry=geometry,
                expected=MappingProxyType(expected),
                tensors=MappingProxyType(tensors),
                components=MappingProxyType({**checkpoint.components, "transformer": transformer}),
            )
    return None


def _tensors(checkpoint: Checkpoint, expected: Mapping[str, ExpectedTensor]) -> dict[str, TensorEntry]:
    """The places of ``expected`` and of their scales; a tensor with fewer rows is the beginning of its own."""
    found = {}
    for name, tensor in expected.items():
        entry = checkpoint.tensors[name]
        size = entry.size_bytes // entry.elements * tensor.elements if entry.elements else 0
        found[name] = replace(entry, shape=tensor.shape, size_bytes=size)
        for scale in (f"{name.removesuffix('.weight')}.{kind}" for kind in SCALES):
            if scale in checkpoint.tensors:
                found[scale] = checkpoint.tensors[scale]
    return found


def job_of_part(job: Job, part: Checkpoint) -> Job:
    """``job`` for ``part``, in each respect that its graphs follow from, without engines. A layer has the precision
    that it has in the whole model."""
    return replace(
        job, checkpoint=part, target=load_target("cpu"), components=(), parity="always", kernels=(), weights="embedded",
        dump=None, cache=None, memory_budget=None, part_of=job.layers,
    )  # fmt: skip


def compare_first_layers(
    job: Job, writer: BundleWriter, evidence: Evidence, build: Callable[[Job, BundleWriter, Evidence], None]
) -> str:
    """``build`` a bundle of the first layers of both towers, measured as that of a model that fits in memory; it is not
    kept. It proves the capture, the passes and the lowering of this geometry, and reads a part of the weights.

    What it measures is added to ``evidence``; returns what is to be said of it. FindingError as for a whole model.
    """
    memory = min(available_bytes(), job.memory_budget or inf)
    with writer.scratch() as folder:
        part = first_layers(job.checkpoint, folder, FIRST_BYTES, int(MEMORY_SHARE * memory))
        if part is None:
            return "; its first layer alone does not fit either"
        first = f"first {part.geometry.num_hidden_layers} of {job.layers} layers"
        seen, inner = Evidence(), BundleWriter(folder / "bundle", require_inputs=job.require_inputs)
        try:
            build(job_of_part(job, part), inner, seen)
        except FindingError as error:
            raise FindingError(error.code, f"{first} alone: {error.message}", error.hint) from error
        finally:
            evidence.parity.extend([replace(measured, stage=f"{measured.stage}, {first}") for measured in seen.parity])
    return_freed_memory()
    return f"; its {first} were compared"
