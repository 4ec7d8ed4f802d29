"""A captured program as a JSON document and back, exactly: nodes, names, order, and how further nodes will be named.

Weights are in it by the keys of their sources; reading binds them to the tensors of a checkpoint. The operations of
each graph are read by `cosmos_export.ir.serialize`, so a document that does not fit the dialect is refused and no text
of it is evaluated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cosmos_export.bundle import strict
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.ir.dims import Dim
from cosmos_export.ir.graph import Graph, Node, copy_node, is_weight, spec_of
from cosmos_export.ir.program import Edge, Loop, Program
from cosmos_export.ir.serialize import graph_document, read_graph
from cosmos_export.ir.spec import DTYPE_NAMES, Rate, Transform, WeightBinding, WeightSource

SCHEMA: Literal[1] = 1
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_WEIGHTS = "weights"
"""Name that a document has in place of the file of the weights, which are bound when it is read."""
_Name = Annotated[str, strict.Pattern(r"[A-Za-z_]\w{0,255}", "a name")]
_Text = Annotated[str, strict.Pattern(r"[ -~]{0,400}", "a line of plain text")]
_Count = Annotated[int, strict.AtLeast(0)]


@dataclass(frozen=True)
class _Weight:
    keys: tuple[_Text, ...]
    transform: Literal["identity", "concatenate", "interleave", "weight_norm", "scale"]
    dtype: _Text


@dataclass(frozen=True)
class _GraphRecord:
    graph: Any
    """The graph as `graph_document` writes it."""
    order: tuple[_Name, ...]
    """Inputs, weights and constants in the order of their declaration."""
    weights: Mapping[_Name, _Weight]
    modules: Mapping[_Name, _Text]
    """Node → module, where it comes from one."""
    gone: tuple[_Name, ...]
    counts: Mapping[_Name, _Count]
    """The state of `Graph.naming`."""


@dataclass(frozen=True)
class _DimRecord:
    name: _Name
    min: int
    max: int
    meaning: _Text


@dataclass(frozen=True)
class _EdgeRecord:
    source: _Name
    output: _Name
    target: _Name
    input: _Name
    instance: _Text


@dataclass(frozen=True)
class _ProgramRecord:
    schema: Literal[1]
    graphs: tuple[_GraphRecord, ...]
    dims: tuple[_DimRecord, ...]
    rates: Mapping[_Name, _Text]
    body: _Name
    carried: Mapping[_Name, _Name]
    edges: tuple[_EdgeRecord, ...]
    unused_keys: Mapping[_Text, _Text]
    history: tuple[_Name, ...]


def program_document(program: Program) -> bytes:
    """``program``, as capture leaves it. ValueError where it has no form in a document."""
    if program.loop != Loop(program.loop.body, program.loop.carried):
        raise ValueError("the loop is closed or cut")
    record = _ProgramRecord(
        schema=SCHEMA,
        graphs=tuple(_graph_record(graph) for graph in program.graphs.values()),
        dims=tuple(_DimRecord(dim.name, dim.min, dim.max, dim.meaning) for dim in program.dims.values()),
        rates={name: rate.name for name, rate in program.rates.items()},
        body=program.loop.body,
        carried=program.loop.carried,
        edges=tuple(_EdgeRecord(e.source, e.output, e.target, e.input, e.instance) for e in program.edges),
        unused_keys=program.unused_keys,
        history=tuple(program.history),
    )
    return json.dumps(strict.encode(record), separators=(",", ":"), allow_nan=False).encode()


def read_program(data: bytes, sources: Mapping[str, WeightSource]) -> Program:
    """The program of a document, its weights bound to ``sources``. ValueError where it is not one."""
    record = strict.decode(_ProgramRecord, strict.parse_object(data))
    try:
        graphs = [_graph(one, sources) for one in record.graphs]
        rates = {name: Rate[rate] for name, rate in record.rates.items()}
    except KeyError as error:
        raise ValueError(f"unknown name {shown(error.args[0])}") from error
    except UserError as error:
        raise ValueError(error.message) from error
    return Program(
        graphs={graph.name: graph for graph in graphs},
        dims={one.name: Dim(one.name, one.min, one.max, one.meaning) for one in record.dims},
        rates=rates,
        loop=Loop(record.body, dict(record.carried)),
        edges=[Edge(e.source, e.output, e.target, e.input, e.instance) for e in record.edges],
        unused_keys=dict(record.unused_keys),
        history=list(record.history),
    )


def _graph_record(graph: Graph) -> _GraphRecord:
    gone, counts = graph.naming()
    bindings = {name: node.meta["weight"] for name, node in graph.weights.items()}
    return _GraphRecord(
        graph=graph_document(graph, _WEIGHTS, lambda binding: (0, _size_bytes(binding))),
        order=tuple(node.name for node in graph.nodes if node.op == "placeholder"),
        weights={name: _Weight(b.keys, b.transform.value, DTYPE_NAMES[b.dtype]) for name, b in bindings.items()},
        modules={node.name: node.meta["module"] for node in graph.nodes if node.meta["module"]},
        gone=tuple(gone),
        counts=counts,
    )


def _graph(record: _GraphRecord, sources: Mapping[str, WeightSource]) -> Graph:
    plain = read_graph(record.graph, Path())
    parts = ("inputs", "weights", "constants", "operations")
    # Reading names nodes anew, in the order in which they are written.
    names = [one["name"] for part in parts for one in record.graph[part]]
    nodes = dict(zip(names, plain.nodes, strict=True))
    placeholders = [name for name, node in nodes.items() if node.op == "placeholder"]
    if sorted(record.order) != sorted(placeholders):
        raise ValueError("the order of declaration is of other values")
    graph = Graph(plain.name)
    mapping: dict[Node, Node] = {}
    for name in [*record.order, *names[len(placeholders) :]]:
        node = nodes[name]
        node.name = name
        if is_weight(node):
            binding = _binding(record.weights[name], sources)
            new = graph.add_weight(name, binding)
            if spec_of(new) != spec_of(node):
                raise ValueError(f"weight `{name}` is {spec_of(node)}, its tensors make {spec_of(new)}")
        else:
            new = copy_node(graph, node, mapping)
        if new.name != name:
            raise ValueError(f"no value can have the name `{name}`")
        new.meta["module"] = record.modules.get(name, "")
        mapping[node] = new
    graph.set_outputs({name: mapping[node] for name, node in plain.outputs.items()})
    graph.continue_naming(record.gone, record.counts)
    return graph


def _binding(record: _Weight, sources: Mapping[str, WeightSource]) -> WeightBinding:
    return WeightBinding(tuple(sources[key] for key in record.keys), Transform(record.transform), _DTYPES[record.dtype])


def _size_bytes(binding: WeightBinding) -> int:
    return math.prod(binding.shape) * binding.dtype.itemsize


def alike(one: Program, other: Program) -> bool:
    """Whether two programs are the same in every respect, the names of nodes that are still to be made included."""
    return bool(_facts(one) == _facts(other))


def _facts(program: Program) -> Any:
    rest = (program.dims, program.rates, program.loop, program.edges, program.unused_keys, program.history)
    order = [list(mapping) for mapping in (program.dims, program.rates, program.unused_keys)]
    return [[list(_graph_facts(graph)) for graph in program.graphs.values()], list(program.graphs), rest, order]


def _graph_facts(graph: Graph) -> Iterator[Any]:
    for node in graph.nodes:
        meta = dict(node.meta)
        constant = meta.pop("constant", None)
        values = None if constant is None else (constant.dtype, constant.tolist())
        yield node.op, node.name, str(node.target), str(node.args), str(node.kwargs), meta, values
    yield list(graph.inputs), {name: node.name for name, node in graph.outputs.items()}, graph.naming()
