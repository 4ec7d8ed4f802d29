"""Building a TensorRT engine from an ONNX file, for TensorRT and TensorRT-RTX alike.

Both have nearly the same Python API, so the module is data (`TrtFlavor`). The builder runs in a subprocess, because it
can crash; this module never imports it. The engine is streamed to a temporary file beside the output and renamed only
when it is complete. `cosmos_export.targets.trt.worker` is the other side of the pipe.

The builder orders some things by their addresses, so equal engines need equal memory: the worker gets the same
environment and the same relative paths wherever it builds, a heap of its own for each of the builder's threads (in one
heap what they take beside each other comes in another order each time), and (where the system allows) fixed addresses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from cosmos_export.diagnostics import CosmosExportError, ToolError, UnsupportedError, UserError
from cosmos_export.machine.process import process_memory
from cosmos_export.progress import Progress, Silent
from cosmos_export.release import ROOT
from cosmos_export.targets.description import Target
from cosmos_export.targets.profiles import ShapeRange

PROGRESS_STEPS = 1000
"""Units of the one progress task a build reports."""

_POLL_S = 0.1
_GRACE_S = 5.0
_LOG_LINES = 20
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "SYSTEMROOT")
_FIXED = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "128", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class TrtFlavor:
    """Differences between the two builders."""

    module: str
    title: str
    extra: str
    """Optional dependency group of this project that installs it."""
    distribution: str
    """Package of its releases."""
    capabilities: frozenset[str]
    """Compute capabilities it can build for; empty: only that of the GPU in the machine."""
    first_version: tuple[int, int] | None = None
    """The first release whose API is the one used here; None: the version is pinned."""


@dataclass(frozen=True)
class EngineTensor:
    """One input or output of an engine; −1 marks a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """Result and cost of building an engine, wherever the engine is now."""

    size_bytes: int
    sha256: str
    compute_capability: str
    builder: str
    """Module that built it, e.g. ``tensorrt_rtx``."""
    builder_version: str
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    profiles: int
    attention: int
    """Attention operations the graph was parsed into: as many fused kernels are due in each profile of the engine."""
    parse_s: float
    build_s: float
    peak_memory_bytes: int
    """Largest resident set of the build process, mapped weight files included."""
    peak_anonymous_bytes: int | None
    """The part of it no file backs, sampled; what the machine must really have. None where the system does not tell."""
    warnings: tuple[str, ...]
    plugins: int = 0
    """Operations of the graph that are this project's kernels."""
    layers: int | None = None
    """Layers that the engine inspector lists; None where the builder has no inspector."""
    layers_in: Mapping[str, int] = field(default_factory=dict)
    """How many of them name each type of operand or kind of kernel, by token of their description."""


@dataclass(frozen=True, kw_only=True)
class EngineReport(EngineFacts):
    """An engine in a file."""

    path: Path
    reused: str = ""
    """Where it was taken from instead of being built: ``resumed``, ``cache``; its seconds and memory are of then."""


def require_module(flavor: TrtFlavor) -> None:
    """Return if the builder is installed, else raise `UnsupportedError`. Does not import it."""
    if find_spec(flavor.module) is None:
        raise UnsupportedError(
            "CX404",
            f"building for this target needs the `{flavor.module}` Python module, which is not installed",
            f'pip install ".[{flavor.extra}]" in the checkout',
        )


def builder_key(module: str) -> Mapping[str, str]:
    """Facts that decide the bytes of an engine besides what it is built from: the builder ``module``, and the program
    that drives it, since another one may set it up differently."""
    return {"builder": f"{module} {_version(module)}", "worker": _worker_digest()}


@cache
def _version(module: str) -> str:
    names = metadata.packages_distributions().get(module, ())
    return ",".join(f"{name} {metadata.version(name)}" for name in sorted(set(names)))


@cache
def _worker_digest() -> str:
    return hashlib.sha256(Path(__file__).with_name("worker.py").read_bytes()).hexdigest()


