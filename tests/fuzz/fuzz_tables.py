"""Mutations of tensors and tables: safetensors and Parquet."""

from __future__ import annotations

import io
import json
import struct
from random import Random
from typing import Any

from fuzz_bytes import mutate_bytes
from fuzz_json import dump, mutate_json
from fuzz_values import NUMBERS


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
            values[random.randrange(rows)] = random.choice([v for v in (*NUMBERS, None) if v is None or abs(v) < 2**63])
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
