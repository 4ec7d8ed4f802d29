"""Products of matrices."""

from __future__ import annotations

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir.graph import Node, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.targets.onnx.model import ModelBuilder, gemm_name
from cosmos_export.targets.onnx.rules.table import rule


@rule(aten.linear.default)
def _linear(low: ModelBuilder, node: Node) -> str:
    x, weight, *bias = node.args
    inputs = [low.values[x], low.values[weight], *(low.values[b] for b in bias if b is not None)]
    if spec_of(x).rank != 2:
        raise InternalError("CX230", f"`{node.name}`: a linear of rows is [N, in], not {spec_of(x)}")
    return low.op("Gemm", *inputs, label=gemm_name(node), transB=1)


@rule(aten.matmul.default)
def _matmul(low: ModelBuilder, node: Node) -> str:
    return low.op("MatMul", *(low.values[a] for a in node.args))
