"""Numbers as people read them. Bytes are in KiB, MiB, GiB and TiB everywhere; three digits say what was measured, two
what is predicted."""

from __future__ import annotations


def size(size_bytes: float, digits: int = 3) -> str:
    """``size_bytes`` such as ``1.53 GiB``."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 999.5 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{number(value, digits)} {unit}"


def number(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, and with all digits before the point."""
    if value == 0 or value != value or abs(value) == float("inf"):
        return f"{value:g}"
    before = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    after = max(digits - before, 0)
    rounded = round(value, digits - before)
    return f"{rounded:,.{after}f}"


def seconds(value: float, digits: int = 3) -> str:
    """A time such as ``31.4 ms``, ``12.5 s``, ``14 min`` or ``2 h 05 min``."""
    if value < 0.9995:
        return f"{number(1e3 * value, digits)} ms"
    if value < 119.5:
        return f"{number(value, digits)} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def count(value: int) -> str:
    """A number of things such as ``15.3 B``: billions, millions, thousands."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return str(value)
