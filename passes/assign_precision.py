"""Labels every matrix product of the towers with its kind and its scheme at each step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, is_op, is_weight
from cosmos_export.ir.ops import Trait, aten
from cosmos_export.ir.program import Program
from cosmos_export.ir.rates import rates_of
from cosmos_export.passes.base import CannotApply, Effect, Pass, PassResult
from cosmos_export.passes.options import OverSteps, PassOptions
from cosmos_export.precision.schemes import UNQUANTIZED
from cosmos_export.precision.sites import CORE, DOWN, GATE_UP, GEN, OUT, PROMPT_KV, QKV, UND

_ATTENTION = ops.having(Trait.ATTENDS)
_ACTIVATIONS = ops.having(Trait.ACTIVATION)
_MOVES = ops.VIEWS | ops.having(Trait.PART) | ops.having(Trait.JOIN)
_ON_THE_WAY_TO_ATTENTION = (*_MOVES, ops.RMS_NORM, ops.ROTARY)
_ON_THE_WAY_TO_ACTIVATION = _MOVES
_BEHIND_ACTIVATION = (*_MOVES, aten.pow.Tensor_Scalar, aten.mul.Tensor)


@dataclass(frozen=True)
class Precision:
    """A site of a tower, and its scheme at every step of the schedule."""

    tower: str
    kind: str
    layer: int
    schemes: tuple[str, ...]
    prefix: str = UNQUANTIZED
    """Type in which the generator's attention gets keys and values of the prompt."""

    @property
    def site(self) -> str:
        return f"{self.tower}.{self.kind}[{self.layer}]"

    def at(self, step: int) -> str:
        """The scheme at ``step``; the reasoner has one for all."""
        return self.schemes[step if len(self.schemes) > 1 else 0]

    def __str__(self) -> str:
        runs = [(scheme, len(list(same))) for scheme, same in groupby(self.schemes)]
        schemes = ", ".join(scheme if count == 1 else f"{scheme} x{count}" for scheme, count in runs)
        return f"{self.site}: {schemes}" + (f"; prefix {self.prefix}" if self.prefix != UNQUANTIZED else "")


class AssignPrecision(Pass):
    """Every linear of a layer, and every attention, is told its scheme for each step. Nothing else changes.

    Sites follow from dataflow. The generator is the loop's body; the reasoner is the graph that hands it what changes
    with the prompt. A linear whose result comes to attention through norms, rotations and moves is ``attention.qkv``,
    one that reads attention's result ``attention.out``, one that an activation reads ``mlp.gate_up``, one that reads an
    activation ``mlp.down``; anything else (heads, embeddings of time) has no scheme. The layer is the number of
    attentions before the site. The label is on the weight, and on the attention itself, and outlives copies; that of
    the generator's attention says in which type keys and values of the prompt come, ``attention.kv`` of the reasoner.
    A program that has labels keeps its sites, and they get their schemes anew: once the loop is closed they would not
    be found again.
    Refused: a linear that is two of these, as its one weight would need two schemes (CX220).
    Numerical effect: none.
    """

    name = "assign_precision"
    law = "labels only: what each product is, and its scheme at each step"
    effect = Effect.LABELS
    phase = "sites"

    def __init__(self, over_steps: OverSteps, towers: Mapping[str, str] | None = None) -> None:
        """``towers``: checkpoint tensor → ``und`` or ``gen``, as the reader of checkpoints says; None: not compared."""
        self._over_steps = over_steps
        self._towers = towers

    @classmethod
    def made(cls, options: PassOptions) -> Pass | None:
        return None if options.over_steps is None else cls(options.over_steps, options.towers)

    def ensures(self, program: Program) -> None:
        """Dataflow and the reader of checkpoints agree on the tower of every site (InternalError CX360)."""
        wrong = [] if self._towers is None else misplaced(program, self._towers)
        if wrong:
            raise InternalError("CX360", f"sites are given to the wrong tower: {'; '.join(wrong[:3])}")

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        known = [(node, node.meta["precision"]) for g in program.graphs.values() for node in g.nodes if _labelled(node)]
        for owner, label in known:
            self._label(owner, label.tower, label.kind, label.layer, result)
        for tower, graph in towers_of(program).items() if not known else ():
            depth: dict[Node, int] = {}
            for node in graph.nodes:
                inputs = [depth[n] for n in node.all_input_nodes]
                depth[node] = max(inputs, default=0) + int(is_op(node, *_ATTENTION))
            for node in graph.calls(aten.linear.default, *_ATTENTION):
                if is_op(node, aten.linear.default) and not is_weight(node.args[1]):
                    result.decline(node, "its weight is computed")
                    continue
                kind = CORE if is_op(node, *_ATTENTION) else self._kind(program, graph, node)
                if kind is None:
                    result.decline(node, "no part of a layer")
                    continue
                layer = depth[node] - int(kind != QKV)
                self._label(node if kind == CORE else node.args[1], tower, kind, layer, result)
        return result

    def _label(self, owner: Node, tower: str, kind: str, layer: int, result: PassResult) -> None:
        found = Precision(tower, kind, layer, self._over_steps(tower, kind, layer))
        if tower == GEN and kind == CORE:
            found = replace(found, prefix=self._over_steps(UND, PROMPT_KV, layer)[0])
        if owner.meta.get("precision") != found:
            owner.meta["precision"] = found
            result.changes[f"{tower}.{kind}"] += 1

    def _kind(self, program: Program, graph: Graph, node: Node) -> str | None:
        found = [
            kind
            for kind, holds in (
                (QKV, _reaches(program, graph, node, _ATTENTION, _ON_THE_WAY_TO_ATTENTION)),
                (OUT, _follows(node, _ATTENTION, _MOVES)),
                (GATE_UP, _reaches(program, graph, node, _ACTIVATIONS, _ON_THE_WAY_TO_ACTIVATION)),
                (DOWN, _follows(node, _ACTIVATIONS, _BEHIND_ACTIVATION)),
            )
            if holds
        ]
        if len(found) > 1:
            raise CannotApply(self.name, node, f"is {' and '.join(found)} at once")
        return found[0] if found else None


