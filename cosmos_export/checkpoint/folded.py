"""A checkpoint whose weights have adapters added, written in blocks of rows: no weight is in memory as a whole.

The weights that an adapter changes are written to a file beside the output, in the type that they have; all others stay
where they are. Every reader of the checkpoint then reads the sum: capture, quantization, calibration and comparisons.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from cosmos_export import directories
from cosmos_export.checkpoint.adapters import CONFIG
from cosmos_export.checkpoint.dtypes import numpy_dtype
from cosmos_export.checkpoint.output import require_space
from cosmos_export.checkpoint.read_adapter import Adapter, AdapterPart, describe_adapters
from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.safetensors_header import TensorEntry, read_exactly, read_header
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, write_shards
from cosmos_export.diagnostics import ToolError, UserError
from cosmos_export.progress import Progress, Silent

BLOCK_BYTES = 1 << 24
"""Bytes of a block of rows, in float32."""
_STEM = "folded"
_KIND = "folding"
_TASK = "add adapters"


class ScratchFolder:
    """A directory beside ``output`` that is removed when this object goes, or when the next command finds it left."""

    def __init__(self, output: Path | None) -> None:
        near = Path(tempfile.gettempdir()) / "cosmos-export" if output is None else output.absolute()
        near.parent.mkdir(parents=True, exist_ok=True)
        directories.remove_dead(near, _KIND)
        path = directories.sibling(near, _KIND)
        if path is None:
            raise ToolError("CX707", f"too many unfinished directories beside {near}", "remove them")
        path.mkdir(0o700)
        self.path = path
        weakref.finalize(self, _remove, path, _locked(path))


def _locked(path: Path) -> int | None:
    try:
        return directories.lock(path)
    except OSError:  # a file system without locks
        return None


def _remove(path: Path, descriptor: int | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if descriptor is not None:
        os.close(descriptor)


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
    needed = sum(spec.size_bytes for spec in specs)
    scratch = ScratchFolder(output)
    require_space(
        scratch.path / _STEM, needed, "CX129", "the weights with adapters", "free some space, or another --output"
    )
    report = progress or Silent()
    report.begin(_TASK, needed)
    done = 0

    def produce(spec: TensorHeader) -> Iterator[memoryview]:
        nonlocal done
        for block in folded_rows(checkpoint.tensors[spec.name], parts[spec.name]):
            done += len(block)
            report.update(_TASK, done)
            yield block

    write_shards(scratch.path, _STEM, specs, produce, max(needed, 1))
    report.end(_TASK)
    written = read_header(scratch.path / f"{_STEM}.safetensors").tensors
    return replace(
        checkpoint,
        tensors=MappingProxyType({**checkpoint.tensors, **written}),
        adapters=left_out(checkpoint, adapters),
        folded=describe_adapters(tuple(adapters)),
        folded_files=tuple(adapter.path for adapter in adapters),
        scratch=(*checkpoint.scratch, scratch),
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
