"""Tables of the command line, in one style: a heading, columns two spaces apart, numbers to the right.

Nothing is ever cut. A table that is wider than the terminal is printed as one block of lines per row.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cosmos_export.printable import printable

_GAP = "  "
_LEAST_WRAPPED = 24
"""Columns that text which may be wrapped gets at least."""


@dataclass(frozen=True)
class Column:
    """One column. ``right``: numbers. ``wraps``: text that may take several lines."""

    title: str
    right: bool = False
    wraps: bool = False


def numbers(*titles: str) -> list[Any]:
    """Columns of numbers."""
    return [Column(title, right=True) for title in titles]


@dataclass
class Table:
    """Rows of text under columns. Columns without a value in any row are left out."""

    columns: Sequence[Column | str]
    title: str = ""
    note: str = ""
    """A sentence under the table."""
    head: int = 1
    """Columns that name a row where it is printed as a block."""
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Add a row; None is shown as –."""
        assert len(cells) == len(self.columns)
        self.rows.append(tuple("–" if cell is None else printable(str(cell)) for cell in cells))

    def render(self, width: int) -> str:
        """The table in at most ``width`` columns, where single words allow it."""
        columns = [Column(one) if isinstance(one, str) else one for one in self.columns]
        kept = [i for i, _ in enumerate(columns) if any(row[i] for row in self.rows)]
        columns, rows = [columns[i] for i in kept], [tuple(row[i] for i in kept) for row in self.rows]
        lines = _grid(columns, rows, width)
        if lines is None:
            lines = _blocks(columns, rows, width, self.head)
        return "\n".join([*_wrapped(self.title, width), *lines, *_wrapped(self.note, width)])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _grid(columns: list[Column], rows: list[tuple[str, ...]], width: int) -> list[str] | None:
    """Lines of the table side by side; None where it does not fit."""
    widths = [max([len(column.title), *(len(row[i]) for row in rows)]) for i, column in enumerate(columns)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    for i in sorted((i for i, column in enumerate(columns) if column.wraps), key=lambda i: -widths[i]):
        longest = max(len(word) for row in rows for word in [*row[i].split(), columns[i].title])
        smaller = max(widths[i] - max(excess, 0), _LEAST_WRAPPED, longest)
        excess -= widths[i] - min(smaller, widths[i])
        widths[i] = min(smaller, widths[i])
    if excess > 0:
        return None
    lines = _row([column.title for column in columns], columns, widths)
    for row in rows:
        lines += _row(row, columns, widths)
    return lines


def _row(cells: Sequence[str], columns: list[Column], widths: list[int]) -> list[str]:
    parts = [
        textwrap.wrap(cell, size, break_long_words=False, break_on_hyphens=False) or [""] if column.wraps else [cell]
        for cell, column, size in zip(cells, columns, widths, strict=True)
    ]
    lines = []
    for number in range(max(map(len, parts))):
        texts = [part[number] if number < len(part) else "" for part in parts]
        aligned = [
            text.rjust(size) if column.right else text.ljust(size)
            for text, column, size in zip(texts, columns, widths, strict=True)
        ]
        lines.append(_GAP.join(aligned).rstrip())
    return lines


def _blocks(columns: list[Column], rows: list[tuple[str, ...]], width: int, head: int) -> list[str]:
    """One block per row: what names it, and under it a line per value."""
    label = max(len(column.title) for column in columns[head:])
    lines = []
    for row in rows:
        lines.append(", ".join(cell for cell in row[:head] if cell))
        for column, cell in zip(columns[head:], row[head:], strict=True):
            if cell:
                indent = f"{_GAP}{column.title:<{label}}{_GAP}"
                lines += textwrap.wrap(
                    cell, width, initial_indent=indent, subsequent_indent=" " * len(indent),
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
    return lines


def facts(values: Sequence[tuple[str, object]], width: int) -> str:
    """Names and values, one per line; a list of values takes a line each."""
    label = max(len(name) for name, _ in values)
    lines = []
    for name, value in values:
        parts = [printable(str(one)) for one in (value if isinstance(value, list | tuple) else [value])]
        for number, part in enumerate(parts):
            indent = f"{name if not number else '':<{label}}{_GAP}"
            lines += textwrap.wrap(
                part, width, initial_indent=indent, subsequent_indent=" " * len(indent),
                break_long_words=False, break_on_hyphens=False,
            ) or [indent.rstrip()]  # fmt: skip
    return "\n".join(lines)
