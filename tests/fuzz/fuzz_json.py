"""Mutations of JSON: values, keys, and the text itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from fuzz_bytes import mutate_bytes
from fuzz_text import mutate_text
from fuzz_values import CANARY, MAX_BYTES, NUMBERS, PATHS, SHAPES, TEXTS, Raw


def mutate_json(random: Random, data: bytes) -> tuple[bytes, str]:
    """A value, a key or the text of a document."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(random, data)
    if random.random() < 0.12:
        return _json_text(random, data)
    document, what = mutate_value(random, document)
    return dump(document, indent=random.choice((None, 2))), what


def mutate_value(random: Random, document: Any) -> tuple[Any, str]:
    """``document`` with one place of it changed."""
    places = list(_places(document))
    path, holder, key = random.choice(places)
    shown = "/".join(map(str, path)) or "the whole document"
    if holder is None:
        return _value(random, document), f"{shown} replaced"
    old = holder[key]
    match random.randrange(10):
        case 0 if isinstance(holder, dict):
            del holder[key]
            return document, f"{shown} deleted"
        case 0 | 1 if isinstance(holder, list):
            if random.random() < 0.5:
                del holder[key]
                return document, f"{shown} deleted"
            times = min(random.choice((1, 2, 50, 20_000)), 1 + MAX_BYTES // len(dump(old)))
            holder[key:key] = [old] * times
            return document, f"{shown} repeated {times} times"
        case 1 if isinstance(holder, dict):
            renamed = random.choice((str(key).upper(), f"{key} ", f"{key}x", "", random.choice(PATHS), CANARY))
            holder[renamed] = holder.pop(key)
            return document, f"{shown} renamed to {renamed!r}"
        case 2:
            _, other, its = random.choice(places)
            if other is not None:
                value = json.loads(dump(other[its]))
                holder[key] = value
                return document, f"{shown} is what another place is"
        case 3 if isinstance(old, int | float) and not isinstance(old, bool):
            factor = random.choice((-1, 0, 2, 0.5, 10, 1000, 10**9, 10**15))
            holder[key] = old * factor if old == old else 0
            return document, f"{shown} times {factor}"
        case 4 if isinstance(old, int | float) and not isinstance(old, bool):
            holder[key] = old + random.choice((-1, 1))
            return document, f"{shown} by one"
        case 5 if isinstance(old, str) and old:
            at = random.randrange(len(old))
            insert = random.choice(("\0", "\x1b", "/", "..", "\ud800", "é", " ", "'", "{", old))
            holder[key] = old[:at] + insert + old[at + random.randrange(2) :]
            return document, f"{shown} with {insert[:12]!r} in it"
        case _:
            pass
    new = _value(random, old)
    holder[key] = new
    text = new.text if isinstance(new, Raw) else repr(new)
    return document, f"{shown} = {text[:60]}"


def _value(random: Random, old: Any) -> Any:
    kinds = {str: (TEXTS, PATHS, TEXTS), bool: (NUMBERS,), int: (NUMBERS, NUMBERS), float: (NUMBERS, NUMBERS)}
    pools = (*kinds.get(type(old), (SHAPES, SHAPES)), SHAPES, NUMBERS, TEXTS, PATHS)
    return random.choice(random.choice(pools))


def _places(value: Any, path: tuple[Any, ...] = (), holder: Any = None, key: Any = None) -> Iterator[Any]:
    yield path, holder, key
    if isinstance(value, dict):
        for name in list(value):
            yield from _places(value[name], (*path, name), value, name)
    elif isinstance(value, list):
        for index in range(min(len(value), 2000)):
            yield from _places(value[index], (*path, index), value, index)


def dump(document: Any, indent: int | None = None) -> bytes:
    """JSON text with every `Raw` as it is. Surrogates are escaped, so that the text is UTF-8."""
    raws: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value.text)
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    text = json.dumps(plain(document), indent=indent)
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text.encode()


def _json_text(random: Random, data: bytes) -> tuple[bytes, str]:
    options: list[tuple[bytes, str]] = [
        (b"\xef\xbb\xbf" + data, "a byte order mark"),
        (data.decode("utf-8", "replace").encode("utf-16"), "UTF-16"),
        (data + b"\0", "a NUL at the end"),
        (data + data, "the document twice"),
        (b"/* x */" + data, "a comment"),
        (data.replace(b"\n", b"\r\n"), "line ends of Windows"),
        (data.rstrip(b"\n"), "no newline at the end"),
        (data.replace(b'"', b"'"), "single quotes"),
        (data.replace(b": ", b": \xff", 1), "not UTF-8"),
        (b"", "empty"),
        (b"null", "null"),
        (b"[]", "an empty list"),
        (b"{}", "an empty object"),
        (b"[" * 200_000, "an endless list"),
    ]
    if random.random() < 0.05:
        options = [(b"[" + b"{}," * 7_000_000 + b"{}]", "7 million empty objects")]
    return random.choice(options)


def mutate_lines(random: Random, data: bytes) -> tuple[bytes, str]:
    """JSON Lines: a line as a document, or the lines."""
    lines = data.splitlines()
    if not lines or random.random() < 0.2:
        return mutate_text(random, data)
    at = random.randrange(len(lines))
    lines[at], what = mutate_json(random, lines[at])
    return b"\n".join(lines) + b"\n", f"line {at + 1}: {what}"
