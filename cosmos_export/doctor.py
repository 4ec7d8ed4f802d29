"""Whether this machine can build for, or run on, a target: what is there, what is missing, what to do about it.

Every fact comes through `Facts`, so that a check can be tried on a machine that is not there. No torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cosmos_export.machine import system
from cosmos_export.machine.gpu import Gpu, gpus
from cosmos_export.machine.memory import available_bytes
from cosmos_export.machine.packages import JETPACK, installed_release, is_older, jetpack_release, other_releases
from cosmos_export.targets import Target, load_target
from cosmos_export.targets.backends import backend_of, backends, distributions

_GIB = 1 << 30
_LEAST_DRIVER = 580
"""CUDA 13, which every package here is built with, needs this branch of the driver."""
_LEAST_MEMORY = 10 * _GIB
_LEAST_DISK = 40 * _GIB
"""A bundle of Nano: its weights once, and again in engines."""
_COMPILER = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "safetensors")


class CheckState(Enum):
    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing fails of it."""
    BLOCKER = "blocker"


@dataclass(frozen=True)
class Finding:
    """One line of the checklist."""

    check: str
    state: CheckState
    found: str
    hint: str = ""


@dataclass(frozen=True)
class Facts:
    """The equipment of a machine."""

    python: str
    system: str
    gpus: tuple[Gpu, ...]
    versions: Mapping[str, str | None]
    memory_bytes: int | None
    disk_bytes: int
    environment: Mapping[str, str]
    compiler: str | None
    """A C++ compiler, by path: what `torch.compile` needs on a CPU."""


def facts(folder: Path, packages: Mapping[str, str | None] | None = None) -> Facts:
    """Those of this machine; disk is that of ``folder``."""
    return Facts(
        python=system.python_version(),
        system=system.system(),
        gpus=gpus(),
        versions=packages if packages is not None else _versions(),
        memory_bytes=_available_bytes(),
        disk_bytes=system.free_disk(folder),
        environment=dict(os.environ),
        compiler=next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None),
    )


def examine(found: Facts, target: Target | None) -> Iterator[Finding]:
    """The checklist, for ``target`` where one is given; else for every target whose GPU is here."""
    yield from _machine(found)
    yield from _cards(found)
    if found.gpus:
        yield _cuda(found, target)
    yield _compile(found)
    targets = [target] if target is not None else _matching(found)
    for one in targets:
        yield from _target(found, one, asked=target is not None)
    yield from _traps(found, targets)


def _machine(found: Facts) -> Iterator[Finding]:
    linux = found.system.startswith("Linux")
    yield Finding(
        "system", CheckState.OK if linux else CheckState.BLOCKER, f"{found.system}, Python {found.python}",
        "" if linux else "the builders and the runtime are for Linux",
    )  # fmt: skip
    memory = found.memory_bytes
    if memory is not None:
        enough = memory >= _LEAST_MEMORY
        hint = (
            ""
            if enough
            else "a build of Nano takes 10 GiB, in BF16 16; close programs, or bound it with `build --memory-budget`"
        )
        yield Finding(
            "memory", CheckState.OK if enough else CheckState.NOTE, f"{memory / _GIB:.1f} GiB available", hint
        )
    enough = found.disk_bytes >= _LEAST_DISK
    hint = "" if enough else "a bundle of Nano takes 41 GiB in FP8; `--output` may be on another disk"
    yield Finding("disk", CheckState.OK if enough else CheckState.NOTE, f"{found.disk_bytes / _GIB:.1f} GiB free", hint)


def _cards(found: Facts) -> Iterator[Finding]:
    if not found.gpus:
        yield Finding(
            "gpu", CheckState.NOTE, "none", "TensorRT-RTX engines build here all the same; running them needs one"
        )
    for gpu in found.gpus:
        total = f", {gpu.memory_bytes / _GIB:.0f} GiB" if gpu.memory_bytes else ""
        yield Finding(
            "gpu", CheckState.OK, f"{gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}{total}"
        )
        if gpu.mig:
            yield Finding(
                "gpu", CheckState.NOTE, f"{gpu.index}: in MIG mode", "an instance has a part of the card's rate"
            )
    drivers = {gpu.driver for gpu in found.gpus}
    for driver in sorted(drivers):
        new = driver.partition(".")[0].isdigit() and int(driver.partition(".")[0]) >= _LEAST_DRIVER
        hint = "" if new else f"CUDA 13 needs driver {_LEAST_DRIVER} or later"
        yield Finding("driver", CheckState.OK if new else CheckState.BLOCKER, driver, hint)


_CUDA_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
"""Packages that bring CUDA itself; PyTorch and the builders depend on one."""


def _cuda(found: Facts, target: Target | None) -> Finding:
    """CUDA as Python packages bring it, and whether PyTorch has it."""
    torch = found.versions.get("torch") or ""
    runtimes = [f"{name} {found.versions[name]}" for name in _CUDA_RUNTIMES if found.versions.get(name)]
    if torch.endswith("+cpu"):
        needed = target is not None and backend_of(target).compiles_when_run
        hint = (
            "PyTorch's index has builds with CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu130"
        )
        return Finding(
            "cuda", CheckState.BLOCKER if needed else CheckState.NOTE, f"torch {torch} is built for CPUs alone", hint
        )
    return Finding(
        "cuda", CheckState.OK, ", ".join(runtimes) or "no CUDA package: that of the system, or none is needed"
    )


