"""Strict JSON for dataclasses: what is not in the schema is refused, and the schema is the dataclass itself.

`decode` is for documents written by strangers. It accepts exactly one form: every field present, no other field, no
duplicate key, no coercion between types, no number that is not finite. Every failure is a `StrictError` that names the
place, and nothing else is ever raised. A field of type ``Any`` takes anything.
`encode` writes the one canonical form; `json_schema` describes it; `seal` puts a digest of the rest into a document.
Knows nothing of bundles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from cosmos_export.diagnostics import shown

MAX_INTEGER = 2**63 - 1
"""Sizes and counts fit a signed 64-bit integer in every reader."""

T = TypeVar("T")


class StrictError(ValueError):
    """The document is not of the schema. ``where`` is the path to the offending value, as in ``files[3].sha256``."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}" if where else reason)
        self.where = where
        self.reason = reason


@dataclass(frozen=True)
class Pattern:
    """Annotation of a string: it fully matches ``regex``."""

    regex: str
    meaning: str

    def check(self, value: object, where: str) -> None:
        if not re.fullmatch(self.regex, str(value)):
            raise StrictError(where, f"{shown(value)} is not {self.meaning}")

    def schema(self) -> dict[str, Any]:
        return {"pattern": f"^(?:{self.regex})$", "description": self.meaning}


@dataclass(frozen=True)
class AtLeast:
    """Annotation of a number: not below ``minimum``."""

    minimum: int

    def check(self, value: object, where: str) -> None:
        if isinstance(value, int | float) and value < self.minimum:
            raise StrictError(where, f"{shown(value)} is less than {self.minimum}")

    def schema(self) -> dict[str, Any]:
        return {"minimum": self.minimum}


@dataclass(frozen=True)
class AtMost:
    """Annotation of a number: not above ``maximum``."""

    maximum: int

    def check(self, value: object, where: str) -> None:
        if isinstance(value, int | float) and value > self.maximum:
            raise StrictError(where, f"{shown(value)} is more than {self.maximum:,}")

    def schema(self) -> dict[str, Any]:
        return {"maximum": self.maximum}


