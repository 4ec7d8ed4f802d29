"""Where the parameters of a checkpoint lie, in the words of the IR."""

from __future__ import annotations

import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.ir.spec import WeightSource

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def weight_sources(checkpoint: Checkpoint) -> dict[str, WeightSource]:
    """The place of every transformer parameter of a checkpoint that `resolve` let through."""
    return {
        name: WeightSource(name, entry.file, entry.offset, _DTYPES[entry.dtype], tuple(entry.shape))
        for name, entry in checkpoint.tensors.items()
    }
