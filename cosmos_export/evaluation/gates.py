"""What quantization costs: each linear by itself, and the velocity of whole steps.

Everything runs in the interpreter, which holds one weight at a time: a model of any size is measured in the memory of
its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from cosmos_export.checkpoint import Tower
from cosmos_export.ir.graph import Node, is_weight
from cosmos_export.ir.interpreter import Tensors, Weights, run_program
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.passes.insert_quantization import linears_of

Observer = Callable[[Node, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""A linear, its input [rows, K], its weight [N, K] and its result."""


def observe_inputs(program: Program, inputs: Tensors, weights: Weights) -> dict[str, float]:
    """``<linear>.input_amax`` of every linear of ``program`` in one step, in float32."""
    found: dict[str, float] = {}

    def see(node: Node, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        for linear in linears_of(node.args[1].meta["weight"]):
            amax = float(x.abs().amax()) if x.numel() else 0.0
            found[f"{linear}.input_amax"] = max(found.get(f"{linear}.input_amax", 0.0), amax)

    run_program(program, inputs, weights, compute=torch.float32, observe=watch_linears(see))
    return found


def watch_linears(see: Observer) -> Callable[[Node, Mapping[Node, torch.Tensor]], None]:
    """An observer for the interpreter that sees linears with plain weights."""

    def observe(node: Node, values: Mapping[Node, torch.Tensor]) -> None:
        if node.target is aten.linear.default and is_weight(node.args[1]):
            see(node, values[node.args[0]], values[node.args[1]], values[node])

    return observe


def misplaced_towers(program: Program, towers: Mapping[str, Tower]) -> list[str]:
    """Sites that the compiler gives to another tower than the reader of checkpoints: two accounts that must agree."""
    names = {"und": Tower.REASONER, "gen": Tower.GENERATOR}
    found = []
    for graph in program.graphs.values():
        for node in graph.weights.values():
            precision = node.meta.get("precision")
            if precision is None:
                continue
            wrong = [key for key in node.meta["weight"].keys if towers.get(key) is not names[precision.tower]]
            found += [f"{precision.site}: {key} is of the {towers.get(key, 'unknown')} tower" for key in wrong[:1]]
    return found
