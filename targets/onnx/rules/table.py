"""The table of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cosmos_export.ir.graph import Node
from cosmos_export.targets.onnx.model import ModelBuilder

Rule = Callable[[ModelBuilder, Node], str]
"""Writes a node into a model; returns the name of its result there."""
RULES: dict[Any, Rule] = {}
"""Operation → its rule."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Declare the decorated function the rule of ``targets``."""

    def declare(function: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise ValueError(f"{target} has two rules")
            RULES[target] = function
        return function

    return declare