def run_build(
    flavor: TrtFlavor,
    onnx_path: Path,
    output: Path,
    *,
    target: Target,
    profiles: Sequence[Mapping[str, ShapeRange]],
    progress: Progress | None = None,
    timeout_s: float | None = None,
    allow_tf32: bool = False,
    decomposable_attention: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> EngineReport:
    """Build ``onnx_path`` (its weights may be in external files) for ``target`` and write the engine to ``output``."""
    capability = target.compute_capability
    if capability is None or (flavor.capabilities and capability not in flavor.capabilities):
        raise UnsupportedError(
            "CX405",
            f"`{flavor.module}` has no compute capability {capability or 'for a CPU'} (target `{target.name}`)",
            f"it builds for {', '.join(sorted(flavor.capabilities))}",
        )
    if not onnx_path.is_file():
        raise UserError("CX420", f"there is no ONNX file `{onnx_path}`")
    require_module(flavor)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{secrets.token_hex(6)}.partial")
    folder = onnx_path.resolve().parent
    request = {
        # Always as long: what the builder's process reads must not move what it allocates.
        "parent": f"{os.getpid():010d}",
        "module": flavor.module,
        "onnx": onnx_path.name,
        "output": os.path.relpath(partial.resolve(), folder),
        "compute_capability": capability if flavor.capabilities else None,
        "profiles": [{key: [list(shape) for shape in span] for key, span in profile.items()} for profile in profiles],
        "allow_tf32": allow_tf32,
        "decomposable_attention": decomposable_attention,
        "first_version": flavor.first_version,
        "settings": dict(settings or {}),
    }
    try:
        result, anonymous = _run_worker(request, folder, f"build {output.name}", progress or Silent(), timeout_s)
        report = EngineReport(
            path=output,
            size_bytes=partial.stat().st_size,
            sha256=result["sha256"],
            compute_capability=capability,
            builder=flavor.module,
            builder_version=result["version"],
            inputs=tuple(_tensor(item) for item in result["inputs"]),
            outputs=tuple(_tensor(item) for item in result["outputs"]),
            profiles=len(profiles),
            attention=result["attention"],
            parse_s=result["parse_s"],
            build_s=result["build_s"],
            peak_memory_bytes=max(result["peak_memory_bytes"], anonymous or 0),
            peak_anonymous_bytes=anonymous,
            warnings=tuple(result["warnings"]),
            plugins=result["plugins"],
            layers=result["layers"],
            layers_in=result["layers_in"],
        )
        if report.size_bytes != result["size_bytes"] or not report.size_bytes:
            written = result["size_bytes"]
            raise ToolError("CX424", f"the engine file has {report.size_bytes} bytes, {written} were written")
        partial.replace(output)
        return report
    finally:
        partial.unlink(missing_ok=True)


def _run_worker(
    request: Mapping[str, Any], folder: Path, task: str, progress: Progress, timeout_s: float | None
) -> tuple[dict[str, Any], int | None]:
    """Run the worker in ``folder`` to its end; the result message and the peak of its anonymous memory."""
    # -P and an explicit path: the working directory must not decide what the worker imports.
    root = str(ROOT)
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([root, *(str(Path(entry).absolute()) for entry in given)])
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cosmos_export.targets.trt.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={**{k: os.environ[k] for k in _PASSED_ON if k in os.environ}, **_FIXED, "PYTHONPATH": path},
    )
    assert process.stdin and process.stdout and process.stderr
    messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    log: deque[str] = deque(maxlen=_LOG_LINES)
    readers = [
        threading.Thread(target=_read_messages, args=(process.stdout, messages), daemon=True),
        threading.Thread(target=_read_log, args=(process.stderr, log), daemon=True),
    ]
    for reader in readers:
        reader.start()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    result: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    anonymous: int | None = None
    done = 0
    progress.begin(task, PROGRESS_STEPS)
    try:
        with contextlib.suppress(BrokenPipeError):  # a worker that dies at once is reported below
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        while True:
            if deadline is not None and time.monotonic() > deadline:
                raise ToolError(
                    "CX423", f"the build did not finish in {timeout_s:g} s", "raise the limit, or build fewer profiles"
                )
            try:
                message = messages.get(timeout=_POLL_S)
            except queue.Empty:
                anonymous = _larger(anonymous, process.pid)
                progress.update(task, done)  # whoever listens may end the build by raising
                continue
            if message is None:
                break
            match message.get("kind"):
                case "progress":
                    done = max(done, int(message["permille"]))
                    progress.update(task, done)
                case "log":
                    log.append(str(message["text"]))
                case "failure":
                    failure = message
                case "result":
                    result = message
            anonymous = _larger(anonymous, process.pid)
        process.wait()
        for reader in readers:
            reader.join(_GRACE_S)
        if failure is not None:
            raise _failure(request, failure)
        if process.returncode != 0 or result is None:
            raise _crash(request, process.returncode, log)
        progress.update(task, PROGRESS_STEPS)
        return result, anonymous
    finally:
        _stop(process)
        progress.end(task)


