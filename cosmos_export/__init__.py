"""Ahead-of-time compiler for NVIDIA Cosmos 3.

import cosmos_export as cx

The functions below are the public API; ``docs/python.md`` has examples and says what is stable. Importing this package
imports nothing heavy: each function is imported when it is first used.
"""

import sys as _sys
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from cosmos_export.release import VERSION as __version__

__all__ = [
    "CosmosExportError",
    "__version__",
    "calibrate",
    "compile",
    "modes",
    "open",
    "plan",
    "quantize",
    "recipes",
    "schemes",
    "targets",
]

if _TYPE_CHECKING:
    from cosmos_export.api import calibrate, compile, modes, open, plan, quantize, recipes, schemes, targets
    from cosmos_export.diagnostics import CosmosExportError

# In a source tree `passes`, `kernels`, `calibration` and `targets` are beside this folder and install inside it.
# Without an installation (`python -m cosmos_export` from the repository root) they are found through this entry.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "passes" / "__init__.py").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> _Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "CosmosExportError":
        from cosmos_export.diagnostics import CosmosExportError

        return CosmosExportError
    from cosmos_export import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(_ModuleType):
    """A package that has the name of a function of the API: a call of it is a call of that function."""

    @property
    def __wrapped__(self) -> _Any:
        """The function; `inspect.signature` and notebooks show its parameters."""
        from cosmos_export import api

        return getattr(api, self.__name__.rpartition(".")[2])

    def __call__(self, *args: _Any, **keywords: _Any) -> _Any:
        return self.__wrapped__(*args, **keywords)


class _Package(_ModuleType):
    """This package. Importing `cosmos_export.plan` or `cosmos_export.targets` replaces the function of that name by the
    package, so the package must be callable too (docs/decisions/0008-functions-and-packages.md)."""

    def __setattr__(self, name: str, value: _Any) -> None:
        if name in ("plan", "targets") and isinstance(value, _ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package
