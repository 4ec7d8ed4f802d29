"""Tensors of a checkpoint as torch tensors: whole, or the rows that are looked up."""

from __future__ import annotations

import torch
from torch import nn

from cosmos_export.checkpoint import TensorEntry
from cosmos_export.checkpoint.safetensors_header import read_exactly
from cosmos_export.diagnostics import UnsupportedError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The type of ``entry``; CX330 for one that nothing is calibrated or quantized from."""
    if entry.dtype not in _DTYPES:
        raise UnsupportedError("CX330", f"{entry.name} has the type {entry.dtype}", "start from the bf16 revision")
    return _DTYPES[entry.dtype]


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """The tensor in memory of its own."""
    return torch.from_numpy(entry.raw()).view(torch_dtype(entry)).reshape(entry.shape)


class RowsOf(nn.Embedding):
    """An embedding whose rows are read from the file when they are looked up: a prompt touches few of a large table."""

    def __init__(self, entry: TensorEntry, dtype: torch.dtype) -> None:
        rows, width = entry.shape
        super().__init__(rows, width, device="meta", dtype=dtype)
        self._entry, self._row_bytes = entry, entry.size_bytes // max(1, rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found, places = torch.unique(ids, return_inverse=True)
        read = [
            torch.from_numpy(
                read_exactly(self._entry.file, self._entry.offset + row * self._row_bytes, self._row_bytes)
            )
            for row in found.tolist()
        ]
        return torch.stack(read).view(torch_dtype(self._entry)).to(self.weight.dtype)[places]
