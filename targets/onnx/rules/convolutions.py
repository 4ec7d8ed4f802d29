"""Convolutions, and the padding that they do themselves."""

from __future__ import annotations

from typing import Any

import torch

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size
from cosmos_export.ir.graph import Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.targets.onnx.model import ModelBuilder
from cosmos_export.targets.onnx.rules.table import rule

_CONVOLUTIONS = ops.having(ops.Trait.CONVOLUTION)


def _operands(node: Node, *defaults: Any) -> list[Any]:
    """All operands of ``node``, those it leaves out as their defaults."""
    return [*node.args, *defaults[len(node.args) :]]


def _is_zero_frame(node: Node) -> bool:
    """``node`` pads spatial axes with zeros, and only convolutions read it: they can pad themselves."""
    pad, value = node.args[1:]
    plain = value == 0 and all(isinstance(p, int) and p >= 0 for p in pad) and len(pad) <= 2 * (spec_of(node).rank - 2)
    return plain and all(is_op(user, *_CONVOLUTIONS) and user.args[0] is node for user in node.users)


@rule(*_CONVOLUTIONS)
def _convolution(low: ModelBuilder, node: Node) -> str:
    x, weight, bias, stride, padding, dilation, groups = _operands(node, None, None, None, [1], [0], [1], 1)
    axes = spec_of(node).rank - 2
    before, after = ops.spatial(padding, axes), ops.spatial(padding, axes)
    if is_op(x, aten.constant_pad_nd.default) and _is_zero_frame(x):
        frame = x.args[1]
        for i in range(len(frame) // 2):  # pairs count from the last axis
            before[axes - 1 - i] += frame[2 * i]
            after[axes - 1 - i] += frame[2 * i + 1]
    inputs = [low.values[n] for n in (x, weight, bias) if n is not None]
    steps: dict[str, Any] = {"strides": ops.spatial(stride, axes), "dilations": ops.spatial(dilation, axes)}
    return low.op("Conv", *inputs, pads=[*before, *after], group=groups, **steps)


@rule(aten.conv_transpose1d.default)
def _transposed_convolution(low: ModelBuilder, node: Node) -> str:
    x, weight, bias, stride, padding, output_padding, _, dilation = _operands(
        node, None, None, None, [1], [0], [0], 1, [1]
    )
    # TensorRT-RTX 1.7 has no transposed convolution in bf16 (its type inference fails), only in fp32 and fp16.
    inputs = [low.operand(n, torch.float32) for n in (x, weight, bias) if n is not None]
    attributes: dict[str, Any] = {
        "strides": stride,
        "pads": padding * 2,
        "output_padding": output_padding,
        "dilations": dilation,
    }
    result = low.op("ConvTranspose", *inputs, **attributes)
    return low.cast(result, torch.float32, spec_of(node).dtype)


@rule(aten.constant_pad_nd.default)
def _pad(low: ModelBuilder, node: Node) -> str:
    x, pad, value = node.args
    if _is_zero_frame(node):
        return low.values[x]
    pairs: list[Size] = list(pad)
    rank = spec_of(node).rank
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    for i in range(len(pairs) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pairs[2 * i], pairs[2 * i + 1]
    return low.op("Pad", low.values[x], low.ints([*before, *after]), low.scalar(value, spec_of(node).dtype))
