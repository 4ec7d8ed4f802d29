"""A directory that appears under its name whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from cosmos_export.diagnostics import UserError


@contextmanager
def new_directory(output: Path, force: bool = False) -> Iterator[Path]:
    """A directory beside ``output`` that takes its place when the block succeeds, and vanishes when it does not.

    ``force`` replaces what is there; check before that it may be replaced.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    building = _made(output.with_name(f".{output.name}.writing-{os.getpid()}"))
    try:
        yield building
        if force and output.exists():
            old = _made(output.with_name(f".{output.name}.replaced-{os.getpid()}"))
            output.rename(old)
            building.rename(output)
            shutil.rmtree(old)
        else:
            building.rename(output)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _made(path: Path) -> Path:
    """A new directory ``path``, or with a number behind it: process ids come round again."""
    for attempt in count():
        candidate = path.with_name(f"{path.name}-{attempt}" if attempt else path.name)
        with suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise AssertionError("numbers do not end")


def require_space(output: Path, needed: int, code: str, what: str, hint: str) -> None:
    """``needed`` bytes are free where ``output`` will be, or UserError ``code``."""
    parent = next(folder for folder in (output.absolute().parent, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(code, f"{what} needs {needed / 1e9:,.1f} GB, {parent} has {free / 1e9:,.1f} GB free", hint)
