"""Residual sum, RMS norm and FP8 quantization in one operation."""

from __future__ import annotations

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, spec_of
from cosmos_export.ir.match import Any_, Call, OneOf, match
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.kernels.description import NORM_QUANTIZE
from cosmos_export.passes.base import PassResult
from cosmos_export.passes.fusing import KernelPass, fuse, place, same

WIDEST = 65_536
"""Elements of a row that one program of the kernel holds."""

_NORM = Call(ops.RMS_NORM, Any_("x"), Any_("weight"), Any_("eps"), name="norm", sole=True)
_PATTERN = Call(ops.QUANTIZE, OneOf(Call(aten._to_copy.default, _NORM, name="value", sole=True), _NORM), Any_("scale"))
_SUM = Call(aten.add.Tensor, Any_("a"), Any_("b"))


class FuseNormQuantize(KernelPass):
    """``quantize(rms_norm(x [+ delta]))`` becomes one operation, with the sum where both of its sides have its shape.

    Conditions: rows [N, width] of at most 65,536; the norm is quantized and read by nothing else; it is rounded to the
    type of ``x``; the scale is one number; what the sum is made of is there before anything reads it.
    Numerical effect: none, the same operations in the same order of rounding.
    """

    name = "fuse_norm_quantize"
    law = "quantize(rms_norm(x + delta)) = one operation, which returns the sum as well"
    kernel = NORM_QUANTIZE
    after = ("fuse_qkv_pack",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            for node in graph.calls(ops.QUANTIZE):
                self._fuse(graph, node, result)
            graph.eliminate_dead_code()
        return result

    def _fuse(self, graph: Graph, node: Node, result: PassResult) -> None:
        found = match(_PATTERN, node)
        if found is None:
            return
        x, norm, scale = found["x"], found["norm"], found["scale"]
        spec = spec_of(x)
        if spec_of(found.get("value", norm)).dtype != spec.dtype or spec.rank != 2 or spec_of(scale).rank:
            result.decline(node, "its norm is of other than rows, rounded to another type, or scaled by rows")
            return
        width = spec.shape[1]
        if not isinstance(width, int) or width > WIDEST:
            result.decline(node, f"its rows are wider than {WIDEST}")
            return
        rest = (found["weight"], found["eps"], scale)
        sides = match(_SUM, x)
        if sides is not None and all(isinstance(s, Node) and same(s, x) for s in sides.values()):
            parts = (sides["a"], sides["b"], *rest)
            at = place(graph, parts, [*(set(x.users) - {norm}), node])
            if at is not None:
                fuse(graph, at, ops.ADD_NORM_QUANTIZE, parts, (node, x), self.name)
                result.changes["sums, norms and quantizations"] += 1
                return
        fuse(graph, node, ops.NORM_QUANTIZE, (x, *rest), (node,), self.name, one=True)
        result.changes["norms and quantizations"] += 1
