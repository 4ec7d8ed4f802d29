"""Changes to real files: structure-aware by the kind of the file, and special files in place of any.

A mutation is drawn from a `random.Random` and is a function of it and of the file's bytes alone, so that a case is its
seed. `Tree` is what a mutation changes: a copy of a reader's files, restored after each case.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

CANARY = "__import__('os').system('touch CANARY')"
"""Python that leaves a trace where it is evaluated; the worker's audit hook sees the call."""
OUTSIDE = "outside"
"""Name of folders beside and above a tree that no reader of a bundle may touch."""
MAX_BYTES = 1 << 25
"""Of what is repeated: mutations of mutations would grow without end."""
_PATHS = (
    f"../{OUTSIDE}/secret", f"../../{OUTSIDE}/secret", f"../../../{OUTSIDE}/secret", f"../{OUTSIDE}/secret.json",
    f"../../{OUTSIDE}/secret.json", f"x/../../{OUTSIDE}/secret", "/dev/zero", "/dev/stdin", "CON", "nul.txt", "a\\b",
    "./x", "a//b", "..", ".", "/", "~", "a/" * 300, "x" * 300, "file:///dev/zero", "data/\udcff",
)  # fmt: skip
_TEXTS = (
    "", " ", "\0", "\ud800", "\x1b]0;owned\x07", "\x1b[31mred\x1b[0m", "\u202e", "a\nb", "nan", "1e400", "true", "null",
    "%s%n", "{0.__class__.__init__.__globals__}", "{episode_index:0>3000000000}", "{{1/0}}", "{{ messages + 1 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 3000000000 }}",
    "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", CANARY, f"0*{CANARY}", "lambda: 0", "x" * 70_000, "F64",
    "bfloat16", "cuda:99", "../x", "ſ", "É" * 40, "0", "-1", "9" * 400,
)  # fmt: skip
_NUMBERS: tuple[int | float, ...] = (
    0, 1, -1, 2, 3, 7, -2, 16, 255, 256, 65_535, 65_536, 100_000, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63,
    2**64, -(2**63), 10**9, 10**15, 10**30, 10**400, 0.0, -0.0, 0.1, 0.5, 1.5, -0.5, 1e-320, 1e-30, 1e30, 3.5e38, 1e308,
    -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """JSON text that no value stands for."""

    text: str


_SHAPES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [{}], [None], {"": None}, {"dim": "x"}, {"dim": CANARY}, {"node": "x"},
    {"add": [CANARY, 1]}, {"pow": [9, {"pow": [9, {"pow": [9, 9]}]}]}, {"mul": [10**30, 10**30]}, {"floordiv": [1, 0]},
    [0] * 10_000, [-5], [1e308, 2.5], [True], ["a", 1], {"a": 1, "b": 2}, Raw("[" * 50_000 + "]" * 50_000),
    Raw('{"a":' * 3000 + "0" + "}" * 3000), Raw('{"a":1,"a":2}'), Raw("1e999999"), Raw("-"), Raw("0x10"), Raw("'x'"),
    Raw('"\\ud800"'), Raw('"\t"'), Raw("[1,]"), Raw("NaN"), Raw("1" * 5000),
)  # fmt: skip


# -- the files of a reader --------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """A working copy of ``pristine`` at ``root``. What `write` and the others change, `restore` puts back."""

    pristine: Path
    root: Path
    changed: dict[str, str] = field(default_factory=dict)
    """Path in the tree → what was done to it."""

    def __post_init__(self) -> None:
        self.rebuild()

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.pristine).as_posix() for path in self.pristine.rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        path = self.root / name
        return path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 28 else b""

    def original(self, name: str) -> bytes:
        path = self.pristine / name
        return path.read_bytes() if path.is_file() else b""

    def write(self, name: str, data: bytes, what: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(path)
        path.write_bytes(data)
        self.note(name, what)

    def note(self, name: str, what: str) -> None:
        self.changed[name] = f"{self.changed[name]}; {what}" if name in self.changed else what

    def restore(self) -> None:
        for name in self.changed:
            path, origin = self.root / name, self.pristine / name
            _remove(path)
            if origin.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, path)
        self.changed.clear()

    def rebuild(self) -> None:
        """A new copy: after a reader that writes into its files."""
        _remove(self.root)
        shutil.copytree(self.pristine, self.root)
        self.changed.clear()

    def same(self) -> bool:
        """Whether the mutations have cancelled out."""
        return not any(self.differs(name) for name in self.changed)

    def differs(self, name: str) -> bool:
        """Whether ``name`` is not what it was."""
        return not _same(self.root / name, self.pristine / name)


