"""Guidance, corrector and predictor of a sampler step in one operation."""

from __future__ import annotations

from typing import Any

import torch

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, spec_of
from cosmos_export.ir.match import Any_, Call, OneOf, Pattern, follows_from, match
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.kernels.description import SAMPLER_STEP
from cosmos_export.passes.base import PassResult
from cosmos_export.passes.fusing import KernelPass, fuse, place
from cosmos_export.sampling import COLUMNS

_MASKS = 2
"""Masks that the kernel takes."""


def _wide(name: str) -> Pattern:
    """A value in float32, or what it is a cast of."""
    return OneOf(Call(aten._to_copy.default, Any_(name), dtype=torch.float32), Any_(name))


def _unipc(guided: bool) -> Call:
    """The next sample of `passes.sampler`: guidance, corrector and predictor, in its order of operations."""
    columns = {name: i for i, name in enumerate(COLUMNS["unipc"])}

    def times(value: Pattern, name: str) -> Call:
        return Call(aten.mul.Tensor, value, Call(aten.select.int, Any_("row"), 0, columns[name]))

    def total(first: Pattern, *terms: Pattern, name: str = "") -> Call:
        for i, term in enumerate(terms, 1):
            first = Call(aten.add.Tensor, first, term, name=name if i == len(terms) else "")
        result: Call = first
        return result

    velocity: Pattern = _wide("cond")
    if guided:
        other = _wide("uncond")
        difference = Call(aten.sub.Tensor, velocity, other)
        velocity = Call(aten.add.Tensor, other, times(difference, "guidance"))
    x, last, m0, m1 = (Any_(name) for name in ("sample", "last", "m0", "m1"))
    d = Call(aten.sub.Tensor, x, times(velocity, "sigma"), name="d")
    parts = [times(v, c) for v, c in ((x, "c_sample"), (last, "c_last"), (m0, "c_m0"), (m1, "c_m1"), (d, "c_d"))]
    corrected = total(*parts, name="corrected")
    return total(times(corrected, "p_sample"), times(d, "p_d"), times(m0, "p_m0"))


_STEP = OneOf(_unipc(True), _unipc(False))
"""The guided one first: the other would match its velocity as a whole."""
_ALONG = Call(aten.view.default, _wide("mask"), Any_("shape"), name="along")
_HELD = Call(
    aten.add.Tensor,
    Call(aten.mul.Tensor, Any_("new"), _ALONG, sole=True),
    Call(aten.mul.Tensor, Any_("old"), Call(aten.add.Tensor, Call(aten.mul.Tensor, _ALONG, -1.0), 1.0)),
)
"""``new`` where a 0/1 mask is 1, ``old`` where it is 0."""


class FuseSamplerStep(KernelPass):
    """A step of UniPC for one latent becomes one operation, with the masks that hold some of its values.

    Conditions: the arithmetic of `passes.sampler`, on float32 state of the latent's shape; up to two masks, each along
    one axis; what it reads is computed before anything reads a result.
    Numerical effect: none, the same operations in the same order of rounding.
    """

    name = "fuse_sampler_step"
    law = "UniPC(guidance(u, c), state) held by masks = one operation"
    kernel = SAMPLER_STEP
    after = ("fuse_activation_quantize",)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            for node in graph.calls(aten.add.Tensor):
                if node.users:  # not one that was fused as a part of another
                    self._fuse(graph, node, result)
            graph.eliminate_dead_code()
        return result

    def _fuse(self, graph: Graph, node: Node, result: PassResult) -> None:
        found = match(_STEP, node)
        if found is None:
            return
        state = [found[name] for name in ("sample", "last", "m0", "m1")]
        if not all(spec_of(t) == spec_of(node) and spec_of(t).dtype == torch.float32 for t in state):
            result.decline(node, "the state of its sampler is not float32 of one shape")
            return
        new, masks, axes = node, list[Node](), list[int]()
        while len(masks) < _MASKS and (held := _held(new, found["sample"])) is not None:
            new, mask, axis = held
            masks.append(mask)
            axes.append(axis)
        results = (new, found["corrected"], found["d"])
        operands = (found["row"], found["cond"], found.get("uncond"), *state)
        inside = {node, *results[1:]}
        readers = [user for one in results for user in one.users]
        later = [user for user in readers if user not in inside and not follows_from(new, user)]
        at = place(graph, (*operands, *masks), later)
        if at is None:
            result.decline(node, "a result of it is read before all that it reads is computed")
            return
        fuse(graph, at, ops.UNIPC_STEP, (*operands, masks, axes), results, self.name)
        result.changes["sampler steps"] += 1


def _held(new: Node, old: Node) -> tuple[Node, Node, int] | None:
    """Where ``new`` is held at ``old`` by a 0/1 mask along one axis: the held value, the mask, the axis."""
    if len(new.users) != 1:
        return None
    (product,) = new.users
    for held in product.users:
        found: dict[str, Any] | None = match(_HELD, held, {"new": new, "old": old})
        if found is not None:
            size, along = spec_of(found["mask"]).shape, spec_of(found["along"]).shape
            axes = [axis for axis, n in enumerate(along) if (n,) == size and spec_of(new).shape[axis] == n]
            return (held, found["mask"], axes[0]) if axes else None
    return None
