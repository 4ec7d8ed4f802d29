"""Work on input that can ask for any amount of time and memory, in a process that has limits on both.

A chat template is a program of the checkpoint's author. It cannot be stopped from the process that runs it, and what it
takes is not returned, so it gets a process of its own: `run_bounded` here, `serve` there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_export.diagnostics import CosmosExportError, UnsupportedError, UserError
from cosmos_export.release import ROOT

_ENVIRONMENT = {"USE_TORCH": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""The work needs no tensors, and no network."""
_ERRORS: Mapping[str, type[CosmosExportError]] = {kind.__name__: kind for kind in (UserError, UnsupportedError)}


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of the process. ``wait_s`` bounds one that sleeps."""

    cpu_s: int
    memory_bytes: int
    wait_s: int = 300


class LimitError(Exception):
    """A limit was reached; ``phase`` is what the process had begun, the message says which limit."""

    def __init__(self, what: str, phase: str) -> None:
        super().__init__(what)
        self.phase = phase


def run_bounded(module: str, request: Mapping[str, Any], limits: ProcessLimits) -> Any:
    """Result of ``answer(request, begin)`` of ``module`` (JSON both ways), from a process within ``limits``.

    ``begin`` is called with the name of each phase of the work. A UserError or UnsupportedError of ``answer`` is raised
    here. LimitError: the process took more than it may.
    """
    # -P and an explicit path: the working directory must not decide what the process imports.
    root = str(ROOT)
    given = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = os.pathsep.join([root, *given])
    code = f"from cosmos_export.compiler.bounded import serve; serve({module!r}, {limits.cpu_s}, {limits.memory_bytes})"
    phase = ""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=limits.wait_s,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LimitError(f"took more than {limits.wait_s} s", phase) from error
    for line in done.stdout.splitlines():
        message = json.loads(line)
        match message["kind"]:
            case "phase":
                phase = message["name"]
            case "result":
                return message["value"]
            case "error":
                raise _ERRORS[message["type"]](message["code"], message["message"], message["hint"])
            case "memory":
                raise LimitError(_memory(limits), phase)
    if done.returncode == -signal.SIGXCPU:
        raise LimitError(f"takes more than {limits.cpu_s} s", phase)
    if done.returncode < 0:  # a library in C or Rust ends the process where it gets no memory
        raise LimitError(f"{_memory(limits)} (or it crashes: signal {-done.returncode})", phase)
    raise RuntimeError(f"{module} failed:\n{done.stderr.decode(errors='replace')[-4000:]}")


def _memory(limits: ProcessLimits) -> str:
    return f"takes more than {limits.memory_bytes >> 20:,} MiB of memory"


def serve(module: str, cpu_s: int, memory_bytes: int) -> None:
    """Entry of the process: take the request from stdin, run ``answer`` of ``module`` within limits, and say how it
    went."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no message
    for which, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError):  # lower already
            resource.setrlimit(which, (most, resource.getrlimit(which)[1]))

    def send(kind: str, **fields: Any) -> None:
        channel.write(json.dumps({"kind": kind, **fields}) + "\n")
        channel.flush()

    request = json.loads(sys.stdin.buffer.read())
    answer: Callable[[Any, Callable[[str], None]], Any] = importlib.import_module(module).answer
    try:
        send("result", value=answer(request, lambda name: send("phase", name=name)))
    except (UserError, UnsupportedError) as error:
        send("error", type=type(error).__name__, code=error.code, message=error.message, hint=error.hint)
    except MemoryError:
        send("memory")
    channel.flush()
    os._exit(0)  # threads of libraries and a full memory are no reason to wait
