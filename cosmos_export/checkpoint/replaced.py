"""A checkpoint some of whose tensors are others: those are written beside what is being made, in blocks."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from cosmos_export import directories
from cosmos_export.checkpoint.output import require_space
from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, write_shards
from cosmos_export.diagnostics import ToolError
from cosmos_export.progress import Progress, Silent

BLOCK_BYTES = 1 << 24
"""Bytes of a block of values, in float32."""
_KIND = "folding"


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


def with_tensors(
    checkpoint: Checkpoint,
    specs: Sequence[TensorHeader],
    blocks: Callable[[TensorHeader], Iterator[memoryview]],
    *,
    name: str,
    what: str,
    task: str,
    output: Path | None,
    progress: Progress | None,
) -> Checkpoint:
    """``checkpoint`` with the tensors ``specs``, whose bytes ``blocks`` yields, in the place of its own.

    They are written to the file ``name`` beside ``output``, and go with the returned checkpoint. ``what`` they are, in
    words, and the ``task`` of the progress. CX129: too little disk space.
    """
    needed = sum(spec.size_bytes for spec in specs)
    scratch = ScratchFolder(output)
    require_space(scratch.path / name, needed, "CX129", what, "free some space, or another --output")
    report = progress or Silent()
    report.begin(task, needed)
    done = 0

    def produce(spec: TensorHeader) -> Iterator[memoryview]:
        nonlocal done
        for block in blocks(spec):
            done += len(block)
            report.update(task, done)
            yield block

    write_shards(scratch.path, name, specs, produce, max(needed, 1))
    report.end(task)
    written = read_header(scratch.path / f"{name}.safetensors").tensors
    return replace(
        checkpoint,
        tensors=MappingProxyType({**checkpoint.tensors, **written}),
        scratch=(*checkpoint.scratch, scratch),
    )
