"""A value in the place of the negative of its negative."""

from __future__ import annotations

from cosmos_export.ir.graph import is_op
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.passes.base import Pass, PassResult


class DropDoubleNegation(Pass):
    """A value is read instead of the negative of its negative.

        −(−x)  →  x

    Not applied: a single negation. A negative that something else reads as well stays for that reader.
    Numerical effect: none, a sign is one bit.
    """

    name = "drop_double_negation"
    law = "−(−x) = x"
    phase = "towers"
    after = ("fold_schedule",)
    before = ("slice_outputs",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            for node in graph.calls(aten.neg.default):
                inner = node.args[0]
                if is_op(inner, aten.neg.default):
                    graph.replace(node, inner.args[0])
                    result.changes["double negations"] += 1
            graph.eliminate_dead_code()
        return result
