"""A directory that appears under its name whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosmos_export import directories, units
from cosmos_export.diagnostics import ToolError, UserError
from cosmos_export.machine.system import free_disk

_WRITING = "writing"


@contextmanager
def new_directory(output: Path, force: bool = False) -> Iterator[Path]:
    """A directory beside ``output`` that takes its place when the block succeeds, and vanishes when it does not.

    ``force`` replaces what is there; check before that it may be replaced.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output
    output.parent.mkdir(parents=True, exist_ok=True)
    _clear(output)
    building, held = _made(output)
    try:
        yield building
        directories.sync_tree(building)
        directories.open_up(building)
        if force:
            directories.take_place(building, output)  # what was there has its name now
        else:
            building.rename(output)
            directories.sync_directory(output.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if held is not None:
            os.close(held)
        _clear(output)


def give_back(output: Path) -> None:
    """Call this before looking whether ``output`` is there: a command that died while it replaced it may have left it
    under another name."""
    directories.restore(Path(os.path.abspath(output)))  # noqa: PTH100


def _clear(output: Path) -> None:
    """Remove what commands that died have left of this output."""
    directories.remove_dead(output, _WRITING, directories.REPLACED)


def _made(output: Path) -> tuple[Path, int | None]:
    """A new directory beside ``output`` and the descriptor that holds its lock; None where there are no locks."""
    while True:
        path = directories.sibling(output, _WRITING)
        if path is None:
            raise ToolError("CX707", f"too many unfinished directories beside {output}", "remove them")
        path.mkdir(0o700)
        try:
            return path, directories.lock(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another command has just taken it for one that was left
        except OSError:
            return path, None


def require_space(output: Path, needed: int, code: str, what: str, hint: str) -> None:
    """``needed`` bytes are free where ``output`` will be, or UserError ``code``.

    What commands that died have left of it is removed first.
    """
    _clear(Path(os.path.abspath(output)))  # noqa: PTH100
    parent = next(folder for folder in (output.absolute().parent, *output.absolute().parents) if folder.exists())
    free = free_disk(parent)
    if free < needed:
        raise UserError(code, f"{what} needs {units.size(needed)}, {parent} has {units.size(free)} free", hint)