def _compile(found: Facts) -> Finding:
    missing = [name for name in _COMPILER if found.versions.get(name) is None]
    if missing:
        return Finding(
            "compiler",
            CheckState.NOTE,
            f"{', '.join(missing)} not installed",
            'to build: pip install ".[compile]" in the checkout',
        )
    others = other_releases("compile", found.versions)
    if others:
        said = f"{', '.join(others)}: capture is made for what is in brackets"
        return Finding("compiler", CheckState.NOTE, said, 'to build: pip install ".[compile]" in the checkout')
    return Finding(
        "compiler", CheckState.OK, ", ".join(f"{name} {found.versions[name]}" for name in ("torch", "diffusers"))
    )


def _matching(found: Facts) -> list[Target]:
    from cosmos_export.targets import target_names

    here = {gpu.compute_capability for gpu in found.gpus}
    return [t for t in map(load_target, target_names()) if t.compute_capability in here]


def _target(found: Facts, target: Target, *, asked: bool) -> Iterator[Finding]:
    name = f"target {target.name}"
    here = [gpu for gpu in found.gpus if gpu.compute_capability == target.compute_capability]
    finished = backend_of(target).finished_here
    if target.compute_capability is not None and not here:
        yield Finding(
            name, CheckState.NOTE, f"no GPU of compute capability {target.compute_capability} here",
            "engines build here, and run there" if finished else "the bundle builds here and is finished there",
        )  # fmt: skip
    for backend in (target.backend, *target.other_backends):
        for requirement in backends()[backend].requirements:
            version = found.versions.get(requirement.distribution)
            # What finishes elsewhere is not missing here.
            needed = asked and backend == target.backend and (finished or bool(here))
            state = CheckState.OK if version else CheckState.BLOCKER if needed else CheckState.NOTE
            hint = "" if version else f'pip install ".[{requirement.extra}]" in the checkout'
            yield Finding(name, state, f"{backend}: {requirement.distribution} {version or 'not installed'}", hint)
    for package, least in target.least.items():
        version = found.versions.get(package)
        if version is not None and is_older(version, least):
            hint = "install that JetPack, or a later one" if package == JETPACK else f"pip install '{package}>={least}'"
            state = CheckState.BLOCKER if asked or here else CheckState.NOTE
            yield Finding(name, state, f"{package} {version}; it needs {least} or later", hint)
        elif version is None and here:
            yield Finding(name, CheckState.NOTE, f"{package} is not found here; it needs {least} or later")
    for gpu in here:
        if gpu.free_bytes is not None and gpu.memory_bytes and gpu.free_bytes < 0.5 * gpu.memory_bytes:
            free = f"{gpu.free_bytes / _GIB:.0f} of {gpu.memory_bytes / _GIB:.0f} GiB free"
            yield Finding(
                name, CheckState.NOTE, f"GPU {gpu.index}: {free}", "another process holds the rest: `nvidia-smi`"
            )
    for trap in target.traps:
        yield Finding(name, CheckState.NOTE, f"known trap: {trap}")


_VARIABLES: Mapping[str, Callable[[str], str]] = {
    "TRITON_INTERPRET": lambda value: "kernels are interpreted, a thousand times slower" if value == "1" else "",
    "CUDA_VISIBLE_DEVICES": lambda value: "no GPU is visible to any process: unset it" if value in ("", "-1") else "",
    "CUDA_LAUNCH_BLOCKING": lambda value: "every launch waits: unset it" if value == "1" else "",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": lambda value: "every allocation goes to the driver: unset it" if value else "",
    "HF_HUB_ENABLE_HF_TRANSFER": lambda value: "downloads fail without hf-transfer" if value == "1" else "",
}
"""Variables that change what happens, and when."""


def _traps(found: Facts, targets: list[Target]) -> Iterator[Finding]:
    for name, judge in _VARIABLES.items():
        hint = judge(found.environment[name]) if name in found.environment else ""
        if hint:
            yield Finding("environment", CheckState.NOTE, f"{name}={found.environment[name]}", hint)
    if found.compiler is None and any(_compiles_when_run(t) for t in targets):
        yield Finding(
            "environment",
            CheckState.NOTE,
            "no C++ compiler",
            "`torch.compile` on a CPU needs g++; on a GPU, too, for launchers",
        )


def _compiles_when_run(target: Target) -> bool:
    return any(backends()[name].compiles_when_run for name in (target.backend, *target.other_backends))


def _versions() -> dict[str, str | None]:
    names = {*_COMPILER, *_CUDA_RUNTIMES, "triton", *distributions()}
    return {name: installed_release(name) for name in sorted(names)} | {JETPACK: jetpack_release()}


def _available_bytes() -> int | None:
    """Free memory as a build asks for it; None where the system does not say."""
    with suppress(OSError):
        return available_bytes()
    return None
