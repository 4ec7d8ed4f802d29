"""Captured graphs, taken from the cache where the same ones were captured before.

Capture follows from the configuration, the names, types and shapes of the tensors, the packages that trace the model
and the code that captures: their digests are the key. What is read back is the same program as the one that was kept,
so a build makes the same bytes either way.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cosmos_export import capture as capture_package
from cosmos_export import ir
from cosmos_export.capture import codec, model
from cosmos_export.capture.document import alike, program_document, read_program
from cosmos_export.compiler.cache import Cache, key_of
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightSource
from cosmos_export.ir.verifier import verify
from cosmos_export.machine.system import processor
from cosmos_export.release import VERSION

_log = logging.getLogger("cosmos_export")
_PACKAGES = ("torch", "diffusers", "transformers", "sympy")
"""Packages that trace the model and order the terms of its sizes."""
_CODECS: Mapping[str, Callable[..., Program]] = {
    "vae-decoder": codec.capture_vae_decoder,
    "vae-encoder": codec.capture_vae_encoder,
    "sound-decoder": codec.capture_sound_decoder,
}


def capture(
    config: Mapping[str, Any],
    sources: Mapping[str, WeightSource],
    *,
    modalities: Collection[str],
    graphs: Path | None = None,
) -> Program:
    """`cosmos_export.capture.model.capture`, with the cache in ``graphs``."""
    return _captured(
        f"step-{'-'.join(sorted(modalities))}", config, sources, graphs,
        lambda: model.capture(config, sources, modalities=modalities),
    )  # fmt: skip


def capture_codec(
    name: str, config: Mapping[str, Any], sources: Mapping[str, WeightSource], graphs: Path | None = None
) -> Program:
    """Codec ``name`` of ``config`` as a program, with the cache in ``graphs``."""
    return _captured(name, config, sources, graphs, lambda: _CODECS[name](config, sources))


def _captured(
    name: str,
    config: Mapping[str, Any],
    sources: Mapping[str, WeightSource],
    folder: Path | None,
    make: Callable[[], Program],
) -> Program:
    """The graphs that ``make`` captures, or the same from the cache."""
    if folder is None:
        return make()
    known, components = Cache(folder), capture_components(name, config, sources)
    key = key_of(components)
    data = known.kept(key)
    if data is not None:
        try:
            program = _verified(read_program(data, sources))
            _log.debug("graphs of %s: taken from the cache, %s", name, key[:12])
            return program
        except (ValueError, LookupError, CosmosExportError) as error:
            _log.warning("graphs of %s: the entry %s is damaged: %s", name, key[:12], error)
    elif _log.isEnabledFor(logging.DEBUG):
        _log.debug("graphs of %s: captured: %s", name, known.why(name, components))
    program = make()
    try:
        data = program_document(program)
        if alike(read_program(data, sources), program):
            known.keep(name, components, data)
        else:
            _log.debug("graphs of %s: not kept, a document does not hold all of them", name)
    except ValueError as error:
        _log.debug("graphs of %s: not kept: %s", name, error)
    return program


def _verified(program: Program) -> Program:
    """``program``, whose graphs and loop fit together. CosmosExportError, ValueError or LookupError where they do not:
    an entry whose digest is right is still only what somebody wrote there."""
    if program.history != ["capture"]:
        raise ValueError(f"its history is {program.history}")
    verify(program, stage="capture")
    return program


def capture_components(name: str, config: Mapping[str, Any], sources: Mapping[str, WeightSource]) -> Mapping[str, str]:
    """Everything that the graphs called ``name`` follow from, as the key of the cache takes it."""
    versions = {"cosmos-export": VERSION, **{package: _version(package) for package in _PACKAGES}}
    return {
        "graphs": name,
        "configuration": _digest(config),
        "tensors": _digest([_described(source) for source in sources.values()]),
        "packages": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "machine": f"{processor()} {torch.backends.cpu.get_cpu_capability()}",
        "capture": _code(),
    }


def _described(source: WeightSource) -> list[Any]:
    """The facts about a tensor that capture uses, without its place."""
    scale = [] if source.scale is None else _described(source.scale)
    return [source.key, str(source.dtype), list(source.shape), scale]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@cache
def _code() -> str:
    """Digest of the code that captures, and of the dialect it captures into."""
    found = hashlib.sha256()
    for package in (capture_package, ir):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            data = path.read_bytes()
            found.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return found.hexdigest()