def _same(path: Path, origin: Path) -> bool:
    if not os.path.lexists(path) or not origin.is_file():
        return os.path.lexists(path) == origin.is_file()
    if path.is_symlink() or not path.is_file() or path.stat().st_nlink != 1:
        return False
    found, wanted = path.stat(), origin.stat()
    return (found.st_size, found.st_mode) == (
        wanted.st_size,
        wanted.st_mode,
    ) and path.read_bytes() == origin.read_bytes()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o755)
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


# -- mutations of one file --------------------------------------------------------------------------------------------

Mutation = Callable[[Random, bytes], tuple[bytes, str]]
"""New bytes of a file, and what was done in words."""


def change(random: Random, tree: Tree, names: Sequence[str], *, special: bool = True) -> None:
    """One mutation of one of the files ``names`` of ``tree``."""
    name = random.choice(names)
    draw = random.random()
    if special and draw < 0.06:
        _place_special(random, tree, name)
    elif draw < 0.10:
        _shuffle_files(random, tree, name, names)
    else:
        data = tree.read(name)
        mutate = random.choice((by_kind(name), by_kind(name), by_kind(name), mutate_bytes))
        changed, what = mutate(random, data)
        tree.write(name, changed, what)


def by_kind(name: str) -> Mutation:
    """The structure-aware mutation of a file of this name."""
    suffix = name.rpartition(".")[2].lower()
    return _KINDS.get(suffix, mutate_bytes)


def mutate_bytes(random: Random, data: bytes) -> tuple[bytes, str]:
    """Bits, bytes and pieces."""
    if not data:
        return random.randbytes(random.randrange(1, 64)), "random bytes in an empty file"
    at = random.randrange(len(data))
    length = min(random.choice((1, 2, 4, 8, 64, 512, 4096)), len(data) - at)
    piece = data[at : at + length]
    match random.randrange(11):
        case 0 | 1 | 2:
            return flip(data, at, random.randrange(8)), f"bit flipped at byte {at}"
        case 3:
            return data[:at], f"truncated at {at}"
        case 4:
            return data[:at] + data[at + length :], f"{length} bytes removed at {at}"
        case 5:
            return data[: at + length] + piece + data[at + length :], f"{length} bytes doubled at {at}"
        case 6:
            return data[:at] + random.randbytes(length) + data[at + length :], f"{length} random bytes at {at}"
        case 7:
            return data[:at] + bytes(length) + data[at + length :], f"{length} zeros at {at}"
        case 8:
            return data + random.randbytes(random.choice((1, 7, 8, 4096))), "bytes added at the end"
        case 9:
            value = random.choice((0, 0xFF, 0x7F, 0x80, ord("["), ord('"'), ord("}")))
            return data[:at] + bytes([value]) + data[at + 1 :], f"byte {at} is {value:#x}"
        case _:
            other = random.randrange(len(data))
            moved = data[other : other + length]
            return data[:at] + moved + data[at + len(moved) :], f"{length} bytes of {other} copied to {at}"


