"""Reads the header of a safetensors file and proves it describes the file, without touching a weight.

The format: eight bytes of little-endian header length, that many bytes of JSON (name → dtype, shape, two offsets), then
the data. Valid here means what the reference implementation means, and stricter in one place: a name given twice in
the JSON is an error, not the last one wins. After a header is accepted, every byte of the data belongs to exactly one
tensor, and every tensor is inside the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cosmos_export import files, kinds
from cosmos_export.checkpoint import dtypes
from cosmos_export.checkpoint.strict_json import DuplicateKeyError, parse_object, require_file
from cosmos_export.diagnostics import UserError, shown

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 8 * files.MIB
"""The reference implementation allows 100 MB. The header of Super's transformer in FP8, all in one file, has 0.6 MB."""
MAX_TENSORS = 50_000
"""Super's transformer in FP8 has 3,222 with its scales."""
_MAX_SIZE = 2**63 - 1
_MAX_RANK = 32
_DOWNLOAD_AGAIN = "the file is damaged: download it again and compare its checksum"


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor in its file. ``offset`` is absolute in ``file``; nothing is read until ``array`` is
    called."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        return element_count(self.shape)

    def array(self) -> NDArray[Any]:
        """The tensor in memory, read-only, in the type it has on disk. CX119 where the file ends before it does."""
        array = self.raw().view(self.numpy_dtype()).reshape(self.shape)
        array.flags.writeable = False
        return array

    def mapped(self) -> NDArray[Any]:
        """The same as a read-only view of the file: for files of this program alone, which nobody else truncates."""
        dtype = self.numpy_dtype()
        if self.size_bytes == 0:
            return np.empty(self.shape, dtype)
        return np.memmap(self.file, dtype, "r", self.offset, self.shape or (1,)).reshape(self.shape)

    def raw(self) -> NDArray[np.uint8]:
        """The same bytes, untyped."""
        return read_exactly(self.file, self.offset, self.size_bytes)

    def numpy_dtype(self) -> np.dtype[Any]:
        """Its type as numpy has it; CX115 for a packed one."""
        dtype = dtypes.numpy_dtype(self.dtype)
        if dtype is None:
            raise UserError(
                "CX115",
                f"{self.name} in {self.file} has the packed type {self.dtype}, which has no array form",
                "read its bytes with TensorEntry.raw()",
            )
        return dtype


def read_exactly(file: Path, offset: int, size_bytes: int) -> NDArray[np.uint8]:
    """Bytes of ``file``, read and not mapped: a mapped file that is truncated ends the process with a signal.

    CX119 where the file ends before all of them.
    """
    data = np.empty(size_bytes, np.uint8)
    rest = data.data
    with files.opened(file) as opened:
        while rest:
            count = os.preadv(opened.fileno(), [rest], offset + size_bytes - len(rest))
            if not count:
                raise UserError(
                    "CX119",
                    f"{file} was truncated while it was read: {offset + size_bytes:,} bytes were there, now "
                    f"{opened.seek(0, os.SEEK_END):,}",
                    "wait until nothing writes to it any more, then run the command again",
                )
            rest = rest[count:]
    return data


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    file: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size_bytes: int
    """Size of the whole file."""


