"""How each operation is written in ONNX: a file per family, found by being here."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from cosmos_export.targets.onnx.rules.table import RULES, Rule, rule

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["RULES", "Rule", "rule"]
