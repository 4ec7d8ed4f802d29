"""The options of passes: outputs, schemes, ranges, steps, cuts and kernels of one build."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cosmos_export.diagnostics import UserError
from cosmos_export.ir import packing
from cosmos_export.ir.graph import Graph, Node
from cosmos_export.ir.spec import LowRank, WeightBinding, WeightSource
from cosmos_export.sampling import Schedule, Segment

OverSteps = Callable[[str, str, int], tuple[str, ...]]
"""Tower, kind and layer of a site → its scheme at every step; one scheme for the reasoner."""
Cuts = Callable[[str, Graph], Sequence[Node]]
"""Name and graph → the nodes from which on a new piece begins; none where the graph stays whole."""


@dataclass(frozen=True)
class Ranges:
    """The results of calibration, by the name of a linear: its weight's key without ``.weight``."""

    amax: Mapping[str, float] = field(default_factory=dict)
    """``<linear>.input_amax`` → largest magnitude of its input."""
    pre_scales: Mapping[str, WeightSource] = field(default_factory=dict)
    """Linear → place of the factors of its input's channels; equal factors are one source."""
    low_rank: Mapping[str, tuple[WeightSource, WeightSource]] = field(default_factory=dict)
    """Linear → place of ``down`` [rank, K] and ``up`` [N, rank] of its part of low rank; equal ``down`` are one."""
    attention: Mapping[tuple[int, str], float] = field(default_factory=dict)
    """Layer and operand (``q``, ``k``, ``v``) of the generator's attention → largest magnitude."""

    def input_amax(self, weight: WeightBinding) -> float:
        """Range of the input of the linear with ``weight``, or of all merged into it; CX312 where one has none."""
        keys = [f"{linear}.input_amax" for linear in linears_of(weight)]
        missing = [key for key in keys if key not in self.amax]
        if missing:
            raise UserError("CX312", f"there is no {missing[0]}", "calibrate with the towers and modes of the recipe")
        return max(self.amax[key] for key in keys)

    def attention_scales(self, layer: int, scale: float) -> torch.Tensor:
        """float32 [3]: FP8 scales of the query times ``scale``, of keys and of values; CX312 for a missing range."""
        missing = [operand for operand in "qkv" if (layer, operand) not in self.attention]
        if missing:
            raise UserError(
                "CX312",
                f"there is no {missing[0]}_amax of attention in layer {layer} of the generator",
                "calibrate with the towers and modes of the recipe",
            )
        q, k, v = (self.attention[layer, operand] for operand in "qkv")
        return packing.fp8_scale(torch.tensor([q * scale, k, v]))

    def pre_scale(self, weight: WeightBinding) -> WeightSource | None:
        """The factors of the input of ``weight``; CX355 where linears that were merged have different ones."""
        found = {self.pre_scales.get(linear) for linear in linears_of(weight)}
        if len(found) > 1:
            raise UserError(
                "CX355",
                f"{', '.join(linears_of(weight))} read one value, and have different pre-scales in the scale table",
                "calibrate again with one search for linears that read the same value",
            )
        return found.pop()

    def part_of_low_rank(self, weight: WeightBinding) -> LowRank | None:
        """Part of ``weight`` that is not packed; CX355 where linears that were merged were not searched together."""
        found = [self.low_rank.get(linear) for linear in linears_of(weight)]
        given = [part for part in found if part is not None]
        if not given:
            return None
        if len(given) < len(found) or len({down for down, _ in given}) > 1:
            raise UserError(
                "CX355",
                f"{', '.join(linears_of(weight))} read one value, and have different parts of low rank in the table",
                "calibrate again with one search for linears that read the same value",
            )
        return LowRank(given[0][0], tuple(up for _, up in given))


def linears_of(weight: WeightBinding) -> tuple[str, ...]:
    """Names of the linears whose weights are in ``weight``."""
    return tuple(key.removesuffix(".weight") for key in weight.keys)


@dataclass(frozen=True)
class PassOptions:
    """Options of all passes. The default: every output, nothing quantized, a loop that the host runs, nothing cut."""

    outputs: Collection[str] | None = None
    """Velocities to keep; None: all."""
    over_steps: OverSteps | None = None
    """Scheme of every site at each step; None: no site is quantized."""
    towers: Mapping[str, str] | None = None
    """Checkpoint tensor → ``und`` or ``gen``, held against what dataflow says; None: not compared."""
    ranges: Ranges = field(default_factory=Ranges)
    """Ranges and factors of calibration."""
    step: int = 0
    """The step of the schedule whose schemes the sites compute in."""
    schedule: Schedule | None = None
    segment: Segment | None = None
    """The steps that the loop runs by itself, of ``schedule``; None: the host runs it."""
    cuts: Cuts | None = None
    """Where graphs are cut; None: nowhere."""
    kernels: Collection[str] = ()
    """Kernels that compute what they can, where the backend of a graph has them."""
