"""The identity of a model in a checkpoint: the names, types, shapes and bytes of the transformer's tensors.

The distribution of tensors over files, and other files in the directory, do not matter: a table of scales
made on one machine is recognised on another that downloaded other shards of the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from cosmos_export import files
from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.safetensors_header import TensorEntry
from cosmos_export.machine.system import cores
from cosmos_export.progress import Progress, Silent

_CHUNK_BYTES = 1 << 24
_TASK = "hash the checkpoint"


def checkpoint_identity(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """SHA-256 (64 hex digits) of the transformer of ``checkpoint``; reads each of its tensors once.

    Each tensor is hashed by itself, several at a time: all tensors of Nano are 30 GB, and one core hashes about
    1.5 GB per second.
    """
    report = progress or Silent()
    tensors = sorted(checkpoint.tensors.items())
    report.begin(_TASK, sum(entry.size_bytes for _, entry in tensors))
    whole = hashlib.sha256(b"cosmos-export checkpoint 1\n")
    done = 0
    with ThreadPoolExecutor(cores()) as pool:
        for (name, entry), digest in zip(tensors, pool.map(_digest, (entry for _, entry in tensors)), strict=True):
            # JSON headers allow any printable name, so the length goes before it.
            line = f"{len(name)} {name} {entry.dtype} {list(entry.shape)} {digest}\n"
            whole.update(line.encode())
            done += entry.size_bytes
            report.update(_TASK, done)
    report.end(_TASK)
    return whole.hexdigest()


def _digest(entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    for chunk in chunks_of(entry):
        digest.update(chunk)
    return digest.hexdigest()


def chunks_of(entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of a tensor, 16 MiB at a time; OSError where its file ends before it.

    Read, not mapped: pages of a mapping would stay in this process, and a checkpoint is larger than memory.
    """
    with files.opened(entry.file) as file:
        file.seek(entry.offset)
        left = entry.size_bytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise OSError(f"{entry.file} ended while it was read")
            left -= len(chunk)
            yield chunk
