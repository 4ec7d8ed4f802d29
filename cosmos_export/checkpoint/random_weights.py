"""Seeded random weights, one tensor at a time: the same seed and name give the same bytes, whatever else is written.

Values are chosen so that nothing is an identity and signals keep their size through many layers: norm weights near one,
biases and embeddings visible, matrices scaled by the square root of what they sum over.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cosmos_export.checkpoint import dtypes
from cosmos_export.checkpoint.safetensors_writer import TensorHeader
from cosmos_export.machine.system import cores

_CHUNK = 1 << 20
"""Elements generated at a time. Part of what the bytes are: each chunk has its own seed."""
_HEAD_BYTES = 64 << 10
"""Bytes of a tensor that get values: some rows of a matrix, so that errors of results average out."""
_HEAD = 2.0**-5
"""Magnitude of these values: sums over a row stay near one."""
_AHEAD = 4
"""Chunks in work for each core, so that generating and writing overlap."""
_NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def produce(
    seed: int, fan_in: Mapping[str, int] | None = None, on_bytes: Callable[[int], None] = lambda _: None
) -> Callable[[TensorHeader], Iterator[memoryview]]:
    """A producer for ``write_shards``. ``fan_in``: by name, where no shape shows it; ``on_bytes``: told of each piece's
    size."""
    known = fan_in or {}

    def pieces(spec: TensorHeader) -> Iterator[memoryview]:
        mean, scale = statistics(spec, known.get(spec.name))
        work = partial(_chunk, seed, spec, np.float32(mean), np.float32(scale))
        for raw in _in_order(work, -(-spec.elements // _CHUNK)):
            on_bytes(raw.size)
            yield raw.data

    return pieces


def produce_heads(seed: int) -> Callable[[TensorHeader], Iterator[memoryview]]:
    """A producer of the first pages of each tensor: no two are alike, and a builder that stores equal constants once
    stores them all. The rest of each is for the writer to leave out.

    Values are one power of two with random signs, which every low-precision form has exactly: of the few results that
    so few weights have, no error could be told from chance.
    """

    def head(spec: TensorHeader) -> Iterator[memoryview]:
        few = min(spec.elements, _HEAD_BYTES // (dtypes.BITS[spec.dtype] // 8))
        values = _chunk(seed, replace(spec, shape=(few,)), np.float32(0), np.float32(1), 0).view(_NUMPY[spec.dtype])
        size = np.float32(1.0 if len(spec.shape) == 1 else _HEAD)
        yield np.copysign(size, values.astype(np.float32)).astype(_NUMPY[spec.dtype]).view(np.uint8).data

    return head


def _chunk(seed: int, spec: TensorHeader, mean: np.float32, scale: np.float32, index: int) -> NDArray[np.uint8]:
    digest = hashlib.sha256(f"{seed}/{spec.name}/{index}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    values = generator.standard_normal(min(_CHUNK, spec.elements - index * _CHUNK), dtype=np.float32)
    values *= scale
    values += mean
    return values.astype(_NUMPY[spec.dtype], copy=False).view(np.uint8)


def _in_order(work: Callable[[int], NDArray[np.uint8]], count: int) -> Iterator[NDArray[np.uint8]]:
    """``work(0)``, ``work(1)`` … computed by all cores, a bounded number ahead of the reader."""
    if count <= 1:
        yield from map(work, range(count))
        return
    workers = cores()
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[NDArray[np.uint8]]] = deque()
        for index in range(count):
            pending.append(pool.submit(work, index))
            if len(pending) > _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def statistics(spec: TensorHeader, fan_in: int | None = None) -> tuple[float, float]:
    """Mean and standard deviation of a tensor, by what its name and shape say it is."""
    leaf = spec.name.rsplit(".", 1)[-1]
    if leaf == "weight_g":
        return 0.7, 0.07  # with 1, the sound decoder's stack of residual units clips every sample
    if leaf == "gamma" or (leaf == "weight" and len(spec.shape) == 1):
        return 1.0, 0.1
    if len(spec.shape) == 1 or leaf in ("alpha", "beta") or spec.name.endswith(".bias.weight"):
        return 0.0, 0.1
    return 0.0, max(fan_in or spec.elements // spec.shape[0], 1) ** -0.5
