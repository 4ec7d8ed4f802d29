"""Tensors of a checkpoint as torch tensors: read into memory of their own, or mapped where few rows are touched."""

from __future__ import annotations

import numpy as np
import torch

from cosmos_export.checkpoint import TensorEntry
from cosmos_export.diagnostics import UnsupportedError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The type of ``entry``; CX330 for one that nothing is calibrated or quantized from."""
    if entry.dtype not in _DTYPES:
        raise UnsupportedError("CX330", f"{entry.name} has the type {entry.dtype}", "start from the bf16 revision")
    return _DTYPES[entry.dtype]


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """A copy. Pages of a mapping would count as this process's memory for as long as it lives."""
    raw = np.fromfile(entry.file, dtype=np.uint8, count=entry.size_bytes, offset=entry.offset)
    return torch.from_numpy(raw).view(torch_dtype(entry)).reshape(entry.shape)


def map_tensor(entry: TensorEntry) -> torch.Tensor:
    """A view of the file, of which only what is read is loaded."""
    raw = np.memmap(entry.file, dtype=np.uint8, mode="c", offset=entry.offset, shape=(entry.size_bytes,))
    return torch.from_numpy(raw).view(torch_dtype(entry)).reshape(entry.shape)
