"""Quantized matrix products, in the patterns that builders fuse."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from cosmos_export.diagnostics import UserError
from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, is_op, is_weight, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Transform, WeightBinding, WeightSource, parts_of
from cosmos_export.passes.assign_precision import Precision, towers_of
from cosmos_export.passes.base import Effect, Pass, PassResult
from cosmos_export.passes.options import PassOptions, Ranges
from cosmos_export.precision.scheme import Scheme
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED


class InsertQuantization(Pass):
    """Linears compute as `assign_precision` said for the steps from ``step`` on.

        fp8        x·Wᵀ  →  dq(q(x, a), a) · dq(W₈, w)ᵀ      constants a = amax(x)/448, w = amax(W)/448
        fp8-w8a16  x·Wᵀ  →  x · dq(W₈, w)ᵀ
        int4       x·Wᵀ  →  x · dq(W₄, s)ᵀ [+ (x·Dᵀ)·Uᵀ]     s: a scale per row and group of columns; W − U·D is packed
        nvfp4      x·Wᵀ  →  qdq₄(x, a) · dq(W₄, b, w)ᵀ       b: one scale per block of 16; blocks of x as they come
        fp8-attention       joint attention whose query, keys, values and softmax are quantized

    The low-precision tensors are bindings like any weight: they are computed when they are written, and no data moves
    here. A merged weight has one scale over all its parts (fp8), or those of its rows (int4), so that nothing is
    rounded twice; parts that are stored in FP8 keep their bytes, and each row has the scale of its part. Linears that
    read one value and quantize it alike read one quantized value. A pre-scale (AWQ, int4) goes into the weight of the
    norm before, if all that reads the norm has the same one, and is a multiplication otherwise; the weight's columns
    are divided by it.
    Left alone: sites in the model's own type. Refused: an input without a range (CX312), a width that the scheme
    cannot divide (CX355). Numerical effect: that of the scheme. Without a quantized site: none, not one node changes.
    """

    name = "insert_quantization"
    law = "x·Wᵀ = q(x)·q(W)ᵀ up to the scheme; without a quantized site, the same program"
    effect = Effect.ROUNDS
    phase = "numbers"

    def __init__(self, ranges: Ranges | None = None, step: int = 0) -> None:
        self._ranges = ranges or Ranges()
        self._step = step

    @classmethod
    def made(cls, options: PassOptions) -> Pass | None:
        return None if options.over_steps is None else cls(options.ranges, options.step)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in towers_of(program).values():
            self.rewrite(graph, result)
        return result

    def rewrite(self, graph: Graph, result: PassResult) -> None:
        """Quantize the labelled sites of one ``graph``, and count them in ``result``."""
        groups: dict[tuple[Node, str, WeightSource | None], list[Node]] = defaultdict(list)
        for node, precision in _sites(graph):
            name = precision.at(self._step)
            if name != UNQUANTIZED:
                pre = self._ranges.pre_scale(node.args[1].meta["weight"]) if _for_linears(name).pre_scaled else None
                groups[node.args[0], name, pre].append(node)
        for (value, name, pre), linears in groups.items():
            scheme = SCHEMES[name]
            read = self._input(graph, value, scheme, pre, linears, result)
            for node in linears:
                weight = self._weight(graph, node, scheme, pre)
                operands = (read, weight, *node.args[2:])
                new = graph.call(aten.linear.default, *operands, before=node, like=node, by=self.name)
                if scheme.pre_scaled:
                    new = self._with_low_rank(graph, node, read, new, result)
                graph.replace(node, new)
                result.changes[f"{name} linears"] += 1
        self._attentions(graph, result)
        graph.eliminate_dead_code()

    def _attentions(self, graph: Graph, result: PassResult) -> None:
        for node in graph.calls(ops.JOINT_ATTENTION):
            precision: Precision | None = node.meta.get("precision")
            scheme = None if precision is None else SCHEMES[precision.at(self._step)]
            if precision is None or scheme is None or scheme.attention is None:
                continue
            *operands, scale = node.args
            name = f"{node.name}_scales"
            known = [n for n in graph.constants.values() if n.meta.get("layer") == precision.layer]
            scales = (
                known[0]
                if known
                else graph.add_constant(
                    name, self._ranges.attention_scales(precision.layer, scale), module=node.meta["module"]
                )
            )
            scales.meta["layer"] = precision.layer
            new = graph.call(scheme.attention(), *operands, scales, scale, before=node, like=node, by=self.name)
            graph.replace(node, new)
            result.changes[f"{scheme.computes} attentions"] += 1

    # -- activations --------------------------------------------------------------------------------------------------

    def _input(
        self,
        graph: Graph,
        value: Node,
        scheme: Scheme,
        pre: WeightSource | None,
        linears: list[Node],
        result: PassResult,
    ) -> Node:
        """The node that ``linears`` read instead of ``value``."""
        first = linears[0]
        if pre is not None:
            return self._scaled(graph, value, pre, linears, result)
        activation = scheme.activation
        if activation is None:
            return value
        amaxes = [self._ranges.input_amax(n.args[1].meta["weight"]) for n in linears]
        amax = torch.tensor(max(amaxes), dtype=torch.float64)
        result.changes["activation quantizers"] += 1
        if activation.block:
            _require_width(first, activation.block)
        scale = graph.add_constant(f"{value.name}_scale", activation.scale(amax), module=value.meta.get("module", ""))
        call = partial(graph.call, before=first, like=first, by=self.name)
        rounded: Node = activation.requantize(call, value, scale, spec_of(value).dtype)
        return rounded

    def _scaled(self, graph: Graph, value: Node, pre: WeightSource, linears: list[Node], result: PassResult) -> Node:
        """``value`` with its channels multiplied by ``pre``."""
        first = linears[0]
        norm = value.args[1] if is_op(value, ops.RMS_NORM) else None
        if norm is not None and _plain_weight(norm) and len(norm.users) == 1 and set(value.users) == set(linears):
            binding: WeightBinding = norm.meta["weight"]
            folded = replace(binding, sources=(*binding.sources, pre), transform=Transform.SCALE)
            weight = graph.add_weight(f"{norm.name}_scaled", folded, module=norm.meta["module"])
            value.args = (value.args[0], weight, *value.args[2:])
            result.changes["pre-scales in norms"] += 1
            return value
        dtype = spec_of(value).dtype
        factors = WeightBinding((pre,), Transform.IDENTITY, dtype)
        known = next((n for n in graph.weights.values() if n.meta["weight"] == factors), None)
        factor = known or graph.add_weight(f"{value.name}_pre_scale", factors)
        result.changes["pre-scales multiplied"] += 1
        return graph.call(aten.mul.Tensor, value, factor, before=first, like=first, by=self.name)

    # -- weights ------------------------------------------------------------------------------------------------------

    def _weight(self, graph: Graph, node: Node, scheme: Scheme, pre: WeightSource | None) -> Node:
        """The dequantized weight of the linear ``node``."""
        old: Node = node.args[1]
        binding: WeightBinding = old.meta["weight"]
        format = scheme.weight
        assert format is not None
        # A row of one group is widened whole in every call by TensorRT-RTX 1.7.
        fitting = [size for size in format.groups if size < binding.unpacked_shape[1]]
        group = _require_width(node, *fitting) if format.groups else 0
        low_rank = self._ranges.part_of_low_rank(binding) if scheme.pre_scaled else None
        parts = []
        for part in parts_of(format):
            packed = binding.packed(format, part, group=group, divisor=pre, low_rank=low_rank)
            new = graph.add_weight(f"{old.name}_{format.name}_{part.value}", packed, module=old.meta["module"])
            new.meta["precision"] = old.meta["precision"]
            parts.append(new)
        call = partial(graph.call, before=node, like=node, by=self.name)
        wide: Node = format.widen(call, parts, binding.dtype)
        return wide

    def _with_low_rank(self, graph: Graph, node: Node, read: Node, product: Node, result: PassResult) -> Node:
        """``product`` and what of the weight of ``node`` is not packed, multiplied in the model's own type."""
        binding: WeightBinding = node.args[1].meta["weight"]
        part = self._ranges.part_of_low_rank(binding)
        if part is None:
            return product
        transform = binding.transform if len(part.up) > 1 else Transform.IDENTITY
        halves = {
            "down": WeightBinding((part.down,), Transform.IDENTITY, binding.dtype),
            "up": WeightBinding(part.up, transform, binding.dtype),
        }
        down, up = (
            graph.add_weight(f"{node.args[1].name}_{name}", half, module=node.args[1].meta["module"])
            for name, half in halves.items()
        )
        narrow = graph.call(aten.linear.default, read, down, before=node, like=node, by=self.name)
        wide = graph.call(aten.linear.default, narrow, up, before=node, like=node, by=self.name)
        result.changes["parts of low rank"] += 1
        return graph.call(aten.add.Tensor, product, wide, before=node, like=node, by=self.name)


