"""The functions that a verb prints with: data on stdout, everything else on stderr.

`out()` and `emit_json` are stdout; `err()`, `log` and `progress()` are stderr. Colour is never needed to understand a
line, and ``NO_COLOR`` is respected. Rich is imported on first use, so that ``--help`` does not pay for it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cosmos_export import units
from cosmos_export.diagnostics import InternalError
from cosmos_export.documents import labelled
from cosmos_export.printable import in_json, printable, render_hook
from cosmos_export.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from cosmos_export.bundle import Open
    from cosmos_export.cli.tables import Table

PIPED_WIDTH = 200
"""Columns of output that goes to a file or a pipe: wide enough that no table wraps."""

_logger = logging.getLogger("cosmos_export")


@dataclass
class _State:
    """The settings of the command that runs, and what it has printed."""

    quiet: bool = False
    verbose: bool = False
    no_progress: bool = False
    json_emitted: bool = False
    resume_command: str | None = None
    out: Console | None = None
    err: Console | None = None
    bars: list[RichProgress] = field(default_factory=list)


_state = _State()


def configure(quiet: bool = False, verbose: bool = False, no_progress: bool = False) -> None:
    """Begin a command with these settings; whatever the one before left behind is forgotten."""
    global _state
    close()
    _state = _State(quiet=quiet, verbose=verbose, no_progress=no_progress)
    _logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    if not any(isinstance(handler, _ToStderr) for handler in _logger.handlers):
        _logger.addHandler(_ToStderr())
        _logger.propagate = False


@dataclass(frozen=True)
class SharedOptions:
    """The shared options where they stand before the verb."""

    quiet: bool = False
    verbose: bool = False
    no_progress: bool = False


_before = SharedOptions()


def set_before(settings: SharedOptions) -> None:
    """The options before the verb of this command; they add to those after it."""
    global _before
    _before = settings


def given_before() -> SharedOptions:
    return _before


def has_colour(stream: TextIO | None) -> bool:
    """Whether ``stream`` is a terminal that shows colour, and nobody has asked for none (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream is not None and stream.isatty() and not plain


def close() -> None:
    """End all progress bars, so that what is printed next starts on a line of its own."""
    for bars in _state.bars:
        bars.close()
    _state.bars.clear()


def out() -> Console:
    """The console of stdout: data only."""
    if _state.out is None:
        _state.out = _console(sys.stdout)
    return _state.out


def show(*parts: Table | str) -> None:
    """Print tables and texts on stdout, with an empty line between tables."""
    target = out()
    for number, part in enumerate(parts):
        if number and not isinstance(part, str):
            target.print()
        text = part if isinstance(part, str) else part.render(target.width)
        target.print(text, soft_wrap=True)


def err() -> Console:
    """The console of stderr."""
    if _state.err is None:
        _state.err = _console(sys.stderr)
    return _state.err


def log(message: str, level: int = logging.INFO) -> None:
    """A line on stderr. ``--quiet`` leaves warnings and errors, ``--verbose`` adds debug lines."""
    _logger.log(level, "%s", message)


def log_open(verdicts: Open) -> None:
    """Findings that the build of a bundle in use left open, in one line; ``--quiet`` leaves what failed."""
    if verdicts.line:
        log(verdicts.line, logging.WARNING if verdicts.failed else logging.INFO)


def verdict(text: str, ok: bool) -> None:
    """The last line of a command on stderr. ``--quiet`` silences a good one."""
    close()
    if not (ok and _state.quiet):
        err().print(text, soft_wrap=True)


def emit_json(name: str, content: Mapping[str, Any]) -> None:
    """Print ``content`` on stdout as the document ``name`` of `cosmos_export.documents`. A command prints one;
    dataclasses, enums and paths are written as plain values."""
    if _state.json_emitted:
        raise InternalError("CX001", "a second JSON document on stdout")
    narrow = (sys.stdout.encoding or "utf-8").lower().replace("_", "-") not in ("utf-8", "utf8")
    plain = json.loads(json.dumps(content, allow_nan=False, default=_plain))
    document = plain if content.get("document") == name else labelled(name, plain)
    text = json.dumps(document, indent=2, ensure_ascii=narrow, allow_nan=False)
    _state.json_emitted = True
    # Also halves of characters, from names of files, which must not cost the whole document.
    sys.stdout.write(in_json(text) + "\n")
    sys.stdout.flush()


def json_emitted() -> bool:
    """Whether this command has printed its document."""
    return _state.json_emitted


def progress() -> Progress:
    """Where this command's long work reports: bars, lines, or nothing under ``--quiet`` and ``--no-progress``."""
    if _state.quiet or _state.no_progress:
        return Silent()
    bars = RichProgress(err())
    _state.bars.append(bars)
    return bars


def set_resume_command(command: str | None) -> None:
    """Let an interrupted run be continued with ``command`` from here on; None: it cannot be."""
    _state.resume_command = command


def resume_command() -> str | None:
    """The command that continues this run after an interruption, if it can be continued."""
    return _state.resume_command


def is_verbose() -> bool:
    """Whether ``--verbose`` was given."""
    return _state.verbose


class RichProgress:
    """`Progress` on a console: bars with the time left on a terminal, elsewhere one line per 10 %.

    Where lines are printed, a task that begins inside one with a known total has none of its own: the lines of the
    outer one name it.
    """

    # A pipe gets a line for each tenth, but not faster than once a second, and once in 30 s if a tenth takes longer.
    min_gap_s = 1.0
    max_gap_s = 30.0

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._bars: Bars | None = None
        self._ids: dict[str, TaskID] = {}
        self._lines: dict[str, _Line] = {}

    def begin(self, task: str, total: int | None = None) -> None:
        if not self._console.is_terminal:
            now = self._clock()
            outer = any(line.total for line in self._lines.values())
            self._lines[task] = _Line(total, started=now, printed=now, inner=outer)
            return
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        self._ids[task] = self._bars.add_task(printable(task), total=total)

    def update(self, task: str, completed: int) -> None:
        if self._bars is not None and task in self._ids:
            self._bars.update(self._ids[task], completed=completed)
        elif task in self._lines:
            self._advance(task, self._lines[task], completed)

    def end(self, task: str) -> None:
        if self._bars is not None and task in self._ids:
            self._bars.remove_task(self._ids.pop(task))
            if not self._ids:
                self.close()
        elif task in self._lines:
            line = self._lines.pop(task)
            elapsed = self._clock() - line.started
            if elapsed >= self.min_gap_s and not line.inner:
                self._print(f"{task}: done in {_duration(elapsed)}")

    def close(self) -> None:
        """Take the bars off the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._ids.clear()

    def _advance(self, task: str, line: _Line, completed: int) -> None:
        if line.inner:
            return
        now = self._clock()
        gap = now - line.printed
        tenth = completed * 10 // line.total if line.total else 0
        if (tenth > line.tenth and gap >= self.min_gap_s) or gap >= self.max_gap_s:
            line.tenth, line.printed = tenth, now
            share, left = _share(completed, line.total), _left(completed, line.total, now - line.started)
            inner = next((name for name, one in reversed(self._lines.items()) if one.inner), "")
            self._print(f"{task}: {share}{left}{f': {inner}' if inner else ''}")

    def _print(self, text: str) -> None:
        self._console.print(text)


@dataclass
class _Line:
    total: int | None
    started: float
    printed: float
    inner: bool = False
    tenth: int = 0


class _ToStderr(logging.Handler):
    """Writes through the console, which knows about the bars on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        with suppress(OSError, ValueError):  # a stream that is closed must not end what is being done
            err().print(f"{prefix}{record.getMessage()}", soft_wrap=True)


def width(stream: TextIO) -> int | None:
    """Columns of ``stream``: of the terminal (None: as Rich finds it), ``COLUMNS``, or enough for any table."""
    columns = os.environ.get("COLUMNS", "")
    return None if stream.isatty() else int(columns) if columns.isdecimal() and int(columns) else PIPED_WIDTH


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    # No markup and no highlighting: a path or a message is printed as it is, square brackets included.
    console = Console(
        file=stream,
        markup=False,
        emoji=False,
        highlight=False,
        width=width(stream),
    )
    console.push_render_hook(render_hook())
    return console


def _bars(console: Console) -> Bars:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _share(completed: int, total: int | None) -> str:
    return f"{min(completed * 100 // total, 100)} %" if total else f"{completed:,} done"


def _left(completed: int, total: int | None, elapsed: float) -> str:
    if not total or not 0 < completed < total:
        return f" ({_duration(elapsed)})"
    return f" ({_duration(elapsed)}, about {_duration(elapsed * (total - completed) / completed)} left)"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else units.seconds(seconds, 2)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
