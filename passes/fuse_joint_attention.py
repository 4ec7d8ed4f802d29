"""Attention over generated and prompt rows together, without a copy of the prompt's."""

from __future__ import annotations

from cosmos_export.ir import ops
from cosmos_export.ir.dims import equal
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.ir.rates import rates_of
from cosmos_export.ir.spec import Rate
from cosmos_export.passes.base import Pass, PassResult


class FuseJointAttention(Pass):
    """``attention(q, cat(K', K), cat(V', V))`` becomes ``joint_attention(q, K, V, K', V')``.

    K', V' are what the loop does not change (the prompt's), K, V what it does. Full attention does not depend on the
    order of its keys, so the fused operation puts the prompt last, where its padding can be masked by a length.
    Left alone: causal attention, joins of other than two parts, keys and values that are joined differently, parts of
    which neither or both change in the loop.
    Numerical effect: the order of summation over keys (≤ 1e-6 in fp32).
    """

    name = "fuse_joint_attention"
    law = "attention over joined keys does not depend on their order"
    phase = "towers"
    after = ("merge_linears",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        graph = program.graphs[program.loop.body]
        rates = rates_of(program, graph)
        for node in graph.calls(ops.ATTENTION):
            self._fuse(graph, node, rates, result)
        graph.eliminate_dead_code()
        return result

    def _fuse(self, graph: Graph, node: Node, rates: dict[Node, Rate], result: PassResult) -> None:
        query, key, value, causal, scale = node.args
        if not (_joins_rows(key) and _joins_rows(value)):
            result.decline(node, "its keys and values are not joined from parts")
            return
        keys, values = (list(n.args[0]) for n in (key, value))
        changing, values_changing = ([rates[part] >= Rate.STEP for part in parts] for parts in (keys, values))
        if causal or sorted(changing) != [False, True] or len(values) != 2:
            result.decline(node, "causal, or not one part that changes in the loop and one that does not")
            return
        if values_changing != changing:
            result.decline(node, "keys and values are joined in different orders")
            return
        if not all(equal(spec_of(k).shape[0], spec_of(v).shape[0]) for k, v in zip(keys, values, strict=True)):
            result.decline(node, "keys and values are joined from parts of different lengths")
            return
        own, prefix = changing.index(True), changing.index(False)
        new = graph.call(
            ops.JOINT_ATTENTION, query, keys[own], values[own], keys[prefix], values[prefix], scale,
            before=node, like=node, by=self.name,
        )  # fmt: skip
        graph.replace(node, new)
        result.changes["joint attentions"] += 1


def _joins_rows(value: Node) -> bool:
    return is_op(value, aten.cat.default) and ops.axis_of(value.args[1] if len(value.args) > 1 else 0, 3) == 0
