"""Writes safetensors files whose tensors never exist in memory at once: the header first, then bytes as they come.

Tensors keep the order they are given in, so a reader that walks the model walks the files forward. Sharding and file
names follow the convention of the published repositories.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cosmos_export.checkpoint import dtypes
from cosmos_export.checkpoint.safetensors_header import LENGTH_BYTES, element_count

_ALIGNMENT = 8
"""The data starts at a multiple of this, so that a mapped tensor of any type is aligned."""


_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True)
class TensorHeader:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return element_count(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * dtypes.BITS[self.dtype] // 8


Produce = Callable[[TensorHeader], Iterable[bytes | memoryview]]


def encode_header(specs: Sequence[TensorHeader], metadata: Mapping[str, str] = _METADATA) -> bytes:
    """Length and header of a file that holds ``specs`` in this order, and ``metadata`` in its own."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        end = offset + spec.size_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def split_shards(specs: Sequence[TensorHeader], shard_size: int) -> list[list[TensorHeader]]:
    """Consecutive tensors in files of at most ``shard_size`` bytes; a larger tensor gets a file of its own."""
    shards: list[list[TensorHeader]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.size_bytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.size_bytes
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def write_shards(
    folder: Path, stem: str, specs: Sequence[TensorHeader], produce: Produce, shard_size: int, *, sparse: bool = False
) -> dict[str, str]:
    """Writes the files, and their index when there are several. Returns which file holds which tensor.

    ``sparse``: what ``produce`` does not give of a tensor is a hole, zeros that take no room where the file system has
    holes; without it, that is a ValueError.
    """
    shards = split_shards(specs, shard_size)
    weight_map: dict[str, str] = {}
    for name, shard in zip(shard_names(stem, len(shards)), shards, strict=True):
        _write_file(folder / name, shard, produce, sparse)
        weight_map.update(dict.fromkeys((spec.name for spec in shard), name))
    if len(shards) > 1:
        total = sum(spec.size_bytes for spec in specs)
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    return weight_map


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, specs: Sequence[TensorHeader], produce: Produce, sparse: bool) -> None:
    with path.open("wb") as file:
        file.write(encode_header(specs))
        for spec in specs:
            start = file.tell()
            written = sum(file.write(chunk) for chunk in _nonempty(produce(spec)))
            if sparse and written < spec.size_bytes:
                written = spec.size_bytes
                file.truncate(file.seek(start + written))
            if written != spec.size_bytes:
                raise ValueError(f"{spec.name}: {written} bytes produced, {spec.size_bytes} declared")
        file.flush()
        os.fsync(file.fileno())


def _nonempty(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    return (chunk for chunk in chunks if len(chunk))
