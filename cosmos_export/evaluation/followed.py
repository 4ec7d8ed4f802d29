"""A quantized program beside a runtime, on the runtime's own codes.

Two runtimes add in different orders. An activation next to the boundary between two codes falls to one side in the one
and to the other in the other, and what follows differs by a step of the code: 0.1 to 0.6 % of a velocity, by chance. So
results of quantized programs that run freely say little. Here the reference takes every code from the runtime, and
three things are compared that chance does not move: what enters each rounding, what the rounding makes of it, and the
results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import onnx
import torch

from cosmos_export.evaluation.models import SHOWN, Value
from cosmos_export.evaluation.reference import relative_error
from cosmos_export.ir import ops, packing
from cosmos_export.ir.graph import Graph, Node, is_op
from cosmos_export.ir.ops import attend_rounded
from cosmos_export.targets.onnx.rounded import rounded_values

DIVISION = 2.0**-22
"""Largest relative error of a division in float32: that of a product with the reciprocal, and half a bit more."""


@dataclass
class Counts:
    """Activations that were rounded in a run, and what was found of them."""

    values: int = 0
    moved: int = 0
    """Values with another code than the reference has from the same codes before it."""
    steps: int = 0
    """Largest difference in codes (E4M3)."""
    wrong: int = 0
    """Values whose code does not follow from the runtime's own value, which is near no boundary (within `DIVISION`)."""
    apart: float = 0.0
    """Largest distance between what enters a rounding here and there, relative L2."""

    @property
    def error(self) -> float:
        """How far the runtime is from what it should compute, apart from its results."""
        return inf if self.wrong else self.apart


class Roundings:
    """Where the models of ``graph`` round activations: for each operation that does, the values before and after."""

    def __init__(self, graph: Graph) -> None:
        self.places: dict[Node, list[tuple[str, str]]] = {
            node: [] for node in graph.calls(*ops.having(ops.Trait.ROUNDS))
        }

    def find(self, model: onnx.ModelProto) -> frozenset[str]:
        """Look for them in ``model``; the values that it has to show."""
        found = {node: rounded_values(node, model) for node in self.places}
        for node, places in found.items():
            self.places[node] += places
        return frozenset(name for places in found.values() for pair in places for name in pair)

    @property
    def missing(self) -> list[Node]:
        """Operations that were not found as they are."""
        return [n for n, found in self.places.items() if len(found) != (4 if is_op(n, ops.JOINT_ATTENTION_FP8) else 1)]


@dataclass
class Followed:
    """The `Follow` of an interpreter: codes are those of the runtime, whose ``seen`` has the values of `Roundings`."""

    roundings: Roundings
    seen: Mapping[str, Value]
    counts: Counts = field(default_factory=Counts)

    def __call__(self, node: Node, values: Mapping[Node, torch.Tensor]) -> torch.Tensor | None:
        if node not in self.roundings.places:
            return None
        operands: list[Any] = [values[a] if isinstance(a, Node) else a for a in node.args]
        if is_op(node, ops.JOINT_ATTENTION_FP8):
            *taken, scales, scale = operands
            query, key, value, prefix_key, prefix_value = taken
            return attend_rounded(
                query, key, value, prefix_key, prefix_value, scales, scale,
                lambda which, x, step: self._taken(node, which, x, partial(packing.to_fp8, scale=step)),
            )  # fmt: skip
        x, scale = operands
        rounding = packing.to_fp8 if is_op(node, ops.QUANTIZE) else ops.REQUANTIZE_BLOCKS
        return self._taken(node, 0, x, partial(rounding, scale=scale))

    def _taken(
        self, node: Node, which: int, own: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The codes that the runtime rounded ``own`` to, compared with those that it should have."""
        expected, counts = rounded(own), self.counts
        counts.values += own.numel()
        given, result = (torch.from_numpy(self.seen[name + SHOWN]) for name in self.roundings.places[node][which])
        if given.numel() != own.numel() or result.numel() != own.numel():
            counts.wrong += own.numel()
            return expected
        given, result = given.reshape(own.shape), result.reshape(own.shape)
        counts.apart = max(counts.apart, relative_error({"": given}, {"": own}))
        near = (rounded(given * factor).to(torch.float32) for factor in (1.0, 1 - DIVISION, 1 + DIVISION))
        counts.wrong += int(torch.stack([result != code for code in near]).all(0).sum())
        taken = result.to(expected.dtype)
        moved = expected.to(torch.float32) != result
        counts.moved += int(moved.sum())
        if expected.dtype is torch.float8_e4m3fn and bool(moved.any()):
            counts.steps = max(counts.steps, int((_index(expected) - _index(taken)).abs().max()))
        return taken


def _index(codes: torch.Tensor) -> torch.Tensor:
    """The place of E4M3 ``codes`` among all in order."""
    bits = codes.view(torch.uint8).to(torch.int32)
    size = bits & 127
    return torch.where(bits > 127, -size, size)
