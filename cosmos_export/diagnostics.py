"""Errors a user can act on, each with a stable code and an exit status.

Codes: 1xx input, 2xx graph, 3xx quantization, 4xx build (46x sampling, 48x plan and cache), 5xx runtime, 6xx requests,
parity (601), outputs (66x) and measurements (67x), 7xx bundle, 8xx environment.
A message says what happened, where, and what was found against what is allowed; the hint says what to do.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    FINDING = 1
    """A check did its work and says no: verification, gate, plan check."""
    USAGE = 2
    """Wrong option, configuration or input."""
    UNSUPPORTED = 3
    """Known but not available: target without a backend, missing optional dependency."""
    TOOL = 4
    """Another tool failed: builder, driver, file system."""
    HUNG_UP = 129
    """Ended by SIGHUP: the terminal was closed."""
    INTERRUPTED = 130
    TERMINATED = 143
    """Ended by SIGTERM, as by a job scheduler."""


class CosmosExportError(Exception):
    """Base of every error this project raises on purpose.

    ``code`` is ``CX`` and three digits; ``hint`` is the next thing to try (may be empty).
    """

    exit_code: ClassVar[ExitCode] = ExitCode.TOOL

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" (hint: {self.hint})" if self.hint else "")


class UserError(CosmosExportError):
    """The input or an option is wrong."""

    exit_code = ExitCode.USAGE


class UnsupportedError(CosmosExportError):
    """The request is valid but this target, backend or installation cannot serve it."""

    exit_code = ExitCode.UNSUPPORTED


class FindingError(CosmosExportError):
    """A check found the thing it looks for."""

    exit_code = ExitCode.FINDING


class ToolError(CosmosExportError):
    """A tool outside this project failed."""

    exit_code = ExitCode.TOOL


class InternalError(CosmosExportError):
    """An invariant of the compiler does not hold; worth a bug report with the last graph dump."""

    exit_code = ExitCode.TOOL


def shown(value: object, limit: int = 80) -> str:
    """``value`` as it may appear in a message: escaped, and at most ``limit`` characters whatever a file holds."""
    try:
        text = repr(value)
    except RecursionError:
        return "a value that is nested too deeply"
    return text if len(text) <= limit else text[:limit] + "…"
