"""Query, key and value of one merged projection in one operation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, spec_of
from cosmos_export.ir.match import Any_, Bound, Call, OneOf, match
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.kernels.description import QKV_PACK
from cosmos_export.passes.base import PassResult
from cosmos_export.passes.fusing import KernelPass, fuse, place

_COLUMNS = Call(
    aten.slice.Tensor, Any_("source"), OneOf(1, -1), Any_("start"), Any_("end"), name="columns",
    where=lambda node: spec_of(node).rank == 2,
)  # fmt: skip
_HEADS = Call(aten.view.default, _COLUMNS, Any_("shape"), where=lambda node: spec_of(node).rank == 3)
"""[N, heads, d] of columns [N, heads · d] of a projection."""
_NORM = Call(ops.RMS_NORM, _HEADS, Any_("weight"), Any_("eps"), name="norm", sole=True)
_TURNED = Call(
    ops.ROTARY,
    OneOf(Call(aten._to_copy.default, _NORM, name="value", sole=True), _NORM),
    Any_("cos"),
    Any_("sin"),
)


class FuseQkvPack(KernelPass):
    """Norm and rotation of query and key, and the value, of one merged projection become one operation.

    Conditions: query, key and value are neighbouring columns of one value, from its first on, key and value equally
    wide; query and key are normalized by one epsilon and weights of one type, and rotated by the same angles; all of it
    is rounded to the type of the projection; the norms are read by nothing else.
    Numerical effect: none, the same operations in the same order of rounding.
    """

    name = "fuse_qkv_pack"
    law = "rotary(norm(q)), rotary(norm(k)), v of one projection = one operation"
    kernel = QKV_PACK

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for graph in program.graphs.values():
            for node in graph.calls(ops.ROTARY):
                if node.users:  # not one that was fused as a key
                    self._fuse(graph, node, result)
            graph.eliminate_dead_code()
        return result

    def _fuse(self, graph: Graph, node: Node, result: PassResult) -> None:
        query = _turned(node)
        if query is None or query["start"] != 0:
            return
        shared = {name: query[name] for name in ("source", "cos", "sin", "eps")}
        for other in graph.calls(ops.ROTARY):
            key = _turned(other, shared) if other is not node else None
            if key is None or key["start"] != query["end"]:
                continue
            if spec_of(key["weight"]).dtype != spec_of(query["weight"]).dtype:
                continue
            last = key["end"]
            value = next(_values(query["source"], last, 2 * last - key["start"]), None)
            if value is None or spec_of(value).shape[2] != spec_of(other).shape[2]:
                continue
            columns = (query["columns"], key["columns"], value.args[0])
            operands = (*columns, query["weight"], key["weight"], query["cos"], query["sin"])
            at = place(graph, operands, [*node.users, *other.users, *value.users])
            if at is not None:
                fuse(graph, at, ops.QKV_PACK, (*operands, query["eps"]), (node, other, value), self.name)
                result.changes["queries, keys and values"] += 1
                return
        result.decline(node, "there is no key and value of the same projection and angles beside it")


def _turned(node: Node, bound: Bound | None = None) -> dict[str, Any] | None:
    """A rotation of normalized heads that are columns of a projection, in its type throughout."""
    found = match(_TURNED, node, bound)
    if found is None or not all(isinstance(found[end], int) for end in ("start", "end")):
        return None
    dtype = spec_of(found["columns"]).dtype
    types = {spec_of(found.get("value", found["norm"])).dtype, spec_of(node).dtype}
    return found if types == {dtype} else None


def _values(source: Node, start: int, end: int) -> Iterator[Node]:
    """Heads in the columns from ``start`` to ``end`` of ``source``."""
    known = {"source": source, "start": start, "end": end}
    for columns in source.users:
        yield from (view for view in columns.users if match(_HEADS, view, known) is not None)
