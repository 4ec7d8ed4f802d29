"""The backends by name. A file of this folder that has a ``BACKEND`` is one: there is no list to add it to.

Importing this package, and asking it, imports no builder and no runtime: the methods of a backend do that, late.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from cosmos_export.diagnostics import InternalError
from cosmos_export.targets.backends.protocol import Backend
from cosmos_export.targets.description import Target

_INTERFACE = "protocol"
"""The one module of this folder that is not a backend."""
_REFERENCE = "onnxruntime"


@cache
def backends() -> Mapping[str, Backend]:
    """Every backend by its name, in the order of the names. InternalError CX408: a file declares none, or a name is
    taken."""
    found: dict[str, Backend] = {}
    for module in sorted(info.name for info in iter_modules(__path__) if info.name != _INTERFACE):
        backend = getattr(import_module(f"{__name__}.{module}"), "BACKEND", None)
        if not isinstance(backend, Backend):
            raise InternalError("CX408", f"targets/backends/{module}.py declares no `BACKEND`")
        if backend.name in found:
            raise InternalError("CX408", f"two files of targets/backends declare the backend `{backend.name}`")
        found[backend.name] = backend
    return MappingProxyType(dict(sorted(found.items())))


def backend_of(target: Target) -> Backend:
    """The backend that ``target`` is built with. InternalError CX402 where its description names none that there is,
    or lacks the compute capability that its backend needs."""
    backend = backends().get(target.backend)
    if backend is None:
        known = ", ".join(backends())
        raise InternalError("CX402", f"target `{target.name}`: backend `{target.backend}` is not one of {known}")
    if backend.needs_gpu and target.compute_capability is None:
        raise InternalError("CX402", f"target `{target.name}`: {backend.title} needs a GPU, and it describes none")
    return backend


def distributions() -> tuple[str, ...]:
    """The distributions that backends need, each once."""
    return tuple(dict.fromkeys(need.distribution for one in backends().values() for need in one.requirements))


def reference_backend() -> Backend:
    """The backend that every bundle runs with, on any machine: a build measures what it has made with it."""
    return backends()[_REFERENCE]


__all__ = ["Backend", "backend_of", "backends", "distributions", "reference_backend"]
