"""The memory that a build may take of its machine."""

from __future__ import annotations

import re

from cosmos_export.diagnostics import UserError
from cosmos_export.machine.memory import available_bytes
from cosmos_export.targets.backends import Backend

_MARGIN_BYTES = 1 << 30
"""Free memory that is left to the rest of the machine."""
_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(GiB|MiB|GB|MB)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``16GiB``. UserError CX456 for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise UserError(
            "CX456", f"memory budget `{text}` is not a size", f"a number and one of {', '.join(_UNITS)}: 16GiB"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def memory_budget(asked: str | None, backend: Backend) -> int | None:
    """The budget in bytes of a build for ``backend``; None where no engine is built here.

    Where none is asked for it is what the machine has free, in whole GiB, so that it is the same again tomorrow.
    UserError CX456 for what is not a size.
    """
    if not backend.builds_here:
        return None
    size = None if asked is None else parse_size(asked)
    return size or max(available_bytes() - _MARGIN_BYTES, 1 << 30) // (1 << 30) * (1 << 30)