def _failure(request: Mapping[str, Any], failure: Mapping[str, Any]) -> CosmosExportError:
    """The error that the worker reported itself."""
    name, details = Path(request["onnx"]).name, [str(line) for line in failure["details"]]
    listed = "; ".join(details[:8]) + (f"; and {len(details) - 8} more" if len(details) > 8 else "")
    match failure["stage"]:
        case "version":
            return UnsupportedError("CX404", f"`{request['module']}`: {listed}", "install the release of the extra")
        case "import":
            return UnsupportedError("CX404", f"`{request['module']}` is installed but does not load: {listed}")
        case "parse":
            hint = "the file may be damaged or its external weights missing; lower it again"
            return ToolError("CX420", f"`{request['module']}` cannot read `{name}`: {listed}", hint)
        case "profile":
            return UserError("CX413", f"the shape profiles do not fit the inputs of `{name}`: {listed}")
        case "write":
            return ToolError("CX424", f"the engine could not be written: {listed}", "free disk space and build again")
    hint = ""
    if "not supported by a dedicated kernel" in listed:
        hint = "the builder fuses attention only in BF16 or FP16 with head sizes up to 256"
    elif "HW-specific datatypes" in listed:
        hint = "the target has no kernels for this precision; `cosmos-export targets` lists those it has"
    return ToolError("CX421", f"`{request['module']}` could not build `{name}`: {listed}", hint)


def _crash(request: Mapping[str, Any], code: int, log: Sequence[str]) -> ToolError:
    """The worker ended without a word."""
    if code < 0:
        try:
            cause = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        except ValueError:
            cause = f"was ended by signal {-code}"
    else:
        cause = f"ended with status {code} and no result"
    hint = "try the same graph with fewer layers or one profile to find what the builder does not take"
    if -code == getattr(signal, "SIGKILL", 9):
        hint = "the system may have run out of memory: build with external weights or fewer layers an engine"
    tail = "; last lines: " + " | ".join(log) if log else "; it logged nothing"
    return ToolError("CX422", f"the `{request['module']}` builder {cause}{tail}", hint)


def _read_messages(stream: IO[bytes], messages: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in stream:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                messages.put(message)
    messages.put(None)


def _read_log(stream: IO[bytes], log: deque[str]) -> None:
    for line in stream:
        text = line.decode(errors="replace").strip()
        if text:
            log.append(text[:500])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the worker if it still runs: politely, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _larger(peak: int | None, process: int) -> int | None:
    """The larger of ``peak`` and of the memory that no file backs of ``process`` now; None where it is not told."""
    now = process_memory(process)
    return peak if now is None else max(peak or 0, now.anonymous)


def _tensor(item: Mapping[str, Any]) -> EngineTensor:
    return EngineTensor(item["name"], item["dtype"], tuple(item["shape"]))
