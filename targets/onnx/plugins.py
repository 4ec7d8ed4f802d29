"""This project's kernels in models for TensorRT: what each stands for is found by dataflow, and becomes one node.

The rewrites are passes (phase `kernels` of `passes.pipeline`); joint attention is an operation by itself. A node is
called like the form of the kernel that it runs, in the domain `kernels.description.NAMESPACE`, and is made ahead of
time (``aot``). Models for a CPU have none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import helper

from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, is_op, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.kernels.description import (
    ACTIVATION_QUANTIZE,
    JOINT_ATTENTION,
    NAMESPACE,
    NORM_QUANTIZE,
    PLUGINS,
    QKV_PACK,
    SAMPLER_STEP,
)
from cosmos_export.targets.onnx.model import ModelBuilder

if TYPE_CHECKING:
    from cosmos_export.kernels.plugins import Form

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_NARROW = (torch.bfloat16, torch.float16)
_ALIGNED = 16
"""FP8 values are stored transposed, in rows of a multiple of this many."""


class Plugins:
    """The kernels that models are to use, and the forms of them that they do."""

    def __init__(self, kernels: Collection[str], fuse: Callable[[Graph], Graph]) -> None:
        """``fuse``: a graph with the operations of kernels in the place of what they compute."""
        self.kernels = tuple(kernels)
        self.forms: dict[str, Form] = {}
        self._fuse = fuse
        self._fused: dict[Graph, Graph] = {}

    def fused(self, graph: Graph) -> Graph:
        """``graph`` with the operations of kernels in the place of what they compute."""
        if graph not in self._fused:
            self._fused[graph] = self._fuse(graph)
        return self._fused[graph]

    def rule(self, node: Node) -> Callable[[ModelBuilder, Node], str] | None:
        """How ``node`` becomes a plugin; None where it does not."""
        if JOINT_ATTENTION in self.kernels and is_op(node, *ops.having(ops.Trait.JOINT)):
            return self._joint_attention if _attends(node) else None
        return self._rules.get(node.target)

    def require_places(self, graphs: Iterable[Graph]) -> None:
        """UnsupportedError (CX458) where no graph has a place for a kernel that was asked for."""
        switches: Mapping[Any, str] = {
            self._joint_attention: JOINT_ATTENTION, self._norm_quantize: NORM_QUANTIZE, self._qkv_pack: QKV_PACK,
            self._activation_quantize: ACTIVATION_QUANTIZE, self._unipc_step: SAMPLER_STEP,
        }  # fmt: skip
        found = {switches.get(self.rule(node)) for graph in graphs for node in self.fused(graph).calls()}
        missing = [name for name in self.kernels if name not in found]
        if missing:
            raise UnsupportedError(
                "CX458",
                f"the model has no place for {', '.join(missing)}: " + "; ".join(PLUGINS[name] for name in missing),
                "leave it out of `--kernels`; quantization kernels need a recipe with FP8 products, the sampler "
                "`--loop device`",
            )

    @cached_property
    def _rules(self) -> Mapping[Any, Callable[[ModelBuilder, Node], str]]:
        return {
            ops.NORM_QUANTIZE: self._norm_quantize,
            ops.ADD_NORM_QUANTIZE: self._norm_quantize,
            ops.ACTIVATION_QUANTIZE: self._activation_quantize,
            ops.QKV_PACK: self._qkv_pack,
            ops.UNIPC_STEP: self._unipc_step,
            ops.ITEM: _part,
        }

    def _call(
        self, low: ModelBuilder, node: Node, kernel: str, inputs: Sequence[str], results: int, **settings: Any
    ) -> str:
        """A node of the form of ``kernel`` with ``settings``; the name of its first result."""
        from cosmos_export.kernels.plugins import Form

        form = Form(kernel, tuple(sorted(settings.items())))
        self.forms[form.name] = form
        low.domains.add(NAMESPACE)
        names = [f"{node.name}_plugin_{i}" for i in range(results)]
        attributes = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
        low.nodes.append(
            helper.make_node(form.name, list(inputs), names, name=names[0], domain=NAMESPACE, **attributes)
        )
        low.parts[node] = names
        return names[0]

    # -- one kernel each ----------------------------------------------------------------------------------------------

    def _joint_attention(self, low: ModelBuilder, node: Node) -> str:
        query, key, value, prefix_key, prefix_value, *rest = node.args
        heads, size = (int(n) for n in spec_of(query).shape[1:])
        settings = {"kind": _KINDS[spec_of(query).dtype], "heads": heads, "kv_heads": int(spec_of(key).shape[1])}
        names = [low.values[a] for a in (query, key, value, prefix_key, prefix_value)]
        if is_op(node, ops.JOINT_ATTENTION):
            narrow, scale = False, float(rest[0])
        else:
            names, narrow, scale = self._quantized(low, node, names), True, 1.0
        return self._call(low, node, "joint_attention", names, 1, size=size, scale=scale, narrow=narrow, **settings)

    def _quantized(self, low: ModelBuilder, node: Node, names: Sequence[str]) -> list[str]:
        """Operands of FP8 attention: the query with its factor, keys, values transposed, and a scale for each head."""
        query, key, _, prefix_key, prefix_value, scales, scale = node.args
        steps = [float(s) for s in scales.meta["constant"]]
        scaled = low.op("Mul", names[0], low.scalar(scale, spec_of(query).dtype))
        q, k = low.quantized(scaled, steps[0]), low.quantized(names[1], steps[1])
        v = low.quantized(_transposed(low, names[2]), steps[2])
        with low.beside(prefix_key):
            pk = low.quantized(names[3], steps[1])
        with low.beside(prefix_value):
            pv = low.quantized(_transposed(low, names[4]), steps[2])
        counts = (spec_of(query).shape[1], spec_of(key).shape[1], spec_of(key).shape[1])
        of_heads = [
            low.constant(np.full(int(count), step, dtype=np.float32), "scales")
            for count, step in zip(counts, steps, strict=True)
        ]
        return [q, k, v, pk, pv, *of_heads]

    def _norm_quantize(self, low: ModelBuilder, node: Node) -> str:
        *operands, eps, scale = node.args
        x, weight = operands[0], operands[-1]
        names = [low.values[a] for a in (*operands, scale)]
        return self._call(
            low, node, "norm_quantize", names, len(operands) - 1,
            kind=_KINDS[spec_of(x).dtype], weight=_KINDS[spec_of(weight).dtype], width=int(spec_of(x).shape[1]),
            eps=float(eps), add=len(operands) == 3,
        )  # fmt: skip

    def _activation_quantize(self, low: ModelBuilder, node: Node) -> str:
        x, up, scale = node.args
        width = int(spec_of(x).shape[1])
        source, offset, step = _columns(x)
        if up is not None:
            other, up_offset, other_step = _columns(up)
            if other is not source or other_step != step:
                source, offset, step, other, up_offset = x, 0, 1, up, 0
        else:
            other, up_offset = source, offset
        return self._call(
            low, node, "activation_quantize", [low.values[a] for a in (source, other, scale)], 1,
            kind=_KINDS[spec_of(x).dtype], width=width, stride=_stride(source), step=step, offset=offset,
            up_offset=up_offset, gated=up is not None,
        )  # fmt: skip

    def _qkv_pack(self, low: ModelBuilder, node: Node) -> str:
        query, key, _, q_weight, k_weight, cos, sin, eps = node.args
        merged, _, _ = _columns(query)
        size = 2 * int(spec_of(cos).shape[1])
        names = [low.values[a] for a in (merged, q_weight, k_weight, cos, sin)]
        return self._call(
            low, node, "qkv_pack", names, 3,
            kind=_KINDS[spec_of(query).dtype], weight=_KINDS[spec_of(q_weight).dtype], table=_KINDS[spec_of(cos).dtype],
            stride=_stride(merged), heads=int(spec_of(query).shape[1]) // size,
            kv_heads=int(spec_of(key).shape[1]) // size, size=size, eps=float(eps),
        )  # fmt: skip

    def _unipc_step(self, low: ModelBuilder, node: Node) -> str:
        row, cond, uncond, *state, masks, axes = node.args
        operands = [row, cond, cond if uncond is None else uncond, *state, *masks, *[row] * (2 - len(masks))]
        return self._call(
            low, node, "unipc_step", [low.values[a] for a in operands], 3,
            kind=_KINDS[spec_of(cond).dtype], masks=tuple(_KINDS[spec_of(mask).dtype] for mask in masks),
            rank=spec_of(cond).rank, axes=tuple(axes), guided=uncond is not None,
        )  # fmt: skip


def _transposed(low: ModelBuilder, x: str) -> str:
    """[rows, heads, d] as [heads, d, rows] with rows up to a multiple of 16, the new ones zeros."""
    rows = low.op("Shape", x, start=0, end=1)
    multiple = low.ints([_ALIGNED])
    rest = low.op("Mod", low.op("Sub", multiple, low.op("Mod", rows, multiple)), multiple)
    pads = low.op("Concat", low.ints([0, 0, 0]), rest, low.ints([0, 0]), axis=0)
    return low.op("Transpose", low.op("Pad", x, pads), perm=[1, 2, 0])


def _attends(node: Node) -> bool:
    """The kernel attends over heads of that size in that type."""
    query = spec_of(node.args[0])
    size = int(query.shape[2])
    return query.dtype in _NARROW and size >= 16 and size & (size - 1) == 0


def _columns(x: Node) -> tuple[Node, int, int]:
    """The tensor with contiguous rows that ``x`` is columns of, the first column, and the distance of columns.

    Of a merged projection gate and up are either halves or every other column, as a view of pairs.
    """
    if is_op(x, aten.slice.Tensor) and x.args[1] in (1, -1) and spec_of(x).rank == 2:
        source, _, start, _, *step = x.args
        return source, int(start), int(step[0]) if step else 1
    if is_op(x, aten.select.int) and spec_of(x).rank == 2 and is_op(x.args[0], aten.view.default):
        pairs, axis, index = x.args
        apart = int(spec_of(pairs).shape[2])
        if axis in (2, -1) and spec_of(pairs).rank == 3 and spec_of(pairs.args[0]).rank == 2:
            return pairs.args[0], int(index), apart
    return x, 0, 1


def _stride(x: Node) -> int:
    return int(spec_of(x).shape[1])


def _part(low: ModelBuilder, node: Node) -> str:
    """One of the results of a plugin."""
    made, index = node.args
    name: str = low.parts[made][index]
    return name