def parse_object(data: bytes) -> dict[str, Any]:
    """``data`` as one JSON object without duplicate keys, NaN or infinity."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except StrictError:
        raise
    except RecursionError:
        raise StrictError("", "nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise StrictError("", f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise StrictError("", f"the top level is {_kind(value)}, not an object")
    return value


def decode(cls: type[T], value: object, where: str = "") -> T:
    """``value`` (parsed JSON) as an instance of the dataclass ``cls``."""
    return typing.cast(T, _decode(cls, value, where))


def encode(value: object) -> Any:
    """``value`` as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def canonical(value: object) -> bytes:
    """The one byte form of ``value``: UTF-8, sorted keys, two-space indent, one newline at the end."""
    text = json.dumps(encode(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


DIGEST = "digest"
"""The field of a sealed document that holds the SHA-256 of the canonical form of all its other fields."""


def seal(document: Mapping[str, Any]) -> bytes:
    """``document`` in its canonical form with its digest, which replaces one that it has."""
    rest = {name: value for name, value in document.items() if name != DIGEST}
    return canonical({**rest, DIGEST: hashlib.sha256(canonical(rest)).hexdigest()})


def check_seal(document: Mapping[str, Any], data: bytes) -> None:
    """``data``, which was parsed to ``document``, is its canonical form byte for byte, with the digest of the rest."""
    rest = {name: value for name, value in document.items() if name != DIGEST}
    try:
        plain, found = canonical(document), hashlib.sha256(canonical(rest)).hexdigest()
    except (ValueError, RecursionError) as error:  # a lone surrogate; nested too deeply
        raise StrictError("", f"cannot be written: {type(error).__name__}") from None
    if plain != data:
        raise StrictError("", f"not in canonical form: byte {_first_difference(plain, data):,} differs")
    if document.get(DIGEST) != found:
        raise StrictError(DIGEST, f"{shown(document.get(DIGEST))} is not the SHA-256 of the rest, {found}")


def _first_difference(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def json_schema(cls: type, title: str) -> dict[str, Any]:
    """A JSON Schema (2020-12) document for the dataclass ``cls``."""
    definitions: dict[str, Any] = {}
    root = _schema(cls, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **root,
        "$defs": {name: definitions[name] for name in sorted(definitions)},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def _decode(hint: Any, value: object, where: str) -> object:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _decode_fields(typing.cast(type, hint), value, where)
    if origin is Annotated:
        inner, *checks = get_args(hint)
        result = _decode(inner, value, where)
        for check in checks:
            check.check(result, where)
        return result
    if origin is Literal:
        # `True == 1`, so the type is compared as well.
        if not any(type(value) is type(choice) and value == choice for choice in get_args(hint)):
            raise _refusal(hint, value, where)
        return value
    if origin is types.UnionType or origin is typing.Union:
        return _decode_union(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _refusal(hint, value, where)
        return tuple(_decode(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _refusal(hint, value, where)
        key_hint, item_hint = get_args(hint)
        return {
            _decode(key_hint, key, where): _decode(item_hint, item, _join(where, key)) for key, item in value.items()
        }
    return _decode_scalar(hint, value, where)


def _decode_fields(cls: type, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise _refusal(cls, value, where)
    hints = get_type_hints(cls, include_extras=True)
    unknown = [key for key in value if key not in hints]
    if unknown:
        raise StrictError(where, f"unknown field {shown(unknown[0])}")
    missing = [name for name in hints if name not in value]
    if missing:
        raise StrictError(where, f"field `{missing[0]}` is missing")
    return cls(**{name: _decode(hint, value[name], _join(where, name)) for name, hint in hints.items()})


def _decode_union(hint: Any, value: object, where: str) -> object:
    """The first alternative of the value's own JSON kind, so that the message speaks about that one."""
    for alternative in get_args(hint):
        if _kind_of_hint(alternative) == _kind(value):
            return _decode(alternative, value, where)
    if isinstance(value, int) and not isinstance(value, bool) and float in get_args(hint):
        return _decode_scalar(float, value, where)
    raise _refusal(hint, value, where)


def _decode_scalar(hint: Any, value: object, where: str) -> object:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        # "1e999" parses to infinity without going through parse_constant.
        if (isinstance(value, int) and abs(value) > MAX_INTEGER) or not math.isfinite(value):
            raise StrictError(where, "out of range")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > MAX_INTEGER:
            raise StrictError(where, "out of range")
        return value
    if hint is str and isinstance(value, str):
        return _text(value, where)
    if (hint is bool and isinstance(value, bool)) or (hint is types.NoneType and value is None):
        return value
    raise _refusal(hint, value, where)


def _text(value: str, where: str) -> str:
    """``value`` where it is text: a lone surrogate is legal JSON and cannot be written anywhere."""
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise StrictError(where, f"{shown(value)} is not valid Unicode")
    return value


def _join(where: str, key: str) -> str:
    name = key if re.fullmatch(r"[\w.\-]{1,80}", key, re.ASCII) else shown(key)
    return f"{where}.{name}" if where else name


def _refusal(hint: Any, value: object, where: str) -> StrictError:
    return StrictError(where, f"{shown(value)} is {_kind(value)}, expected {_name(hint)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictError("", f"duplicate key {shown(key)}")
            seen.add(key)
    return result


def _no_constant(name: str) -> NoReturn:
    raise StrictError("", f"{name} is not a JSON number")


# ---------------------------------------------------------------------------------------------------------------------
# Names of types

_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", types.NoneType: "null"}


def _kind(value: object) -> str:
    """The JSON type of a parsed value."""
    return _KINDS.get(type(value)) or ("an integer" if isinstance(value, int) else "a number")


def _kind_of_hint(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Annotated:
        return _kind_of_hint(get_args(hint)[0])
    if origin is Literal:
        return _kind(get_args(hint)[0])
    if dataclasses.is_dataclass(hint) or origin is Mapping:
        return "an object"
    if origin is tuple:
        return "an array"
    return {int: "an integer", float: "a number"}.get(hint) or _KINDS[hint]


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(shown, get_args(hint)))
    if get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_name(one) for one in get_args(hint)))
    return _kind_of_hint(hint)


# ---------------------------------------------------------------------------------------------------------------------
# JSON Schema

_SCALARS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    types.NoneType: {"type": "null"},
}


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type, hint)
        if cls.__name__ not in definitions:
            definitions[cls.__name__] = {}  # present before its fields, should a class ever name itself
            definitions[cls.__name__] = _object_schema(cls, definitions)
        return {"$ref": f"#/$defs/{cls.__name__}"}
    if origin is Annotated:
        inner, *checks = get_args(hint)
        merged = dict(_schema(inner, definitions))
        for check in checks:
            merged.update(check.schema())
        return merged
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if origin is types.UnionType or origin is typing.Union:
        return {"anyOf": [_schema(one, definitions) for one in get_args(hint)]}
    if origin is tuple:
        return {"type": "array", "items": _schema(get_args(hint)[0], definitions)}
    if origin is Mapping:
        key_hint, item_hint = get_args(hint)
        names = {} if key_hint is str else {"propertyNames": _schema(key_hint, definitions)}
        return {"type": "object", **names, "additionalProperties": _schema(item_hint, definitions)}
    return dict(_SCALARS[hint])


def _object_schema(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {
        "description": " ".join((cls.__doc__ or "").split()),
        "type": "object",
        "properties": {name: _schema(hint, definitions) for name, hint in hints.items()},
        "required": list(hints),
        "additionalProperties": False,
    }
