"""Both branches of classifier-free guidance in one run of the generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Dim, expression, simplify, symbol
from cosmos_export.ir.graph import Graph, Node, copy_node, is_op, map_operands, row_operands, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Edge, Program
from cosmos_export.ir.rates import rates_of
from cosmos_export.ir.spec import Rate, TensorSpec
from cosmos_export.passes.base import CannotApply, Effect, Pass, PassResult
from cosmos_export.passes.options import PassOptions

NEGATIVE = "negative"
"""The run of the reasoner on the negative prompt; its values carry this prefix."""
NEGATIVE_LEN = f"{NEGATIVE}_und_len"


@dataclass(frozen=True)
class _Value:
    """A value of the generator in both branches: one for both (``second`` None, not stacked), the rows of both in one
    value (``stacked``), or one value each."""

    first: Node
    second: Node | None = None
    stacked: bool = False


class BatchGuidance(Pass):
    """The generator for the prompt and for the negative prompt at once.

        generator(x, K), generator(x, K')  =  rows of both branches through one linear, norm and gate,
                                              attention of each branch over its own prompt

    What does not follow from a prompt (the embedding of the latents, the first layer's query, key and value) is
    computed once. From the first attention on the rows of both branches are in one value of twice as many rows, so
    every weight is read once; attention takes the rows of a branch, with the keys of that branch, so prompts of
    different lengths need no padding and no mask. Outputs of the negative branch carry the prefix ``negative_``.
    Numerical effect: none but for a GEMM's order of summation at another number of rows (≤ 1e-6 in fp32).
    """

    name = "batch_guidance"
    law = "generator(x, K), generator(x, K') = one run on the rows of both, each attending to its own prompt"
    effect = Effect.INTERFACE
    phase = "loop"

    @classmethod
    def made(cls, options: PassOptions) -> Pass | None:
        return cls() if options.segment is not None and options.segment.guided else None

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        body = program.graphs[program.loop.body]
        if any(edge.instance == NEGATIVE for edge in program.edges):
            return result
        rates = rates_of(program, body)
        prompt = [e.input for e in program.edges_into(body.name) if rates[body.inputs[e.input]].follows_prompt]
        if not prompt:
            return result  # not split: there is no value of the prompt to have a second of
        for name in prompt:
            if rates[body.inputs[name]] is Rate.BRANCH:
                reason = "follows from the prompt and from the rest of the request: the graph it comes from runs once"
                raise CannotApply(self.name, body.inputs[name], reason)
        rewrite = _Batch(body, prompt, self.name)
        program.graphs[program.loop.body] = rewrite.run()
        length = program.dims["und_len"]
        program.dims[NEGATIVE_LEN] = Dim(NEGATIVE_LEN, length.min, length.max, "negative prompt tokens")
        program.edges += [
            Edge(e.source, e.output, e.target, f"{NEGATIVE}_{e.input}", NEGATIVE)
            for e in program.edges
            if e.target == body.name and e.input in prompt
        ]
        result.changes["values in one batch for both branches"] = rewrite.stacked
        result.changes["values computed once for both branches"] = rewrite.shared
        return result


class _Batch:
    def __init__(self, body: Graph, prompt: list[str], by: str) -> None:
        self._old = body
        self._prompt = set(prompt)
        self._by = by
        self._new = Graph(body.name)
        self._values: dict[Node, _Value] = {}
        self._doubled: dict[Node, Node] = {}
        self._branches: dict[tuple[Node, int], Node] = {}
        self.stacked = self.shared = 0

    def run(self) -> Graph:
        for node in self._old.nodes:
            self._values[node] = self._leaf(node) if node.op == "placeholder" else self._operation(node)
        outputs: dict[str, Node] = {}
        for name, node in self._old.outputs.items():
            outputs[name] = self._branch(self._values[node], 0)
        for name, node in self._old.outputs.items():
            outputs[f"{NEGATIVE}_{name}"] = self._branch(self._values[node], 1)
        self._new.set_outputs(outputs)
        self._new.eliminate_dead_code()
        return self._new

    def _leaf(self, node: Node) -> _Value:
        if node.name not in self._prompt:
            return _Value(copy_node(self._new, node, {}))
        first = copy_node(self._new, node, {})
        spec = spec_of(node)
        length = symbol(NEGATIVE_LEN)
        shape = tuple(s if isinstance(s, int) else s.subs(symbol("und_len"), length) for s in spec.shape)
        return _Value(first, self._new.add_input(f"{NEGATIVE}_{node.name}", TensorSpec(spec.dtype, shape)))

    # -- operations ---------------------------------------------------------------------------------------------------

    def _operation(self, node: Node) -> _Value:
        operands = [self._values[n] for n in node.all_input_nodes]
        if not any(v.stacked or v.second is not None for v in operands):
            self.shared += 1
            return _Value(self._emit(node, lambda n: self._values[n].first))
        if is_op(node, ops.JOINT_ATTENTION):
            # Each branch with its own rows and its own prompt; the rows of both together again behind it.
            self.stacked += 1
            # Two branches with one query would be merged by the builder into one product, and lose the fused kernel.
            for operand in node.args[:3]:
                known = self._values[operand]
                if not known.stacked and known.second is None:
                    self._values[operand] = _Value(self._double(known.first), stacked=True)
            return _Value(self._call(node, aten.cat.default, self._both(node), 0), stacked=True)
        rows = row_operands(node)
        # What every row reads whole must be one value for both branches.
        shared = all(self._values[n].second is None for n in node.all_input_nodes)
        if shared and all(n in rows for n in node.all_input_nodes if self._values[n].stacked):
            self.stacked += 1
            return _Value(self._emit_stacked(node, rows), stacked=True)
        first, second = self._both(node)
        return _Value(first, second)

    def _both(self, node: Node) -> list[Node]:
        return [
            self._emit(node, partial(lambda value, branch: self._branch(self._values[value], branch), branch=branch))
            for branch in (0, 1)
        ]

    def _emit(self, node: Node, operand: Callable[[Node], Node]) -> Node:
        return self._call(node, node.target, *map_operands(node.args, operand), **map_operands(node.kwargs, operand))

    def _emit_stacked(self, node: Node, rows: list[Node]) -> Node:
        """``node`` on the rows of both branches; ``rows`` that are the same for both are repeated."""
        spec = spec_of(node)

        def operand(value: Node) -> Node:
            known = self._values[value]
            return self._double(known.first) if value in rows and not known.stacked else known.first

        args = list(map_operands(node.args, operand))
        if is_op(node, aten.view.default):
            args[1] = [simplify(2 * expression(spec.shape[0])), *spec.shape[1:]]
        return self._call(node, node.target, *args, **node.kwargs)

    def _double(self, node: Node) -> Node:
        if node not in self._doubled:
            self._doubled[node] = self._call(node, aten.cat.default, [node, node], 0)
        return self._doubled[node]

    def _branch(self, value: _Value, branch: int) -> Node:
        if not value.stacked:
            return value.first if branch == 0 or value.second is None else value.second
        key = (value.first, branch)
        if key not in self._branches:
            total = spec_of(value.first).shape[0]
            rows = simplify(expression(total) / 2)
            ends = (0, rows) if branch == 0 else (rows, total)
            self._branches[key] = self._call(value.first, aten.slice.Tensor, value.first, 0, *ends)
        return self._branches[key]

    def _call(self, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self._new.call(target, *args, like=like, by=self._by, **kwargs)
