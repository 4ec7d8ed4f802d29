"""Where the parameters of a checkpoint lie, in the words of the IR."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cosmos_export.checkpoint import TensorEntry
from cosmos_export.ir.spec import WeightSource

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def weight_sources(tensors: Mapping[str, TensorEntry]) -> dict[str, WeightSource]:
    """The place of every tensor of a component that `resolve` let through."""
    return {
        name: WeightSource(name, entry.file, entry.offset, _DTYPES[entry.dtype], tuple(entry.shape))
        for name, entry in tensors.items()
    }