_NARROWED = ops.having(ops.Trait.WIDENS) | ops.having(ops.Trait.ROUNDS)


def scheme_of(linear: Node) -> Scheme | None:
    """The scheme in which the product ``linear`` computes, by the form of its weight and of what it reads; None for one
    that is not quantized."""
    x, weight = linear.args[:2]
    packed = [n.meta["weight"].packing for n in weight.all_input_nodes if is_weight(n) and n.meta["weight"].packing]
    if not packed:
        return None
    narrow = is_op(x, *_NARROWED)
    return next(s for s in SCHEMES.values() if s.weight == packed[0].format and (s.activation is not None) == narrow)


def _for_linears(name: str) -> Scheme:
    """The scheme ``name``; CX353 where linears cannot be in it."""
    scheme = SCHEMES.get(name)
    if scheme is None or scheme.weight is None:
        raise UserError("CX353", f"there is no scheme `{name}` for a linear", "`cosmos-export targets` lists schemes")
    return scheme


def _sites(graph: Graph) -> Iterator[tuple[Node, Precision]]:
    """Linears with a scheme, whose weight is not packed yet."""
    for node in graph.calls(aten.linear.default):
        weight = node.args[1]
        if is_weight(weight) and "precision" in weight.meta and weight.meta["weight"].packing is None:
            yield node, weight.meta["precision"]


def _plain_weight(node: Node) -> bool:
    return is_weight(node) and node.meta["weight"].transform is Transform.IDENTITY


def _require_width(node: Node, *sizes: int) -> int:
    """The first of ``sizes`` that divides the row of ``node``'s weight; CX355 where none does."""
    weight: WeightBinding = node.args[1].meta["weight"]
    width = weight.unpacked_shape[1]
    fitting = [size for size in sizes if width % size == 0]
    if not fitting:
        site = node.args[1].meta["precision"].site
        raise UserError(
            "CX355",
            f"{site} has rows of {width}, which is no multiple of {' or '.join(map(str, sizes))}",
            f"give it another scheme: `--set {site.partition('[')[0]}=fp8`",
        )
    return fitting[0]
