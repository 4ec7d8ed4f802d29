"""A checkpoint whose weights have adapters added, written in blocks of rows: no weight is in memory as a whole.

The weights that an adapter changes are written to a file beside the output, in the type that they have; all others stay
where they are. Every reader of the checkpoint then reads the sum: capture, quantization, calibration and comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cosmos_export.checkpoint.adapters import CONFIG
from cosmos_export.checkpoint.dtypes import numpy_dtype
from cosmos_export.checkpoint.read_adapter import Adapter, AdapterPart, describe_adapters
from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.replaced import BLOCK_BYTES, with_tensors
from cosmos_export.checkpoint.safetensors_header import TensorEntry, read_exactly
from cosmos_export.checkpoint.safetensors_writer import TensorHeader
from cosmos_export.diagnostics import UserError
from cosmos_export.progress import Progress


def fold(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], output: Path | None, progress: Progress | None = None
) -> Checkpoint:
    """``checkpoint`` with ``adapters`` added to its weights, in the order given; itself where there are none.

    ``output``: what is being made; the folded weights are written beside it, and go with the returned checkpoint.
    CX128: a sum is not finite; CX129: too little disk space.
    """
    if not adapters:
        return checkpoint
    parts: dict[str, list[AdapterPart]] = {}
    for adapter in adapters:
        for name, part in adapter.parts.items():
            parts.setdefault(name, []).append(part)
    specs = [
        TensorHeader(name, checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
        for name in checkpoint.expected
        if name in parts
    ]
    replaced = with_tensors(
        checkpoint,
        specs,
        lambda spec: folded_rows(checkpoint.tensors[spec.name], parts[spec.name]),
        name="folded",
        what="the weights with adapters",
        task="add adapters",
        output=output,
        progress=progress,
    )
    return replace(
        replaced,
        adapters=left_out(checkpoint, adapters),
        folded=describe_adapters(tuple(adapters)),
        folded_files=tuple(adapter.path for adapter in adapters),
    )


def left_out(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> tuple[Path, ...]:
    """Files of adapters in the folders of ``checkpoint`` that are not of ``adapters``."""
    used = {adapter.path.resolve() for adapter in adapters}
    configs = {path.parent / CONFIG for path in used}
    return tuple(path for path in checkpoint.adapters if path.resolve() not in used | configs)


def folded_rows(base: TensorEntry, parts: Sequence[AdapterPart]) -> Iterator[memoryview]:
    """The bytes of ``base`` with ``parts`` added in float32, rounded once, in blocks of rows."""
    rows, columns = base.shape
    dtype = numpy_dtype(base.dtype)
    assert dtype is not None
    downs = [part.down.array().astype(np.float32) for part in parts]
    ups = [part.up.array().astype(np.float32) for part in parts]
    step = max(1, BLOCK_BYTES // (4 * columns))
    width = columns * dtype.itemsize
    for start in range(0, rows, step):
        count = min(step, rows - start)
        stored = read_exactly(base.file, base.offset + start * width, count * width).view(dtype)
        total = stored.reshape(count, columns).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # it is found below
            for part, down, up in zip(parts, downs, ups, strict=True):
                total += np.float32(part.factor) * (up[start : start + count] @ down)
            rounded = total.astype(dtype)
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise UserError(
                "CX128",
                f"{base.name} with its adapter has values that are not finite in {base.dtype}",
                "a smaller scale: --adapter PATH:SCALE",
            )
        yield rounded.reshape(-1).view(np.uint8).data


def folded_options(checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
    """The adapters that are in the weights, as options of a manifest; empty where there are none."""
    return {"adapters": checkpoint.folded} if checkpoint.folded else {}
