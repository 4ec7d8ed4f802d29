"""Keys and values of the prompt, handed from the reasoner to the generator in FP8."""

from __future__ import annotations

import torch

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, is_input, is_op, spec_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.passes.assign_precision import Precision
from cosmos_export.passes.base import CannotApply, Effect, Pass, PassResult
from cosmos_export.passes.options import PassOptions, Ranges
from cosmos_export.precision.schemes import UNQUANTIZED

_NARROW = torch.float8_e4m3fn
_FIRST_PREFIX = 3
"""Keys of the prompt among the operands of joint attention; its values follow."""


class QuantizePrefix(Pass):
    """Halve the memory of what the generator keeps of a prompt, where `assign_precision` says so.

        reasoner:   k                            →  q(k, s)                      an output in E4M3
        generator:  attention(…, k)              →  attention(…, dq(k₈, s))

    The scale is that of all keys (values) that this attention reads, `Ranges.attention_scales`, whatever its own
    products compute in: so where they are in FP8 too, quantizing again what was dequantized changes nothing. Every run
    of the reasoner, for the prompt and for the negative prompt, hands on the same form.
    Left alone: layers in the model's own type. Refused: keys that are computed in the generator (CX220), a layer
    without ranges (CX312). Numerical effect: one rounding of keys and values, 2.6 %.
    """

    name = "quantize_prefix"
    law = "keys and values of the prompt cross from reasoner to generator in FP8, where asked"
    effect = Effect.ROUNDS
    phase = "numbers"
    # Attention is in FP8 by then, if it is: both quantize keys and values by one scale.
    after = ("insert_quantization",)

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges

    @classmethod
    def made(cls, options: PassOptions) -> Pass | None:
        return None if options.over_steps is None else cls(options.ranges)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        body = program.graphs[program.loop.body]
        for node in body.calls(*ops.having(ops.Trait.JOINT)):
            precision: Precision | None = node.meta.get("precision")
            if precision is None or precision.prefix == UNQUANTIZED:
                continue
            scales = self._ranges.attention_scales(precision.layer, float(node.args[-1]))[1:]
            for operand, scale in enumerate(scales, _FIRST_PREFIX):
                if not is_op(node.args[operand], ops.DEQUANTIZE):
                    self._narrow(program, body, node, operand, scale, result)
        return result

    def _narrow(
        self, program: Program, body: Graph, attention: Node, operand: int, scale: torch.Tensor, result: PassResult
    ) -> None:
        """The ``operand`` of ``attention`` comes in E4M3, and so does what feeds it from the reasoner."""
        given: Node = attention.args[operand]
        if not is_input(given):
            raise CannotApply(self.name, attention, f"`{given.name}` does not come from the reasoner as it is")
        dtype = spec_of(given).dtype
        given.meta["spec"] = TensorSpec(_NARROW, spec_of(given).shape)
        known = body.add_constant(f"{given.name}_scale", scale, module=attention.meta["module"])
        wide = body.call(ops.DEQUANTIZE, given, known, dtype, before=attention, like=attention, by=self.name)
        attention.args = (*attention.args[:operand], wide, *attention.args[operand + 1 :])
        for edge in program.edges_into(body.name):
            if edge.input == given.name:
                self._hand_on(program.graphs[edge.source], edge.output, scale)
        result.changes["keys and values in fp8"] += 1

    def _hand_on(self, source: Graph, output: str, scale: torch.Tensor) -> None:
        node = source.outputs[output]
        if spec_of(node).dtype == _NARROW:
            return  # for the other branch of guidance
        known = source.add_constant(f"{output}_scale", scale, module=node.meta.get("module", ""))
        narrow = source.call(ops.QUANTIZE, node, known, like=node, by=self.name)
        source.set_outputs({**source.outputs, output: narrow})
