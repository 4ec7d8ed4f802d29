"""Arguments from outside as fields of a record of options: checked by the field's type, with an error that a caller
can act on. Numbers in the text of one are read by `whole`.

Paths may be given as text, one value in place of a list of one, and None is always the field's default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    SupportsFloat,
    SupportsIndex,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cosmos_export.diagnostics import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
_NO_VALUE = object()
MOST = 2**63 - 1
"""The largest whole number that is taken: arrays, files and floats have room for it."""
_WORDS: Mapping[object, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "True or False", Path: "a path", type(None): "None",
}  # fmt: skip


def whole(text: str) -> int | None:
    """The number from 0 to `MOST` that ``text`` has in decimal digits; None for anything else."""
    digits = text.strip()
    # `int` refuses thousands of digits with an error of its own, and reads digits of all scripts.
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > len(str(MOST)):
        return None
    found = int(digits)
    return found if found <= MOST else None


def made(options: type[Options], where: str, given: Mapping[str, object]) -> Options:
    """The record ``options`` of ``given``, by name of its fields; ``where`` is the function that was called.

    UserError CX005 for a value that is not of its field's type, and for a field without default that is None.
    """
    hints = get_type_hints(options)
    values = {name: taken(where, name, value, hints[name]) for name, value in given.items() if value is not None}
    for field in dataclasses.fields(options):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise UserError("CX005", f"`{where}` needs `{field.name}`", f"it takes {words(hints[field.name])}")
    return options(**values)


def taken(where: str, name: str, value: object, kind: Any) -> Any:
    """``value`` as an instance of the type ``kind``; UserError CX005 where it is none."""
    found = _converted(value, kind)
    if found is _NO_VALUE:
        text = repr(value)
        shown = f"{text[:80]}…" if len(text) > 80 else text
        message = f"`{name}` of `{where}` is {shown} ({type(value).__name__})"
        raise UserError("CX005", message, f"`{name}` takes {words(kind)}")
    return found


def callbacks(where: str, **given: object) -> None:
    """UserError CX005 where ``progress`` is no `Progress`, or another value is no function."""
    for name, value in given.items():
        methods = ("begin", "update", "end") if name == "progress" else ("__call__",)
        if value is not None and not all(callable(getattr(value, method, None)) for method in methods):
            wanted = "a `cosmos_export.progress.Progress`" if name == "progress" else "a function"
            raise UserError("CX005", f"`{name}` of `{where}` is of type {type(value).__name__}", f"it takes {wanted}")


def words(kind: Any) -> str:
    """Description of values of the type ``kind``, for a reader."""
    if _is_union(kind):
        parts = [words(one) for one in get_args(kind) if one is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(repr(value) for value in get_args(kind))}"
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if items[-1] is Ellipsis:
            return f"a list, each of it {words(items[0])}"
        return f"{len(items)} values: {', '.join(words(item) for item in items)}"
    return _WORDS.get(kind) or "a value in memory"


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _converted(value: object, kind: Any) -> Any:
    if _is_union(kind):
        found = (_converted(value, one) for one in get_args(kind))
        return next((one for one in found if one is not _NO_VALUE), _NO_VALUE)
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else _NO_VALUE
    if get_origin(kind) is tuple:
        return _list(value, get_args(kind))
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else _NO_VALUE
    if kind is Path:
        return _path(value)
    if value is None:
        return None if kind is type(None) else _NO_VALUE
    if kind in (int, float):
        return _number(value, kind)
    return value if isinstance(value, get_origin(kind) or kind) else _NO_VALUE


def _path(value: object) -> Any:
    """A path that can name a file. Not of bytes: names of files are text everywhere here."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        return _NO_VALUE
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return _NO_VALUE
    return Path(text)


def _number(value: object, kind: type) -> Any:
    """``value`` as the number type ``kind``, NumPy's numbers included; every whole number is a number."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if kind is int and isinstance(value, SupportsIndex):
            found = operator.index(value)
            return found if abs(found) <= MOST else _NO_VALUE
        if kind is float and isinstance(value, SupportsFloat | SupportsIndex):
            return float(value)
    return _NO_VALUE


def _list(value: object, items: tuple[Any, ...]) -> Any:
    if items[-1] is Ellipsis:
        several = value if isinstance(value, Iterable) and not isinstance(value, str | os.PathLike) else [value]
        found = tuple(_converted(one, items[0]) for one in several)
    else:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            return _NO_VALUE
        found = tuple(_converted(one, item) for one, item in zip(value, items, strict=True))
    return _NO_VALUE if any(one is _NO_VALUE for one in found) else found
