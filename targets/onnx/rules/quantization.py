"""Quantized numbers. Scales are float32 and exact; the type of a result is stated, so that the builder sees one type
around a product. With the scale in bf16 instead, a weight or an activation is off by up to 0.4 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper

from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size
from cosmos_export.ir.graph import Node, spec_of
from cosmos_export.ir.packing import E2M1_MAX, E2M1_VALUES, E4M3_MAX, NVFP4_BLOCK, SMALLEST_BLOCK_SCALE
from cosmos_export.targets.onnx.model import ModelBuilder
from cosmos_export.targets.onnx.rules.table import rule
from cosmos_export.targets.onnx.weights import numpy_dtype

_TRT = "trt"
"""Domain of TensorRT's own operations."""


@rule(ops.QUANTIZE)
def _quantize(low: ModelBuilder, node: Node) -> str:
    x, scale = (low.values[a] for a in node.args)
    zero = np.zeros((), dtype=numpy_dtype(torch.float8_e4m3fn))
    return low.op("QuantizeLinear", x, scale, low.constant(zero, "zero"))


@rule(ops.DEQUANTIZE)
def _dequantize(low: ModelBuilder, node: Node) -> str:
    x, scale, dtype = node.args
    return widened(low, low.values[x], low.values[scale], dtype, rows=spec_of(scale).rank == 1)


def widened(low: ModelBuilder, x: str, scale: str, dtype: torch.dtype, *, rows: bool = False) -> str:
    """``rows``: one scale for each row of ``x``."""
    wide = low.dtype(dtype) == torch.float32
    attributes: dict[str, Any] = {} if wide else {"output_dtype": low.type_of(dtype)}
    if rows:
        attributes["axis"] = 0
    return low.op("DequantizeLinear", x, scale, **attributes)


@rule(ops.DEQUANTIZE_GROUPS)
def _dequantize_groups(low: ModelBuilder, node: Node) -> str:
    # The scale has the type of the result here: with another one the builder finds no INT4 product.
    x, scale = node.args
    group = int(spec_of(x).shape[1]) // int(spec_of(scale).shape[1])
    return low.op("DequantizeLinear", low.values[x], low.values[scale], axis=1, block_size=group)


@rule(ops.DEQUANTIZE_BLOCKS)
def _dequantize_blocks(low: ModelBuilder, node: Node) -> str:
    x, blocks, scale, dtype = node.args
    if not low.portable:
        return _blocks(low, low.values[x], low.values[blocks], low.values[scale], dtype)
    wide = low.op("DequantizeLinear", low.values[blocks], low.values[scale])
    # Four-bit floats have no arithmetic in ONNX Runtime: the codes, two a byte, look up their values.
    codes = low.values[x]
    halves = [low.op("BitwiseAnd", codes, _byte(low, 15)), low.op("BitShift", codes, _byte(low, 4), direction="RIGHT")]
    axis = low.ints([-1])
    pairs = low.op("Concat", *(low.op("Unsqueeze", half, axis) for half in halves), axis=-1)
    indices = low.op("Cast", low.reshape(pairs, spec_of(x).shape), to=TensorProto.INT32)
    table = np.asarray([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=np.float32)
    values = low.op("Gather", low.constant(table, "e2m1"), indices)
    return _times_blocks(low, values, wide, spec_of(x).shape)


@rule(ops.REQUANTIZE_BLOCKS)
def _requantize_blocks(low: ModelBuilder, node: Node) -> str:
    x, scale = node.args
    shape, dtype = spec_of(x).shape, spec_of(x).dtype
    if not low.portable:
        low.domains.add(_TRT)
        inputs, outputs = [low.values[x], low.values[scale]], [f"{node.name}_fp4", f"{node.name}_fp4_scales"]
        form = {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
        name = f"{node.name}_quantize"
        low.nodes.append(helper.make_node("TRT_FP4DynamicQuantize", inputs, outputs, name=name, domain=_TRT, **form))
        return _blocks(low, outputs[0], outputs[1], low.values[scale], dtype)
    # The same arithmetic as the reference, in float32.
    number = partial(low.scalar, dtype=torch.float32)
    zero = low.constant(np.zeros((), dtype=numpy_dtype(torch.float8_e4m3fn)), "zero")
    blocked = low.reshape(low.values[x], [*shape[:-1], int(shape[-1]) // NVFP4_BLOCK, NVFP4_BLOCK])
    largest = low.op("ReduceMax", low.op("Abs", blocked), low.ints([-1]), keepdims=0)
    ratio = low.op("Div", largest, low.op("Mul", number(E2M1_MAX), low.values[scale]))
    ratio = low.op("Where", low.op("Greater", ratio, number(0.0)), ratio, number(1.0))
    # Not `Clip`: ONNX Runtime folds it into the quantization behind it, and knows no FP8 there.
    ratio = low.op("Min", low.op("Max", ratio, number(SMALLEST_BLOCK_SCALE)), number(E4M3_MAX))
    narrow = low.op("QuantizeLinear", ratio, number(1.0), zero)
    steps = low.op("Mul", low.op("Cast", narrow, to=TensorProto.FLOAT), low.values[scale])
    quotient = low.op("Div", blocked, low.op("Unsqueeze", steps, low.ints([-1])))
    size = low.op("Abs", quotient)
    unit = low.op("Where", low.op("Less", size, number(4.0)), number(1.0), number(2.0))
    unit = low.op("Where", low.op("Less", size, number(2.0)), number(0.5), unit)
    rounded = low.op("Min", low.op("Mul", low.op("Round", low.op("Div", size, unit)), unit), number(E2M1_MAX))
    values = low.op("Mul", rounded, low.op("Sign", quotient))
    return low.reshape(low.op("Mul", values, low.op("Unsqueeze", steps, low.ints([-1]))), shape)


def _blocks(low: ModelBuilder, values: str, blocks: str, scale: str, dtype: torch.dtype) -> str:
    """Four-bit floats as ``dtype``. A cast, since with `output_dtype` in its place the builder refuses the scales."""
    wide = low.cast(low.op("DequantizeLinear", blocks, scale), torch.float32, dtype)
    return low.op("DequantizeLinear", values, wide, axis=-1, block_size=NVFP4_BLOCK)


def _times_blocks(low: ModelBuilder, values: str, blocks: str, shape: Sequence[Size]) -> str:
    blocked = low.reshape(values, [*shape[:-1], int(shape[-1]) // NVFP4_BLOCK, NVFP4_BLOCK])
    return low.reshape(low.op("Mul", blocked, low.op("Unsqueeze", blocks, low.ints([-1]))), shape)


def _byte(low: ModelBuilder, value: int) -> str:
    return low.constant(np.asarray(value, dtype=np.uint8), "byte")
