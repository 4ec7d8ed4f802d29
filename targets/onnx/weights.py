"""Weights on their way from the checkpoint into one file: streamed, each written once."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import RawIOBase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from cosmos_export import units
from cosmos_export.checkpoint.safetensors_header import read_exactly
from cosmos_export.diagnostics import ToolError
from cosmos_export.ir.dims import product
from cosmos_export.ir.interpreter import FOUR_BIT, as_multiplied, kept_scale, pack_rows, tensor_scale, weight_norm
from cosmos_export.ir.packing import e2m1_codes, largest, nibbles
from cosmos_export.ir.spec import E2M1, INT4, Packing, Part, Transform, WeightBinding, WeightSource
from cosmos_export.progress import Progress

ALIGNMENT = 4096
"""Offsets are multiples of a page, so that every tensor can be mapped by itself."""
_CHUNK_BYTES = 2 << 20
"""Bytes of a tensor processed at a time: they stay in a core's cache while they are computed, hashed and written."""

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
    INT4: np.dtype(ml_dtypes.int4),
    E2M1: np.dtype(ml_dtypes.float4_e2m1fn),
    torch.int64: np.dtype(np.int64),
    torch.bool: np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Stored:
    """The place of a binding's value in the weight file."""

    offset: int
    size_bytes: int


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return _NUMPY[dtype]


