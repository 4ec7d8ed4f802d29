"""Where kernels run in these tests, and Triton's interpreter with the device's rounding of bf16 and E4M3.

Triton 3.7's interpreter truncates where the device rounds to nearest even, converts integers to bf16 by their bits, and
multiplies bf16 matrices as integers. The conversions here are those of ml_dtypes, numpy's form of these types.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _numpy_type(dtype: Any) -> np.dtype[Any]:
    special = {"bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn}
    name = str(dtype.scalar)
    return np.dtype(special[name]) if name in special else np.dtype(interpreter._get_np_dtype(dtype.scalar))


def _typed(handle: Any) -> np.ndarray[Any, Any]:
    """The data of a value in its own type."""
    own = _numpy_type(handle.dtype)
    return handle.data if handle.data.dtype == own else handle.data.view(own)


def _cast(builder: Any, source: Any, target: Any, *_: Any) -> Any:
    with np.errstate(all="ignore"):
        data = _typed(source).astype(_numpy_type(target))
    return interpreter.TensorHandle(data.view(interpreter._get_np_dtype(target.scalar)), target.scalar)


def _dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    left, right = (_typed(x).astype(np.float32) for x in (a, b))
    return interpreter.TensorHandle(left @ right + d.data, d.dtype.scalar)


def round_as_the_device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tl.bfloat16.primitive_bitwidth == 16
    for name in ("cast_impl", "create_fp_to_fp"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, _cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