def flip(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


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
            renamed = random.choice((str(key).upper(), f"{key} ", f"{key}x", "", random.choice(_PATHS), CANARY))
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
    kinds = {str: (_TEXTS, _PATHS, _TEXTS), bool: (_NUMBERS,), int: (_NUMBERS, _NUMBERS), float: (_NUMBERS, _NUMBERS)}
    pools = (*kinds.get(type(old), (_SHAPES, _SHAPES)), _SHAPES, _NUMBERS, _TEXTS, _PATHS)
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


_TOKENS = (
    *(json.dumps(text, ensure_ascii=True) for text in (*_TEXTS[:24], *_PATHS[:12])),
    "0", "-1", "1e400", "nan", "inf", "true", "[]", "{}", "[[]]", "1979-05-27", "9" * 40, "'''x'''", '"unclosed',
    "[1, 'a']", "{a = 1}", "[" * 3000,
)  # fmt: skip


def mutate_toml(random: Random, data: bytes) -> tuple[bytes, str]:
    """A value or a line of a TOML file."""
    lines = data.decode("utf-8", "replace").splitlines()
    places = [n for n, line in enumerate(lines) if "=" in line]
    if not places or random.random() < 0.3:
        return mutate_text(random, data)
    at = random.choice(places)
    key, _, value = lines[at].partition("=")
    match random.randrange(4):
        case 0:
            lines[at] = f"{random.choice((key.upper(), 'x', '', 'a.b', key + key, '[[x]]'))} = {value}"
        case 1:
            lines.insert(at, lines[random.choice(places)])
        case _:
            lines[at] = f"{key}= {random.choice(_TOKENS)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n", f"line {at + 1}: {lines[at][:60]}"


def mutate_text(random: Random, data: bytes) -> tuple[bytes, str]:
    """Lines of a text."""
    lines = data.splitlines()
    if len(lines) < 2 or random.random() < 0.4:
        text = random.choice((*_TEXTS, *_PATHS)).encode("utf-8", "surrogatepass")
        at = random.randrange(len(data) + 1)
        options = [(text, "replaced"), (data[:at] + text + data[at:], "inserted")]
        if len(data) * 3000 <= MAX_BYTES:
            options.append((data * 3000, "3000 times"))
        changed, what = random.choice(options)
        return changed, f"text {what}: {text[:40]!r}"
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(3):
        case 0:
            del lines[one]
            return b"\n".join(lines) + b"\n", f"line {one + 1} removed"
        case 1:
            lines[one], lines[other] = lines[other], lines[one]
            return b"\n".join(lines) + b"\n", f"lines {one + 1} and {other + 1} exchanged"
        case _:
            lines.insert(one, lines[other])
            return b"\n".join(lines) + b"\n", f"line {other + 1} twice"


def mutate_template(random: Random, data: bytes) -> tuple[bytes, str]:
    """A chat template, which is a program."""
    text = random.choice(_TEMPLATES).encode()
    at = random.randrange(len(data) + 1)
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    return (
        (text, f"is {text[:50]!r}") if random.random() < 0.5 else (data[:at] + text + data[at:], f"with {text[:50]!r}")
    )


_TEMPLATES = (
    *(text for text in _TEXTS if "{" in text),
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ messages }}",
    "{% set x = 'a' %}{% for i in range(40) %}{% set x = x + x %}{% endfor %}{{ x }}",
    "{{ 'a' * 10**30 }}",
    "{{",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ raise_exception('x') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[0]['content'] | upper }}",
    "{% import 'x' as y %}",
    "{{ range(10**10) | list }}",
    "{{ cycler.__init__ }}",
    "{% for i in range(10**7) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ (1, 2)[5] }}",
    "{{ 9**9**9 }}",
    "{{ messages | tojson }}",
    "{{ 'x'.format(**{}) }}",
    "{{ '%s' % (messages,) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ lipsum(n=10000) }}",
    "{{ 'a' | center(3000000000) }}",
    "{{ messages[0].content | indent(100000000) }}",
    "\ud7ff",
    "",
    " ",
)


def mutate_safetensors(random: Random, data: bytes) -> tuple[bytes, str]:
    """The header of a safetensors file, its length, or where its data ends."""
    if len(data) < 8:
        return mutate_bytes(random, data)
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]
    match random.randrange(9):
        case 0:
            value = random.choice(
                (0, 1, 7, length - 1, length + 1, len(data), len(data) - 8, 10**8, 2**31, 2**63, 2**64 - 1)
            )
            return struct.pack("<Q", value % 2**64) + data[8:], f"header length {value}"
        case 1:
            cut = random.randrange(len(rest) + 1)
            return data[: 8 + length] + rest[:cut], f"{cut} bytes of data"
        case 2:
            return data + random.randbytes(random.choice((1, 4, 4096))), "more data than tensors"
        case 3:
            if random.random() < 0.05:
                header = b'{"__metadata__":' + b"[" + b"[]," * 20_000_000 + b"[]]}"
                return struct.pack("<Q", len(header)) + header, "a header of 60 MB of empty lists"
            padding = random.choice((b" ", b" " * 100, b"\n", b"\0", b"{}"))
            header += padding
            return struct.pack("<Q", len(header)) + header + rest, f"header followed by {padding[:4]!r}"
        case 4:
            return _reversed_offsets(random, header, rest)
        case _:
            changed, what = mutate_json(random, header)
            return struct.pack("<Q", len(changed)) + changed + rest, f"header: {what}"