class StoredArray:
    """A tensor in its file, of which rows are read when they are asked for."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.dtype, self.shape, self.ndim = numpy_dtype(source.dtype), source.shape, len(source.shape)
        self.row_bytes = self.dtype.itemsize * int(product(source.shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        return self._read(start * self.row_bytes, (max(0, stop - start), *self.shape[1:]))

    def all(self) -> np.ndarray:
        """The whole tensor."""
        return self._read(0, self.shape)

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        size = self.dtype.itemsize * int(product(shape))
        return read_exactly(self._source.file, self._source.offset + offset, size).view(self.dtype).reshape(shape)


def size_bytes(binding: WeightBinding) -> int:
    elements = int(product(binding.shape))
    return elements // 2 if binding.dtype in FOUR_BIT else elements * binding.dtype.itemsize


def layout(bindings: Iterable[WeightBinding]) -> dict[WeightBinding, Stored]:
    """Offsets of every binding in the file that `write_weights` writes for the same bindings in the same order."""
    result: dict[WeightBinding, Stored] = {}
    offset = 0
    for binding in bindings:
        if binding not in result:
            result[binding] = Stored(offset, size_bytes(binding))
            offset += -(-size_bytes(binding) // ALIGNMENT) * ALIGNMENT
    return result


def file_size(stored: dict[WeightBinding, Stored]) -> int:
    return max((s.offset + s.size_bytes for s in stored.values()), default=0)


def write_weights(path: Path, stored: dict[WeightBinding, Stored], task: str, progress: Progress) -> str:
    """Write every binding at its place; returns the SHA-256 of the file, which appears when it is complete.

    Peak memory is a few chunks of 16 MiB, whatever the model. Chunks of zeros become holes, as they may be in the
    checkpoint. Raises ToolError (CX440) where the disk is full.
    """
    progress.begin(task, file_size(stored))
    partial = path.with_name(f".{path.name}.partial")
    scales = _Scales()
    try:
        with partial.open("wb", buffering=0) as file:
            writer = _Hashed(file)
            for binding, place in stored.items():
                writer.pad(place.offset)
                _write(binding, writer, scales)
                progress.update(task, place.offset + place.size_bytes)
            file.truncate(writer.size)
            os.fsync(file.fileno())
        partial.replace(path)
        return writer.digest.hexdigest()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ToolError(
            "CX440",
            f"writing {path.name} ({units.size(file_size(stored))}) failed: {error.strerror if full else error}",
            "free disk space or choose another output directory" if full else "",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
        progress.end(task)


class _Hashed:
    """A file written from front to back, and its digest. What is all zero is skipped over and stays a hole."""

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        if not rest.nbytes:
            return
        rest = rest.cast("B")
        self.digest.update(rest)
        self.size += len(rest)
        if not np.frombuffer(rest, np.uint8).any():
            self._file.seek(len(rest), os.SEEK_CUR)
            return
        while rest:
            rest = rest[self._file.write(rest) or 0 :]

    def pad(self, offset: int) -> None:
        """Zeros up to ``offset``."""
        self.write(bytes(offset - self.size))


def _write(binding: WeightBinding, file: _Hashed, scales: _Scales) -> None:
    if binding.keeps_bytes and binding.packing is not None and binding.packing.part is Part.SCALE:
        file.write(_bytes(kept_scale(binding, read_source)))
        return
    computed = binding.packing is not None or any(s.scale is not None for s in binding.sources)
    if computed and not binding.keeps_bytes:
        for packed in _packed(binding, scales):
            file.write(packed)
        return
    dtype = numpy_dtype(binding.dtype)
    sources = [StoredArray(s) for s in binding.sources]
    if binding.transform is Transform.INTERLEAVE:
        rows = _rows_per_chunk(sources[0], len(sources))
        for start in range(0, len(sources[0]), rows):
            block = np.stack([s[start : start + rows].astype(dtype, copy=False) for s in sources], axis=1)
            file.write(np.ascontiguousarray(block).view(np.uint8).data)
        return
    if binding.transform is Transform.SCALE:
        vector, factors = (read_source(source) for source in binding.sources)
        file.write(_bytes((vector.to(torch.float32) * factors.to(torch.float32)).to(binding.dtype)))
        return
    if binding.transform is Transform.WEIGHT_NORM:
        magnitudes, directions = sources
        rows = _rows_per_chunk(directions, 2)
        for start in range(0, len(directions), rows):
            both = zip((magnitudes, directions), binding.sources, strict=True)
            parts = [_tensor(array[start : start + rows], source.dtype) for array, source in both]
            file.write(weight_norm(parts[0], parts[1], binding.dtype).view(torch.uint8).numpy().data)
        return
    for source in sources:
        if source.ndim == 0:
            file.write(source.all().astype(dtype).tobytes())
            continue
        rows = _rows_per_chunk(source, 1)
        for start in range(0, len(source), rows):
            block = np.ascontiguousarray(source[start : start + rows].astype(dtype, copy=False))
            file.write(block.view(np.uint8).data)


class _Scales:
    """Scales of packed weights, each found once: their values and their scale are two tensors of the file."""

    def __init__(self) -> None:
        self._known: dict[WeightBinding, torch.Tensor] = {}

    def of(self, binding: WeightBinding) -> torch.Tensor:
        assert binding.packing is not None
        if binding.packing.format.local:
            return torch.ones(())  # its scales are in the rows
        plain = replace(binding, dtype=torch.float32, packing=replace(binding.packing, part=Part.SCALE))
        if plain not in self._known:
            amax = torch.stack([largest(block) for block in _rows(binding)]).amax()
            self._known[plain] = tensor_scale(binding.packing, amax)
        return self._known[plain]


def _packed(binding: WeightBinding, scales: _Scales) -> Iterator[bytes]:
    """The bytes of a weight that is computed, a block of rows at a time."""
    packing = binding.packing
    if packing is None:
        yield from (_bytes(block.to(binding.dtype)) for block in _rows(binding))
        return
    scale = scales.of(binding)
    if packing.part is Part.SCALE and not packing.format.local:
        yield _bytes(scale)
        return
    for block in _rows(binding):
        packed = pack_rows(packing, block, scale)
        if binding.dtype is INT4:
            packed = nibbles(packed)
        elif binding.dtype is E2M1:
            packed = nibbles(e2m1_codes(packed))
        yield _bytes(packed)


def _rows(binding: WeightBinding) -> Iterator[torch.Tensor]:
    """Float32 rows of what sources and transform of a binding give, before it is packed, in blocks."""
    sources = [(StoredArray(source), source) for source in binding.sources]
    divisor = None
    if binding.packing is not None and binding.packing.divisor is not None:
        divisor = read_source(binding.packing.divisor).to(torch.float32)
    taken = _Taken(binding.packing)
    together = binding.transform is Transform.INTERLEAVE
    numbers = range(len(sources))
    for group in [numbers] if together else [[one] for one in numbers]:
        first = sources[group[0]][0]
        count = _rows_per_chunk(first, 2 * len(group))
        for start in range(0, len(first), count):
            some = slice(start, start + count)
            parts = []
            for number in group:
                array, source = sources[number]
                part = _widened(array[some], source)
                parts.append(taken(part if divisor is None else part / divisor, number, some))
            yield torch.stack(parts, dim=1).flatten(0, 1) if together else parts[0]


class _Taken:
    """Takes the part of low rank that is not packed from rows of a weight's source."""

    def __init__(self, packing: Packing | None) -> None:
        self._packing = packing if packing is not None and packing.low_rank is not None else None
        if self._packing is not None and self._packing.low_rank is not None:
            part = self._packing.low_rank
            self._down = as_multiplied(read_source(part.down), self._packing)
            self._up = [(StoredArray(source), source.dtype) for source in part.up]

    def __call__(self, rows: torch.Tensor, number: int, some: slice) -> torch.Tensor:
        if self._packing is None:
            return rows
        array, dtype = self._up[number]
        return rows - as_multiplied(_tensor(array[some], dtype), self._packing) @ self._down


def _widened(rows: np.ndarray, source: WeightSource) -> torch.Tensor:
    value = _tensor(rows, source.dtype).to(torch.float32)
    return value if source.scale is None else value * read_source(source.scale).to(torch.float32)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _rows_per_chunk(array: StoredArray, sources: int) -> int:
    return max(1, _CHUNK_BYTES // (max(1, array.row_bytes) * sources))


def read_source(source: WeightSource) -> torch.Tensor:
    """The tensor itself, for the interpreter (a copy, in memory)."""
    return _tensor(StoredArray(source).all(), source.dtype)


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The same memory as a tensor. numpy has no name for some types, so their bits are handed over."""
    if dtype in (torch.bfloat16, torch.float8_e4m3fn):
        bits = torch.from_numpy(array.view(np.uint16 if dtype is torch.bfloat16 else np.uint8))
        return bits.view(dtype).reshape(array.shape)
    return torch.from_numpy(array)
