"""Cutting graphs into engines of consecutive layers, where the builder's memory for one engine passes the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cosmos_export.compiler.forms import Pieces, cut_into_pieces
from cosmos_export.ir.graph import Graph, Node, is_op
from cosmos_export.ir.ops import aten
from cosmos_export.passes.cut_graph import narrow_places
from cosmos_export.passes.insert_quantization import scheme_of
from cosmos_export.passes.pipeline import Watch
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED
from cosmos_export.targets.onnx.model import external_nodes
from cosmos_export.targets.onnx.weights import size_bytes
from cosmos_export.targets.partition import partition
from cosmos_export.targets.profiles import Profile


def cut_graphs(
    graphs: Mapping[str, Graph],
    limit: int | None,
    profiles: Sequence[Profile],
    *,
    external: bool,
    watch: Watch | None = None,
) -> Pieces:
    """Every one of ``graphs`` in as many pieces as it needs, none of which takes more memory to build than ``limit``
    bytes for its weights; None: whole. ``external``: engines take their large weights as inputs."""
    return cut_into_pieces(graphs, lambda name, graph: _places(graph, limit, profiles, external), watch=watch)


def _places(graph: Graph, limit: int | None, profiles: Sequence[Profile], external: bool) -> list[Node]:
    """The nodes of ``graph`` from which on another engine begins."""
    given = external_nodes(graph) if external else frozenset[Node]()

    def held(weight: Node) -> float:
        return 0.0 if weight in given else builder_share_bytes(weight)

    whole = sum(held(node) for node in graph.weights.values())
    if limit is None or whole <= limit:
        return []
    sizes = {dim: max(profile.dims[dim].max for profile in profiles) for dim in profiles[0].dims}
    first, places = narrow_places(graph, sizes, held)
    pieces = [first, *(place.weight_size for place in places)]
    cuts = partition(pieces, [0.0, *(float(place.crossing_bytes) for place in places)], limit)
    return [places[index - 1].node for index in cuts]


def chains(pieces: Pieces) -> dict[str, tuple[str, ...]]:
    """The graphs that were cut, with the names of what they were cut into."""
    return {name: tuple(graph.name for graph in cut) for name, cut in pieces.items() if len(cut) > 1}


def cut_notes(pieces: Pieces) -> list[str]:
    """Notes on the cuts for a reader of the result."""
    return [
        f"{name} is {len(parts)} engines in a row, as one would take more memory to build than the budget allows"
        for name, parts in chains(pieces).items()
    ]


def builder_share_bytes(weight: Node) -> float:
    """Anonymous memory that the builder takes for the placeholder ``weight``."""
    return size_bytes(weight.meta["weight"]) * _share(weight)


def _share(weight: Node) -> float:
    """Memory per stored byte. A packed weight that some product reads as it is stored is not widened for others."""
    packing = weight.meta["weight"].packing
    if packing is None:
        return SCHEMES[UNQUANTIZED].builder_share
    linears = (node for user in weight.users for node in user.users if is_op(node, aten.linear.default))
    read_by = [scheme for linear in linears if (scheme := scheme_of(linear)) is not None]
    if read_by:
        return min(scheme.builder_share for scheme in read_by)
    return max(scheme.builder_share for scheme in SCHEMES.values() if scheme.weight == packing.format)
