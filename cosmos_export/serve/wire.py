"""Messages of both protocols: msgpack with NumPy arrays in it. Nothing in a message is ever made into code or objects.

An array is looked at before it is used: a plain number type, a shape whose size is that of its bytes. It is a read-only
view into the message. openpi writes an array as a map with ``__ndarray__``, its bytes, type and shape; GR00T as a map
with ``__ndarray_class__`` and the bytes of a ``.npy`` file.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any, NoReturn

import msgpack
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cosmos_export.diagnostics import UserError

MAX_DIMS = 6
MAX_HEADER_BYTES = 4096
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_HEADER = re.compile(
    rb"\{'descr': '([^'\\]{2,8})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,15}, ?)*\d{0,15})\), \} *\n"
)
_OPENPI = {b"__ndarray__", b"data", b"dtype", b"shape"}
_GENERIC = {b"__npgeneric__", b"data", b"dtype"}
_GROOT = {"__ndarray_class__", "as_npy"}


def unpack(data: bytes) -> Any:
    """Decode ``data``: maps, lists, text, numbers, and arrays of numbers. UserError CX641: it is no such message."""
    try:
        return msgpack.unpackb(data, object_pairs_hook=_object, ext_hook=_extension)
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, MemoryError, msgpack.UnpackException) as error:
        _refuse(f"not msgpack: {type(error).__name__}: {str(error)[:120]}")


def pack(value: Any) -> bytes:
    """``value`` as openpi writes it."""
    return bytes(msgpack.packb(value, default=_openpi_array))


def pack_groot(value: Any) -> bytes:
    """``value`` as GR00T writes it."""
    return bytes(msgpack.packb(value, default=_groot_array))


# -- reading ----------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[Any, Any]]) -> Any:
    """A map, or the array that it stands for."""
    found = dict(pairs)
    if len(found) != len(pairs):
        _refuse("a map has a key twice")
    if b"__ndarray__" in found:
        if found.keys() != _OPENPI or found[b"__ndarray__"] is not True:
            _refuse("an array has other fields than its bytes, type and shape")
        return _array(found[b"data"], _dtype(found[b"dtype"]), found[b"shape"])
    if b"__npgeneric__" in found:
        if found.keys() != _GENERIC or found[b"__npgeneric__"] is not True:
            _refuse("a number has other fields than its value and type")
        return _number(found[b"data"], _dtype(found[b"dtype"]))
    if "__ndarray_class__" in found:
        if found.keys() != _GROOT or found["__ndarray_class__"] is not True or not isinstance(found["as_npy"], bytes):
            _refuse("an array has other fields than the bytes of its file")
        return _npy(found["as_npy"])
    return found


def _extension(code: int, _: bytes) -> NoReturn:
    _refuse(f"an extension type ({code})")


def _dtype(name: object) -> np.dtype[Any]:
    """A type of plain numbers. Objects, text, dates, records and complex numbers are none."""
    text = name.decode("ascii", "replace") if isinstance(name, bytes) else name
    if not isinstance(text, str) or not _NUMBERS.fullmatch(text):
        _refuse(f"an array of type {str(name)[:40]!r}, which is no type of numbers")
    return np.dtype(text)


def _array(data: object, dtype: np.dtype[Any], shape: object) -> NDArray[Any]:
    if not isinstance(data, bytes) or not isinstance(shape, list | tuple):
        _refuse("an array without bytes or without a shape")
    if len(shape) > MAX_DIMS or not all(type(size) is int and size >= 0 for size in shape):
        _refuse(f"an array of shape {str(shape)[:80]}")
    if math.prod(shape) * dtype.itemsize != len(data):
        _refuse(f"an array of shape {str(shape)[:80]} and type {dtype} in {len(data)} bytes")
    if dtype.kind == "b" and len(data) and max(data) > 1:
        _refuse("a truth value that is neither 0 nor 1")
    return np.frombuffer(data, dtype).reshape(shape) if data else np.empty(shape, dtype)


def _number(value: object, dtype: np.dtype[Any]) -> Any:
    kinds = {"b": (bool,), "f": (int, float)}.get(dtype.kind, (int,))
    if type(value) not in kinds:
        _refuse(f"a number of type {dtype} that is {str(value)[:40]!r}")
    try:
        return dtype.type(value)
    except (OverflowError, ValueError):
        _refuse(f"the number {str(value)[:40]} does not fit into {dtype}")


def _npy(data: bytes) -> NDArray[Any]:
    """The array in a file as NumPy writes it. NumPy's own reader parses the header as Python; this one matches it."""
    version, start = data[6:8], {b"\1\0": 10, b"\2\0": 12}.get(data[6:8])
    if data[:6] != b"\x93NUMPY" or start is None:
        _refuse(f"an array file that does not begin as one, or of version {version!r}")
    end = start + int.from_bytes(data[8:start], "little")
    header = _HEADER.fullmatch(data[start:end]) if end <= min(len(data), MAX_HEADER_BYTES) else None
    if header is None:
        _refuse("an array file whose header is not that of an array of numbers")
    name, order, sizes = header.groups()
    shape = [int(size) for size in sizes.replace(b" ", b"").split(b",") if size]
    if order == b"True":
        return _array(data[end:], _dtype(name), shape[::-1]).transpose()
    return _array(data[end:], _dtype(name), shape)


def _refuse(found: str) -> NoReturn:
    raise UserError("CX641", f"the message is {found}" if found.startswith("not ") else f"the message has {found}")


# -- writing ----------------------------------------------------------------------------------------------------------


def _openpi_array(value: object) -> Any:
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": _dtype(value.dtype.str).str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": _dtype(value.dtype.str).str}
    raise TypeError(f"{type(value).__name__} is not written")


def _groot_array(value: object) -> Any:
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        npy.write_array(file, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}
    raise TypeError(f"{type(value).__name__} is not written")
