"""An activation and its FP8 quantization in one operation."""

from __future__ import annotations

from cosmos_export.ir import ops
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.match import Any_, Call, OneOf, match
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.kernels.description import ACTIVATION_QUANTIZE
from cosmos_export.passes.base import PassResult
from cosmos_export.passes.fusing import KernelPass, fuse

_RELU = Call(aten.relu.default, Any_("gate"), name="relu")
_PATTERN = Call(
    ops.QUANTIZE,
    OneOf(
        Call(ops.SWIGLU, Any_("gate"), Any_("up"), sole=True),
        Call(aten.pow.Tensor_Scalar, _RELU, 2, sole=True),
        Call(aten.mul.Tensor, _RELU, _RELU, sole=True),
    ),
    Any_("scale"),
)


class FuseActivationQuantize(KernelPass):
    """``quantize(swiglu(gate, up))`` and ``quantize(relu(x)²)`` become one operation.

    Conditions: rows [N, width]; the activation is quantized and read by nothing else; the scale is one number.
    Numerical effect: none, the same operations in the same order of rounding.
    """

    name = "fuse_activation_quantize"
    law = "quantize(swiglu(gate, up)), quantize(relu(x)²) = one operation"
    kernel = ACTIVATION_QUANTIZE
    after = ("fuse_norm_quantize",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            for node in graph.calls(ops.QUANTIZE):
                found = match(_PATTERN, node)
                if found is None:
                    continue
                if spec_of(found["gate"]).rank != 2 or spec_of(found["scale"]).rank:
                    result.decline(node, "its activation is of other than rows, or scaled by rows")
                    continue
                operands = (found["gate"], found.get("up"), found["scale"])
                fuse(graph, node, ops.ACTIVATION_QUANTIZE, operands, (node,), self.name, one=True)
                result.changes["activations and quantizations"] += 1
            graph.eliminate_dead_code()
        return result