def _labelled(node: Node) -> bool:
    return "precision" in node.meta and (is_weight(node) or is_op(node, *_ATTENTION))


def misplaced(program: Program, towers: Mapping[str, str]) -> list[str]:
    """Sites whose tower by dataflow differs from that of their checkpoint tensors in ``towers``, described."""
    found = []
    for graph in program.graphs.values():
        for node in graph.weights.values():
            precision: Precision | None = node.meta.get("precision")
            if precision is None:
                continue
            wrong = [key for key in node.meta["weight"].keys if towers.get(key) != precision.tower]
            found += [f"{precision.site}: {key} is of the {towers.get(key, 'unknown')} tower" for key in wrong[:1]]
    return found


def towers_of(program: Program) -> dict[str, Graph]:
    """The graphs of the two towers, where they have been split."""
    body = program.graphs[program.loop.body]
    rates = rates_of(program, body)
    found = {e.source: UND for e in program.edges_into(body.name) if rates[body.inputs[e.input]].follows_prompt}
    return {tower: program.graphs[name] for name, tower in (*found.items(), (body.name, GEN))}


def _reaches(program: Program, graph: Graph, node: Node, ends: Collection[object], through: Collection[object]) -> bool:
    """The value of ``node`` comes to one of ``ends`` by operations of ``through`` alone, over edges too."""
    stack, seen = list(_readers(program, graph, node)), set[Node]()
    while stack:
        where, reader = stack.pop()
        if is_op(reader, *ends):
            return True
        if reader not in seen and (is_op(reader, *through) or reader.op == "placeholder"):
            seen.add(reader)
            stack += _readers(program, where, reader)
    return False


def _readers(program: Program, graph: Graph, node: Node) -> Iterator[tuple[Graph, Node]]:
    yield from ((graph, user) for user in node.users if user.op != "output")
    for edge in program.edges:
        if edge.source == graph.name and graph.outputs[edge.output] is node:
            target = program.graphs[edge.target]
            yield target, target.inputs[edge.input]


def _follows(node: Node, starts: Collection[object], through: Collection[object]) -> bool:
    """Whether the input of ``node`` comes from one of ``starts`` by operations of ``through`` alone."""
    stack, seen = [node.args[0]], set[Node]()
    while stack:
        current = stack.pop()
        if is_op(current, *starts):
            return True
        if current not in seen and is_op(current, *through):
            seen.add(current)
            stack += current.all_input_nodes
    return False
