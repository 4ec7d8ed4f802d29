"""Declared inputs and outputs of an ONNX model, read without a library: verification needs none.

A model is a protocol buffer. Read are its one graph, the graph's inputs and outputs, and of those the name, the type
and the sizes; everything else is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

from cosmos_export.bundle import Tensor

_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
    16: "bfloat16", 17: "float8_e4m3fn",
}  # fmt: skip
"""``TensorProto.DataType``, by the names that graphs have."""
_GRAPH, _INPUT, _OUTPUT = 7, 11, 12
"""Fields of ``ModelProto`` and ``GraphProto``."""
_Value = int | memoryview


def declared(data: bytes) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs of the model ``data``, in order. ValueError: it is no model."""
    graph = _only(memoryview(data), _GRAPH)
    if not isinstance(graph, memoryview):
        raise ValueError("it has no graph")
    found: dict[int, list[Tensor]] = {_INPUT: [], _OUTPUT: []}
    for number, value in _fields(graph):
        if number in found:
            found[number].append(_tensor(_message(value)))
    return tuple(found[_INPUT]), tuple(found[_OUTPUT])


def _tensor(value_info: memoryview) -> Tensor:
    name, kind = _only(value_info, 1), _message(_only(value_info, 2))
    tensor = _message(_only(kind, 1))
    dtype, shape = _only(tensor, 1), _only(tensor, 2)
    dims = [] if shape is None else [_dim(_message(dim)) for number, dim in _fields(_message(shape)) if number == 1]
    text = str(_message(name), "utf-8")
    return Tensor(text, _DTYPES.get(dtype, f"type {dtype}") if isinstance(dtype, int) else "no type", tuple(dims))


def _dim(dim: memoryview) -> int | str:
    size, expression = _only(dim, 1), _only(dim, 2)
    if (size is None) == (expression is None):
        raise ValueError("a size is neither a number nor a name")
    return size if isinstance(size, int) else str(_message(expression), "utf-8")


def _message(value: _Value | None) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a field is missing, or is a number")
    return value


def _only(message: memoryview, wanted: int) -> _Value | None:
    """The field ``wanted``; None where there is none. Readers of a field that is there twice disagree about it."""
    values = [value for number, value in _fields(message) if number == wanted]
    if len(values) > 1:
        raise ValueError(f"field {wanted} is there {len(values)} times")
    return values[0] if values else None


def _fields(message: memoryview) -> Iterator[tuple[int, _Value]]:
    """Number and value of the fields: a number, or the bytes of a text or a message; others are skipped."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, size = key & 7, 0
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(message):
            raise ValueError("it ends in the middle of a field")
        if kind == 2:
            yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends in the middle of a number")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
