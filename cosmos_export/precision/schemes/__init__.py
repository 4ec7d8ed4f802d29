"""The schemes: one file each, which declares it as ``SCHEME``. There is no list to edit: the folder is the registry.

`SCHEMES` has them by name, those with the widest numbers first, and of those as wide the linears' before attention's.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from cosmos_export.diagnostics import InternalError
from cosmos_export.precision.scheme import Scheme
from cosmos_export.precision.schemes.bf16 import SCHEME as _OWN_TYPE
from cosmos_export.precision.sites import LINEARS


def _discovered() -> Mapping[str, Scheme]:
    found: dict[str, Scheme] = {}
    for module in iter_modules(__path__):
        scheme = import_module(f"{__name__}.{module.name}").SCHEME
        if scheme.name in found:
            raise InternalError("CX365", f"two files declare the scheme `{scheme.name}`")
        found[scheme.name] = scheme
    return MappingProxyType({scheme.name: scheme for scheme in sorted(found.values(), key=_order)})


def _order(scheme: Scheme) -> tuple[int, bool, str]:
    return -int(scheme.bits), not set(LINEARS) & set(scheme.kinds), scheme.name


SCHEMES = _discovered()
UNQUANTIZED = _OWN_TYPE.name
"""The model's own type."""


def schemes_for(kind: str) -> tuple[str, ...]:
    """Names of the schemes for a ``kind`` of site."""
    return tuple(scheme.name for scheme in SCHEMES.values() if kind in scheme.kinds)


def weight_only_form(scheme: Scheme) -> Scheme | None:
    """The scheme that reads the same stored weights with wide activations; None: there is none, or it is ``scheme``."""
    same = (one for one in SCHEMES.values() if one.weight_only and one.weight == scheme.weight)
    return next((one for one in same if one is not scheme), None)


def stored_schemes() -> tuple[Scheme, ...]:
    """Schemes in which quantized checkpoints are written."""
    return tuple(scheme for scheme in SCHEMES.values() if scheme.layout is not None)


def searched_schemes(algorithm: str) -> tuple[Scheme, ...]:
    """Schemes for which the search ``algorithm`` of calibration makes something."""
    return tuple(scheme for scheme in SCHEMES.values() if algorithm in scheme.algorithms)