def element_count(shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def read_header(path: Path) -> Header:
    """The checked header of ``path``: CX110 … CX115 when the file is not what it says."""
    require_file(path)
    try:
        with files.opened(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(LENGTH_BYTES)
            if not _may_be_safetensors(prefix + file.read(1)):
                _named(path)
            file.seek(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < LENGTH_BYTES:
                _corrupt(path, f"{size} bytes is too short to hold a safetensors header")
            if length > MAX_HEADER_BYTES:
                _corrupt(path, f"the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
            if length > size - LENGTH_BYTES:
                raise UserError(
                    "CX111",
                    f"{path} is truncated: its header needs {length + LENGTH_BYTES:,} bytes, the file has {size:,}",
                    "the download did not finish: run it again",
                )
            text = file.read(length)
    except OSError as error:
        raise UserError("CX110", f"cannot read {path}: {error.strerror or error}", "check the permissions") from error
    return _parse(path, text, size)


def _may_be_safetensors(first: bytes) -> bool:
    """The length of a header that is not too long, and the bracket that it begins with."""
    return first[LENGTH_BYTES:] == b"{" and int.from_bytes(first[:LENGTH_BYTES], "little") <= MAX_HEADER_BYTES


def _named(path: Path) -> None:
    """CX112 where ``path`` is something else that is known."""
    kind = kinds.of_file(path)
    if kind is not None and kind.what != kinds.SAFETENSORS:
        raise UserError("CX112", f"{path} is not a safetensors file: it is {kind.what}", kind.hint)


def parse_tensors(path: Path, data: bytes) -> dict[str, NDArray[Any]]:
    """Every tensor of ``data``, the whole of a safetensors file called ``path``, as `read_header` and then `array`."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if not LENGTH_BYTES <= length + LENGTH_BYTES <= len(data) or length > MAX_HEADER_BYTES:
        _corrupt(path, f"a header of {length:,} bytes in a file of {len(data):,}")
    header = _parse(path, data[LENGTH_BYTES : LENGTH_BYTES + length], len(data))
    return {
        name: np.frombuffer(data, np.uint8, entry.size_bytes, entry.offset)
        .view(entry.numpy_dtype())
        .reshape(entry.shape)
        for name, entry in header.tensors.items()
    }


def _parse(path: Path, text: bytes, size: int) -> Header:
    if not text.startswith(b"{"):
        _corrupt(path, "the header does not start with a JSON object")
    try:
        raw = parse_object(text)
    except DuplicateKeyError as error:
        raise UserError(
            "CX114",
            f"{path} names {shown(error.key)} twice in its header; two readers would load different weights",
            "rewrite the file with a current safetensors",
        ) from error
    except ValueError as error:
        _corrupt(path, f"the header is not JSON ({error})")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _corrupt(path, "__metadata__ is not a map of strings")
    data_start = LENGTH_BYTES + len(text)
    if len(raw) > MAX_TENSORS:
        _corrupt(path, f"it has {len(raw):,} tensors; allowed: {MAX_TENSORS:,}")
    entries = [_entry(path, name, value, data_start) for name, value in raw.items()]
    _check_coverage(path, entries, data_start, size)
    return Header(path, MappingProxyType({entry.name: entry for entry in entries}), metadata, size)


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    if not name or len(name) > 1024 or not name.isprintable():
        _corrupt(path, f"{shown(name)} is not a tensor name")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _corrupt(path, f"the entry of {name!r} is not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        raise UserError(
            "CX115",
            f"{path}: {name!r} has the unknown type {shown(dtype)}",
            f"known types: {', '.join(dtypes.BITS)}",
        )
    if not _is_size_list(shape) or len(shape) > _MAX_RANK:
        _corrupt(path, f"the shape of {name!r} is not a list of sizes")
    if not _is_size_list(offsets) or len(offsets) != 2:
        _corrupt(path, f"data_offsets of {name!r} is not a pair of offsets")
    begin, end = offsets
    bits = element_count(tuple(shape)) * dtypes.BITS[dtype]
    if bits > _MAX_SIZE:
        _offsets(path, f"the size of {name!r} overflows: {dtype} {shape}")
    if bits % 8 or end - begin != bits // 8:
        _offsets(path, f"{name!r} is {dtype} {shape} = {bits / 8:,g} bytes, but its offsets span {end - begin:,}")
    return TensorEntry(name, path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_coverage(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Tensors in file order follow one another without gap or overlap up to the end of the file."""
    expected, previous = data_start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size_bytes)):
        if entry.offset < expected:
            _offsets(path, f"{entry.name!r} overlaps {previous!r} by {expected - entry.offset:,} bytes")
        if entry.offset > expected:
            _offsets(path, f"{entry.offset - expected:,} bytes before {entry.name!r} belong to no tensor")
        expected, previous = entry.offset + entry.size_bytes, entry.name
    if expected > size:
        raise UserError(
            "CX111",
            f"{path} is truncated: its tensors need {expected:,} bytes, the file has {size:,}",
            "the download did not finish: run it again",
        )
    if expected < size:
        _offsets(path, f"{size - expected:,} bytes after the last tensor belong to no tensor")


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)


def _corrupt(path: Path, what: str) -> NoReturn:
    raise UserError("CX112", f"{path} is not a readable safetensors file: {what}", _DOWNLOAD_AGAIN)


def _offsets(path: Path, what: str) -> NoReturn:
    raise UserError("CX113", f"{path} has a header that contradicts the file: {what}", _DOWNLOAD_AGAIN)
