"""Triton's interpreter with the device's rounding of bf16 and E4M3.

Triton 3.7's interpreter truncates where the device rounds to nearest even, converts integers to bf16 by their bits, and
computes with bf16 as with integers. The arithmetic here is that of ml_dtypes, numpy's form of these types.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
from triton.runtime import interpreter

_SPECIAL = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn)}


@contextmanager
def device_rounding() -> Iterator[None]:
    """Kernels that are interpreted within round as on a device."""
    builder = interpreter.InterpreterBuilder
    own = {"cast_impl": _cast, "create_fp_to_fp": _cast, "create_dot": _dot, "binary_op": _binary}
    before = {name: getattr(builder, name) for name in own}
    for name, function in own.items():
        setattr(builder, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(builder, name, function)


def _numpy_type(dtype: Any) -> np.dtype[Any]:
    known = _SPECIAL.get(str(dtype.scalar))
    plain: np.dtype[Any] = np.dtype(interpreter._get_np_dtype(dtype.scalar))
    return plain if known is None else known


def _typed(handle: Any) -> np.ndarray[Any, Any]:
    """The data of a value in its own type."""
    own = _numpy_type(handle.dtype)
    data: np.ndarray[Any, Any] = handle.data
    return data if data.dtype == own else data.view(own)


def _cast(builder: Any, source: Any, target: Any, *_: Any) -> Any:
    with np.errstate(all="ignore"):
        data = _typed(source).astype(_numpy_type(target))
    return interpreter.TensorHandle(data.view(interpreter._get_np_dtype(target.scalar)), target.scalar)


_plain_binary = interpreter.InterpreterBuilder.binary_op


def _binary(builder: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    own = lhs.dtype.scalar
    if str(own) not in _SPECIAL:
        return _plain_binary(builder, lhs, rhs, op)
    made = op(_typed(lhs), _typed(rhs))
    return interpreter.TensorHandle(made if made.dtype == np.bool_ else made.view(interpreter._get_np_dtype(own)), own)


def _dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    left, right = (_typed(x).astype(np.float32) for x in (a, b))
    return interpreter.TensorHandle(left @ right + d.data, d.dtype.scalar)
