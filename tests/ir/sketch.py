"""Small IR programs written by hand, for what a pass must do and must not do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Dim, Shape, symbol
from cosmos_export.ir.graph import Graph, Node
from cosmos_export.ir.interpreter import run_program
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Loop, Program
from cosmos_export.ir.spec import Rate, TensorSpec, Transform, WeightBinding, WeightSource
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.base import Pass, PassResult

N, P = symbol("rows"), symbol("prompt")
SIZES = {"rows": 5, "prompt": 3}


class Sketch:
    """A program of one graph, `body`. Inputs change in every step unless their rate says otherwise."""

    def __init__(self) -> None:
        self.graph = Graph("body")
        self.rates: dict[str, Rate] = {}

    def input(self, name: str, shape: Shape, rate: Rate = Rate.CARRIED, dtype: torch.dtype = torch.float32) -> Node:
        self.rates[name] = rate
        return self.graph.add_input(name, TensorSpec(dtype, shape))

    def weight(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Node:
        source = WeightSource(name, Path("absent"), 0, dtype, shape)
        return self.graph.add_weight(name, WeightBinding((source,), Transform.IDENTITY, dtype))

    def constant(self, name: str, value: torch.Tensor) -> Node:
        return self.graph.add_constant(name, value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call(target, *args, **kwargs)

    def program(self, **outputs: Node) -> Program:
        self.graph.set_outputs(outputs)
        self.graph.eliminate_dead_code()
        dims = {d: Dim(d, 0, 4096) for d in SIZES}
        program = Program({"body": self.graph}, dims, self.rates, Loop("body", {}))
        verify(program)
        return program

    # -- what the model is built from, as the exporter writes it ------------------------------------------------------

    def norm(self, x: Node, weight: Node, *, axis: int = -1, exponent: int = 2, eps: float = 1e-6) -> Node:
        mean = self.call(aten.mean.dim, self.call(aten.pow.Tensor_Scalar, x, exponent), [axis], True)
        root = self.call(aten.rsqrt.default, self.call(aten.add.Tensor, mean, eps))
        return self.call(aten.mul.Tensor, self.call(aten.mul.Tensor, x, root), weight)

    def tables(self, positions: Node, frequencies: Node) -> tuple[Node, Node]:
        """(cos, sin) [rows, d / 2] of ``frequencies`` [axes, 1, d / 2, 1] at ``positions`` [axes, rows]."""
        wide = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, positions, 1), 2)
        angles = self.call(aten.permute.default, self.call(aten.matmul.default, frequencies, wide), [0, 1, 3, 2])
        first = self.call(aten.select.int, angles, 0, 0)
        cos, sin = (self.call(f, first) for f in (aten.cos.default, aten.sin.default))
        return self.call(aten.squeeze.dim, cos, 0), self.call(aten.squeeze.dim, sin, 0)

    def batched(self, rows: Node) -> Node:
        return self.call(aten.permute.default, self.call(aten.unsqueeze.default, rows, 0), [0, 2, 1, 3])

    def unbatched(self, batch: Node, order: tuple[int, ...] = (0, 2, 1, 3)) -> Node:
        return self.call(aten.squeeze.dim, self.call(aten.permute.default, batch, list(order)), 0)


def random_inputs(program: Program, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name in program.rates:
        for graph in program.graphs.values():
            if name in graph.inputs:
                spec = graph.inputs[name].meta["spec"]
                shape = [s if isinstance(s, int) else int(s.subs({symbol(k): v for k, v in SIZES.items()}))
                         for s in spec.shape]  # fmt: skip
                value = torch.randn(shape, generator=generator) if spec.dtype.is_floating_point else torch.ones(shape)
                inputs[name] = value.to(spec.dtype)
    return inputs


def seeded_weights(binding: WeightBinding) -> torch.Tensor:
    """Values that follow from the keys, merged as the binding says."""
    from cosmos_export.ir.interpreter import read_weights

    def read(source: WeightSource) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, source.key)))
        return torch.randn(source.shape, generator=generator).to(source.dtype)

    return read_weights(read)(binding)


def run(program: Program, inputs: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    return run_program(program, inputs if inputs is not None else random_inputs(program), seeded_weights)


def apply(step: Pass, program: Program, *, tolerance: float = 0.0) -> PassResult:
    """Run ``step``; check the IR, that the function is the same, and that a second run changes nothing."""
    before = run(program.copy())
    result = step.run(program)
    verify(program, stage=step.name)
    after = run(program)
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=tolerance, atol=tolerance)
    assert not step.run(program).modified
    verify(program, stage=step.name)
    return result


def declines(step: Pass, program: Program, reason: str, *, forbids: Callable[[Node], bool] | None = None) -> None:
    """``step`` changes nothing and says why."""
    text = [str(n.target) for g in program.graphs.values() for n in g.calls()]
    result = step.run(program)
    verify(program, stage=step.name)
    assert [str(n.target) for g in program.graphs.values() for n in g.calls()] == text
    assert not result.modified, result.changes
    assert reason in "; ".join(f"{d.where}: {d.reason}" for d in result.declined), result.declined


def targets(program: Program, graph: str = "body") -> list[Any]:
    return [n.target for n in program.graphs[graph].calls()]


__all__ = ["SIZES", "N", "P", "Sketch", "apply", "aten", "declines", "ops", "random_inputs", "run", "targets"]
