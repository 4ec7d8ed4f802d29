"""Element types of safetensors: width in bits, and the numpy type (or ``ml_dtypes`` type) that views them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Every type the format defines. The reader knows them all; the model may use few (``layout.WEIGHT_DTYPES``)."""

_NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


@cache
def numpy_dtype(dtype: str) -> np.dtype[Any] | None:
    """The little-endian numpy type of ``dtype``; None for the packed sub-byte types."""
    if dtype in _NUMPY:
        return np.dtype(_NUMPY[dtype]).newbyteorder("<")
    if dtype in _ML_DTYPES:
        import ml_dtypes

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[dtype]))
        return extended
    return None


def name_of(dtype: np.dtype[Any]) -> str:
    """The element type that numpy's ``dtype`` is written as; KeyError for one that the format does not have."""
    return {numpy_name: name for name, numpy_name in (*_NUMPY.items(), *_ML_DTYPES.items())}[dtype.name]
