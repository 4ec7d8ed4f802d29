"""JSON as input from a stranger: of limited size, without duplicate keys or NaN; every failure is a ``UserError``."""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from cosmos_export import files, kinds
from cosmos_export.diagnostics import UserError, shown

MAX_JSON_BYTES = 16 * files.MIB
"""Largest JSON document that is read. The largest published configuration or index has less than 1 MB."""
MAX_JSON_VALUES = 1_000_000
"""Most values in one, counted before it is parsed: an empty list takes 2 bytes in a file and 64 in memory. The header
of the largest published shard has some 20,000."""


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class DuplicateKeyError(ValueError):
    """A JSON object names the same key twice, so readers would disagree about its value."""

    def __init__(self, key: str) -> None:
        super().__init__(f"duplicate key {shown(key)}")
        self.key = key


def parse_object(text: bytes) -> dict[str, Any]:
    """``text`` as a JSON object. Raises ``ValueError`` (``DuplicateKeyError`` for a repeated key)."""
    value = parse_document(text)
    if not isinstance(value, dict):
        raise ValueError(f"the top level is {type(value).__name__}, not an object")
    return value


def parse_document(text: bytes, *, finite: bool = True) -> Any:
    """``text`` as JSON of any kind, as `parse_object`. ``finite=False``: NaN and infinities are for the reader to
    refuse, who knows what they mean."""
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text):,} bytes; allowed: {MAX_JSON_BYTES:,}")
    # Separators and brackets, those inside of strings too: never fewer than there are values.
    count = text.count(b",") + text.count(b"[") + text.count(b"{")
    if count > MAX_JSON_VALUES:
        raise ValueError(f"up to {count:,} values; allowed: {MAX_JSON_VALUES:,}")
    number = _finite if finite else None
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_float=number, parse_constant=number)
        if _SURROGATE.search(text):
            _require_characters(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _require_characters(value: Any) -> None:
    """ValueError where a text in ``value`` has half of a character: other readers of JSON refuse it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character: {shown(error.object[error.start : error.end])}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, or CX101."""
    require_file(path)
    try:
        return parse_object(files.read_bytes(path, MAX_JSON_BYTES))
    except files.FileRefusedError as error:
        what = f"{path} cannot be a JSON document of this kind: {files.reason(error)}"
        raise UserError("CX101", what, "download the file again") from error
    except OSError as error:
        raise UserError("CX101", f"cannot read {path}: {error.strerror or error}", "check the permissions") from error
    except ValueError as error:
        if (kind := kinds.of_file(path)) is not None:
            raise UserError("CX101", f"{path} is not JSON as it is read here: it is {kind.what}", kind.hint) from error
        raise UserError("CX101", f"{path} is not valid JSON: {error}", "download the file again") from error


def optional_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; None where there is no such file (a dangling link is an error)."""
    return read_object(path) if path.exists() or path.is_symlink() else None


def require_file(path: Path) -> None:
    """``path`` exists and is a regular file (through symbolic links), or CX102."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        dangling = path.is_symlink()
        raise UserError(
            "CX102",
            f"{path} is a symbolic link to a file that is not there" if dangling else f"{path} is missing",
            "the download is incomplete: run it again, or copy the directory with its links resolved (cp -rL)"
            if dangling
            else "the download is incomplete: run it again",
        ) from error
    if not stat.S_ISREG(mode):
        raise UserError("CX102", f"{path} is not a regular file", "expected a file of the checkpoint")


def require_itself(path: Path) -> None:
    """CX134 where ``path`` is a file, but not the one that it is called: a pointer, or an answer of a server."""
    if (kind := kinds.placeholder(path)) is not None:
        raise UserError("CX134", f"{path} is {kind.what}", kind.hint)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DuplicateKeyError(key)
        result[key] = value
    return result


def _finite(text: str) -> float:
    """A number of the file: neither NaN nor Infinity, nor one too large to be told from it."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is not a finite number")
    return number
