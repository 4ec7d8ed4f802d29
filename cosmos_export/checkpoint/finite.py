"""Looks through all weights of a checkpoint for values that are not numbers, before any work is done with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.checkpoint.safetensors_header import TensorEntry, read_exactly
from cosmos_export.diagnostics import UserError
from cosmos_export.machine.system import cores
from cosmos_export.progress import Progress, Silent

_BLOCK_BYTES = 1 << 24
TASK = "look at the weights"
# Bits of the exponent, all of which are set in what is not finite; in E4M3 only together with those of the fraction.
_MASKS: Mapping[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000), "F8_E4M3": ("<u1", 0x7F),
}  # fmt: skip
_SHOWN = 3


def require_finite(checkpoint: Checkpoint, progress: Progress | None = None) -> None:
    """CX133 where a weight of the transformer or of another component has NaN or infinite values. Reads every weight
    once, several at a time."""
    entries = [*checkpoint.tensors.values()]
    entries += [entry for tensors in checkpoint.component_tensors.values() for entry in tensors.values()]
    report = progress or Silent()
    report.begin(TASK, sum(entry.size_bytes for entry in entries))
    done, bad = 0, []
    with ThreadPoolExecutor(cores()) as pool:
        for entry, count in zip(entries, pool.map(_count, entries), strict=True):
            done += entry.size_bytes
            report.update(TASK, done)
            if count:
                bad.append(f"{entry.name} ({count:,} of {entry.elements:,} values, in {entry.file.name})")
    report.end(TASK)
    if bad:
        rest = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UserError(
            "CX133",
            f"weights of {checkpoint.root} are NaN or infinite: {', '.join(bad[:_SHOWN])}{rest}",
            "the checkpoint itself is broken: download these files again, or export it again from its training",
        )


def _count(entry: TensorEntry) -> int:
    """Values of ``entry`` that are not finite; of a type without such values, 0."""
    if entry.dtype not in _MASKS:
        return 0
    kind, mask = _MASKS[entry.dtype]
    return sum(int(np.count_nonzero((block.view(kind) & mask) == mask)) for block in _blocks(entry))


def _blocks(entry: TensorEntry) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, entry.size_bytes, _BLOCK_BYTES):
        yield read_exactly(entry.file, entry.offset + start, min(_BLOCK_BYTES, entry.size_bytes - start))
