"""One matrix product where several read the same value."""

from __future__ import annotations

from collections import defaultdict

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, is_op, is_weight, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Transform, WeightBinding
from cosmos_export.passes.base import Pass, PassResult


class MergeLinears(Pass):
    """Parallel linears become one with their weights stacked, followed by the parts of its result.

        x·Aᵀ, x·Bᵀ, x·Cᵀ  →  y = x·[A; B; C]ᵀ,  y[:, :a], y[:, a:a+b], y[:, a+b:]

    Gate and up of one gated activation are interleaved (g0, u0, g1, u1 …): the builder keeps an interleaved constant
    as it is, and copies half of a stacked one. The stacking is recorded in the weight binding; no data moves here.
    Not merged: linears of different values, types or with and without bias; weights that are transformed already.
    Numerical effect: each element is the same sum; a GEMM of another width may order it differently (≤ 1e-6 in fp32).
    """

    name = "merge_linears"
    law = "x·Aᵀ, x·Bᵀ = parts of x·[A; B]ᵀ"
    phase = "towers"
    # A query that needs fewer rows than its key is not merged with it.
    after = ("slice_outputs",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            groups: dict[Node, list[Node]] = defaultdict(list)
            for node in graph.calls(aten.linear.default):
                groups[node.args[0]].append(node)
            for group in groups.values():
                if len(group) > 1:
                    self._merge(graph, group, result)
            graph.eliminate_dead_code()
        result.changes = +result.changes
        return result

    def _merge(self, graph: Graph, group: list[Node], result: PassResult) -> None:
        plain = [n for n in group if len(n.args) == 2 and _is_plain(n.args[1]) and len(n.args[1].users) == 1]
        for node in group:
            if node not in plain:
                result.decline(node, "reads the same value, but has a bias or a weight that is shared or transformed")
        if len(plain) < 2:
            return
        gated = _gate_and_up(plain)
        ordered = list(gated) if gated else plain
        bindings: list[WeightBinding] = [n.args[1].meta["weight"] for n in ordered]
        transform = Transform.INTERLEAVE if gated else Transform.CONCATENATE
        binding = bindings[0].merged(tuple(bindings[1:]), transform)
        name = "_".join([ordered[0].args[1].name, "merged"])
        weight = graph.add_weight(name, binding, module=ordered[0].meta["module"])
        first = plain[0]
        merged = graph.call(
            aten.linear.default, ordered[0].args[0], weight, before=first, like=ordered[0], by=self.name
        )
        sizes = [spec_of(n).shape[-1] for n in ordered]
        axis = spec_of(merged).rank - 1
        if gated:
            shape = [*spec_of(merged).shape[:-1], sizes[0], 2]
            pairs = graph.call(aten.view.default, merged, shape, before=first, like=merged, by=self.name)
            parts = [graph.call(aten.select.int, pairs, axis + 1, i, before=first, like=n, by=self.name)
                     for i, n in enumerate(ordered)]  # fmt: skip
            result.changes["gate and up"] += 1
        else:
            offset, parts = 0, []
            for node, size in zip(ordered, sizes, strict=True):
                end = offset + int(size)
                part = graph.call(aten.slice.Tensor, merged, axis, offset, end, before=first, like=node, by=self.name)
                parts.append(part)
                offset = end
            result.changes[f"{len(ordered)} parallel linears"] += 1
        for node, part in zip(ordered, parts, strict=True):
            graph.replace(node, part)


def _is_plain(weight: object) -> bool:
    return isinstance(weight, Node) and is_weight(weight) and weight.meta["weight"].transform is Transform.IDENTITY


def _gate_and_up(group: list[Node]) -> tuple[Node, Node] | None:
    """The two linears of one gated activation, gate first."""
    if len(group) != 2:
        return None
    for gate, up in (group, group[::-1]):
        for user in gate.users:
            if is_op(user, ops.SWIGLU) and user.args == (gate, up) and len(gate.users) == len(up.users) == 1:
                return gate, up
    return None
