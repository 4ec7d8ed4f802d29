"""Arithmetic on elements."""

from __future__ import annotations

from typing import Any

import torch

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Node, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.targets.onnx.model import ModelBuilder
from cosmos_export.targets.onnx.rules.table import rule


def _binary(kind: str, *targets: Any) -> None:
    @rule(*targets)
    def write(low: ModelBuilder, node: Node) -> str:
        dtype = spec_of(node).dtype
        return low.op(kind, *(low.operand(a, dtype) for a in node.args))


def _unary(kind: str, *targets: Any) -> None:
    @rule(*targets)
    def write(low: ModelBuilder, node: Node) -> str:
        return low.op(kind, low.values[node.args[0]])


_binary("Add", aten.add.Tensor)
_binary("Sub", aten.sub.Tensor)
_binary("Mul", aten.mul.Tensor)
_binary("Div", aten.div.Tensor)
_unary("Cos", aten.cos.default)
_unary("Sin", aten.sin.default)
_unary("Exp", aten.exp.default)
_unary("Neg", aten.neg.default)
_unary("Relu", aten.relu.default)
_unary("Reciprocal", aten.reciprocal.default)


def _silu(low: ModelBuilder, name: str) -> str:
    return low.op("Mul", name, low.op("Sigmoid", name))


@rule(aten.silu.default)
def _silu_alone(low: ModelBuilder, node: Node) -> str:
    return _silu(low, low.values[node.args[0]])


@rule(ops.SWIGLU)
def _swiglu(low: ModelBuilder, node: Node) -> str:
    gate, up = (low.values[a] for a in node.args)
    return low.op("Mul", _silu(low, gate), up)


@rule(aten.pow.Tensor_Scalar)
def _pow(low: ModelBuilder, node: Node) -> str:
    x, exponent = node.args
    name = low.values[x]
    return low.op("Mul", name, name) if exponent == 2 else low.op("Pow", name, low.scalar(exponent, torch.float32))


@rule(aten.clamp.default, aten.clamp_min.default)
def _clamp(low: ModelBuilder, node: Node) -> str:
    x, *bounds = node.args
    dtype = spec_of(node).dtype
    return low.op("Clip", low.values[x], *(low.scalar(bound, dtype) for bound in bounds))


@rule(aten.where.self)
def _where(low: ModelBuilder, node: Node) -> str:
    return low.op("Where", *(low.values[a] for a in node.args))


@rule(aten._to_copy.default)
def _convert(low: ModelBuilder, node: Node) -> str:
    source: Node = node.args[0]
    return low.cast(low.values[source], spec_of(source).dtype, spec_of(node).dtype)
