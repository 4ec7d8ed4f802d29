"""Places of the parameters of a checkpoint on disk, as weight sources of the IR."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cosmos_export.checkpoint import TensorEntry
from cosmos_export.checkpoint.layout import QUANTIZED_DTYPE
from cosmos_export.ir.spec import WeightSource

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
_WEIGHT, _SCALE = ".weight", ".weight_scale"


def weight_sources(tensors: Mapping[str, TensorEntry]) -> dict[str, WeightSource]:
    """The place of every tensor of a component that `resolve` let through, an FP8 weight's with that of its scale."""
    return {name: _source(name, entry, _scale_of(name, entry, tensors)) for name, entry in tensors.items()}


def _source(name: str, entry: TensorEntry, scale: WeightSource | None = None) -> WeightSource:
    return WeightSource(name, entry.file, entry.offset, _DTYPES[entry.dtype], tuple(entry.shape), scale)


def _scale_of(name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> WeightSource | None:
    if entry.dtype != QUANTIZED_DTYPE:
        return None
    scale = name.removesuffix(_WEIGHT) + _SCALE
    return _source(scale, tensors[scale])