def _reversed_offsets(random: Random, header: bytes, rest: bytes) -> tuple[bytes, str]:
    """Two tensors over the same bytes, a hole, or one beyond the end."""
    try:
        document = json.loads(header)
        names = [name for name, entry in document.items() if name != "__metadata__"]
        name = random.choice(names)
        first, last = document[name]["data_offsets"]
        found = random.choice(
            ([last, first], [first, last + 1], [first + 1, last + 1], [0, last], [first, first], [-1, last],
             [first, 2**63], [first, float(last)], [True, last], [first, last, last], [str(first), str(last)])
        )  # fmt: skip
        document[name]["data_offsets"] = found
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return mutate_bytes(random, header + rest)
    text = dump(document)
    return struct.pack("<Q", len(text)) + text + rest, f"{name} at {found}"


def mutate_png(random: Random, data: bytes) -> tuple[bytes, str]:
    """A chunk of a PNG, with a checksum that is right."""
    chunks = _png_chunks(data)
    if not chunks or random.random() < 0.3:
        return mutate_bytes(random, data)
    at = random.randrange(len(chunks))
    kind, content = chunks[at]
    match random.randrange(6):
        case 0:
            width, height = random.choice(
                ((0, 1), (1, 60_000), (60_000, 1), (2**31 - 1, 2**31 - 1), (8192, 8191), (16_000, 16_000))
            )
            depth, colour = random.choice(((8, 2), (16, 6), (1, 0), (8, 3), (16, 2), (3, 2)))
            bits = width * depth * {0: 1, 2: 3, 3: 1, 6: 4}[colour]
            lines = min(height, 1 << 25, (1 << 27) // max(1 + bits // 8, 1) + 1)
            head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
            packed = zlib.compressobj(9)
            row = bytes(1 + (bits + 7) // 8) if bits < 1 << 26 else b"\0"
            pixels = b"".join(packed.compress(row) for _ in range(lines)) + packed.flush()
            chunks = [(b"IHDR", head), (b"IDAT", pixels), (b"IEND", b"")]
            what = f"{width} × {height}, {depth} bits of colour type {colour}, {len(pixels)} bytes"
        case 1:
            del chunks[at]
            what = f"without {kind!r}"
        case 2:
            chunks.insert(at, chunks[random.randrange(len(chunks))])
            what = "a chunk twice"
        case 3:
            chunks.insert(1, random.choice(_CHUNKS))
            what = f"{chunks[1][0]!r} added"
        case _:
            changed, what = mutate_bytes(random, content)
            chunks[at] = (kind, changed)
            what = f"{kind!r}: {what}"
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks), what


_PICTURES = ((0, 1), (1, 60_000), (60_000, 1), (2**31 - 1, 2**31 - 1), (8192, 8191), (16_000, 16_000))
_CHUNKS = (
    (b"eXIf", b"MM\0*" + b"\xff" * 40),
    (b"tRNS", b"\0" * 6),
    (b"gAMA", b"\0\0\0\0"),
    (b"acTL", struct.pack(">II", 99, 0)),
    (b"iCCP", b"x\0\0" + zlib.compress(b"x" * 9**6)),
)


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def mutate_boxes(random: Random, data: bytes) -> tuple[bytes, str]:
    """Of a clip: bits, the boxes of an MP4, or a number in their headers."""
    if not data:
        return mutate_bytes(random, data)
    if random.random() < 0.5 or data[4:8] != b"ftyp":
        count = random.choice((1, 5, 20))
        for _ in range(count):
            data = flip(data, random.randrange(len(data)), random.randrange(8))
        return data, f"{count} bits flipped"
    boxes = [at for at in range(4, len(data) - 4) if data[at : at + 4] in _BOXES]
    at = random.choice(boxes)
    kind = data[at : at + 4].decode()
    value = struct.pack(">I", random.choice((0, 1, 7, 8, 2**31 - 1, 2**31, 2**32 - 1, len(data))))
    if random.random() < 0.4:
        return data[: at - 4] + value + data[at:], f"size of {kind} is {value.hex()}"
    place = min(at + 4 + 4 * random.randrange(12), len(data) - 4)
    return data[:place] + value + data[place + 4 :], f"{kind}: {value.hex()} at {place - at}"


_BOXES = frozenset(
    b"ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf stbl stsd avc1 avcC mp4v esds stts stsc stsz stco".split()
)


def mutate_parquet(random: Random, data: bytes) -> tuple[bytes, str]:
    """A column of a table, or the bytes of the file."""
    if random.random() < 0.4:
        return mutate_bytes(random, data)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError):
        return mutate_bytes(random, data)
    names = table.column_names
    name = random.choice(names)
    rows = table.num_rows
    values: list[Any] = table.column(name).to_pylist()
    match random.randrange(5):
        case 0:
            changed, what = table.drop([name]), f"no column {name}"
        case 1:
            changed, what = table.slice(0, random.choice((0, 1, rows // 2))), "fewer rows"
        case 2:
            other = random.choice(("x", "", "action", "episode_index", f"{name}/x"))
            renamed = [other if one == name else one for one in names]
            changed, what = table.rename_columns(renamed), f"{name} is {other}"
        case 3 if values and isinstance(values[0], int | float | str):
            values[random.randrange(rows)] = random.choice(
                [v for v in (*_NUMBERS, None) if v is None or abs(v) < 2**63]
            )
            changed, what = _with_column(pa, table, name, values), f"a value of {name}"
        case _:
            value = random.choice(
                (None, True, "text", [1.0], {"a": 1}, b"x", -1, 10**15, float("nan"), [[1.0]], [], [None])
            )
            changed, what = _with_column(pa, table, name, [value] * rows), f"{name} is {value!r}"
    out = io.BytesIO()
    try:
        pq.write_table(changed, out)
    except (pa.ArrowException, TypeError):
        return mutate_bytes(random, data)
    return out.getvalue(), what


def _with_column(pa: Any, table: Any, name: str, values: list[Any]) -> Any:
    try:
        column = pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        column = pa.array([None if value is None else str(value) for value in values])
    return table.set_column(table.column_names.index(name), name, column)


_KINDS: dict[str, Mutation] = {
    "json": mutate_json,
    "jsonl": mutate_lines,
    "toml": mutate_toml,
    "txt": mutate_text,
    "jinja": mutate_template,
    "safetensors": mutate_safetensors,
    "png": mutate_png,
    "mp4": mutate_boxes,
    "webm": mutate_boxes,
    "parquet": mutate_parquet,
}


# -- files in place of files ------------------------------------------------------------------------------------------

SPECIAL = (
    "fifo", "zero", "directory", "loop", "dangling", "sparse", "unreadable", "link", "hard link", "absent", "full",
    "tty",
)  # fmt: skip


def _place_special(random: Random, tree: Tree, name: str) -> None:
    place_special(tree, name, random.choice(SPECIAL))


def place_special(tree: Tree, name: str, kind: str) -> None:
    """Something that is not the regular file it was at ``name``."""
    path, data = tree.root / name, tree.read(name)
    _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "zero" | "full" | "tty":
            path.symlink_to(f"/dev/{kind}")
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nothing")
        case "sparse":
            with path.open("wb") as file:
                file.write(data)
                file.truncate(20 << 30)
        case "unreadable":
            path.write_bytes(data)
            path.chmod(0)
        case "link" | "hard link":
            other = tree.root.parent / OUTSIDE / "copy"
            _remove(other)
            other.write_bytes(data)
            path.symlink_to(other) if kind == "link" else path.hardlink_to(other)
    tree.note(name, kind)


def _shuffle_files(random: Random, tree: Tree, name: str, names: Sequence[str]) -> None:
    """Files moved, exchanged, added."""
    other = random.choice(names)
    match random.randrange(5):
        case 0:
            one, two = tree.read(name), tree.read(other)
            tree.write(name, two, f"exchanged with {other}")
            tree.write(other, one, f"exchanged with {name}")
        case 1:
            tree.write(name, tree.read(other), f"a copy of {other}")
        case 2:
            _remove(tree.root / name)
            tree.note(name, "removed")
        case 3:
            folder, _, last = name.rpartition("/")
            odd = random.choice(
                (last.upper(), f".{last}", f"{last}~", "\x1b[31m", "a b", "é", "x" * 200, "\udcff", "\n")
            )
            tree.write(f"{folder}/{odd}".lstrip("/"), b"x", "added")
        case _:
            tree.write(name, b"", "empty")


_NAMES = ("\x1b[31m", "a b", "é", "x" * 200, "\udcff", "\n")


def is_special(path: Path) -> bool:
    """Whether ``path`` is anything but a regular file that can be read."""
    mode = path.lstat().st_mode
    return not stat.S_ISREG(mode) or not mode & 0o400
