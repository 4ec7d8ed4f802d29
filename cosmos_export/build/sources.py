"""Where the parameters of a checkpoint lie, in the words of the IR."""

from __future__ import annotations

import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.ir.spec import WeightSource

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def weight_sources(checkpoint: Checkpoint) -> dict[str, WeightSource]:
    """The place of every transformer parameter.

    Raises UnsupportedError (CX150) for a checkpoint whose weights are quantized: it is recognised, not yet compiled.
    """
    if checkpoint.quantization is not None:
        raise UnsupportedError(
            "CX150",
            f"{checkpoint.root} is quantized ({checkpoint.precision}); building from quantized weights is not supported yet",
            "build from the bf16 revision of the same model; `inspect` reads both",
        )
    return {
        name: WeightSource(name, entry.file, entry.offset, _DTYPES[entry.dtype], tuple(entry.shape))
        for name, entry in checkpoint.tensors.items()
    }
