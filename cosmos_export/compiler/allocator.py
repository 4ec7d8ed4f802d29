"""Memory that is freed and soon wanted again stays with the process: tensors of the same sizes come and go by the
thousand, and the system takes longer to clear a fresh page than the arithmetic on it takes."""

from __future__ import annotations

import ctypes
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
_NEVER = 2**31 - 1
_LARGEST = 32 << 20
"""Blocks of up to so many bytes, the most that glibc allows: what is larger leaves gaps that nothing fits into."""


def keep_freed_memory() -> None:
    """Blocks of up to 32 MiB come from the heap from now on, and the heap does not shrink. Nothing happens without
    glibc."""
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Give the system what is free now: before another process needs it."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None
