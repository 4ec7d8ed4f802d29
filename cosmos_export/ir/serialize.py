"""A graph as a JSON document and back: operations by name, sizes as trees, weights as places in a file.

Reading builds the graph through `Graph.call`, which derives every type and shape again, so a document that does not fit
the dialect is refused, and no text of it is ever evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from cosmos_export.diagnostics import UserError
from cosmos_export.ir import ops
from cosmos_export.ir.dims import Size, simplify, symbol
from cosmos_export.ir.graph import Graph, Node, is_constant, is_input, is_weight, spec_of
from cosmos_export.ir.spec import DTYPE_NAMES, E2M1, INT4, TensorSpec, Transform, WeightBinding, WeightSource

SCHEMA = 1
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_TARGETS = {str(target): target for target in ops.RULES}
_DEPTH = 64

Place = Callable[[WeightBinding], tuple[int, int]]
"""Offset and size in bytes of a binding's value in the weight file."""


def graph_document(graph: Graph, weights_file: str, place: Place) -> dict[str, Any]:
    """``graph`` as plain data; its weights lie in ``weights_file``, beside the document."""
    placeholders: dict[str, list[dict[str, Any]]] = {"inputs": [], "weights": [], "constants": []}
    operations = []
    for node in graph.nodes:
        if node.op == "call_function":
            record: dict[str, Any] = {"name": node.name, "op": str(node.target), "args": _encode(list(node.args))}
            if node.kwargs:
                record["kwargs"] = {key: _encode(value) for key, value in node.kwargs.items()}
            operations.append(record)
            continue
        spec = spec_of(node)
        record = {"name": node.name, "dtype": DTYPE_NAMES[spec.dtype], "shape": [_encode(s) for s in spec.shape]}
        if is_weight(node):
            offset, size = place(node.meta["weight"])
            record |= {"key": str(node.meta["weight"]), "offset": offset, "size_bytes": size}
            placeholders["weights"].append(record)
        elif is_constant(node):
            placeholders["constants"].append(record | {"values": node.meta["constant"].flatten().tolist()})
        else:
            assert is_input(node)
            placeholders["inputs"].append(record)
    outputs = {name: node.name for name, node in graph.outputs.items()}
    return {
        "schema": SCHEMA, "name": graph.name, "weights_file": weights_file, **placeholders, "operations": operations,
        "outputs": outputs,
    }  # fmt: skip


def read_graph(document: Mapping[str, Any], folder: Path) -> Graph:
    """The graph of ``document``, its weights bound to bytes of the file in ``folder`` that it names.

    UserError CX231 where the document is not one, or holds what the dialect does not allow.
    """
    try:
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}, this version reads {SCHEMA}")
        return _Reader(document, folder).graph
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError("CX231", f"a graph document does not hold a graph: {said}", "build the bundle again") from error


class _Reader:
    def __init__(self, document: Mapping[str, Any], folder: Path) -> None:
        self.graph = Graph(str(document["name"]))
        self._nodes: dict[str, Node] = {}
        name = str(document["weights_file"])
        if "/" in name or name.startswith("."):
            raise ValueError(f"weights file {name!r} is not beside the document")
        self._file = folder / name
        for record in document["inputs"]:
            self._nodes[record["name"]] = self.graph.add_input(record["name"], self._spec(record))
        for record in document["weights"]:
            self._nodes[record["name"]] = self._weight(record)
        for record in document["constants"]:
            spec = self._spec(record)
            value = torch.tensor(record["values"], dtype=spec.dtype).reshape([int(s) for s in spec.shape])
            self._nodes[record["name"]] = self.graph.add_constant(record["name"], value)
        for record in document["operations"]:
            target = _TARGETS.get(record["op"])
            if target is None:
                raise ValueError(f"operation {record['op']!r} is not in the dialect")
            kwargs = {str(key): self._decode(value) for key, value in record.get("kwargs", {}).items()}
            self._nodes[record["name"]] = self.graph.call(target, *self._decode(record["args"]), **kwargs)
        self.graph.set_outputs({name: self._nodes[node] for name, node in document["outputs"].items()})

    def _spec(self, record: Mapping[str, Any]) -> TensorSpec:
        return TensorSpec(_DTYPES[record["dtype"]], tuple(self._decode(s) for s in record["shape"]))

    def _weight(self, record: Mapping[str, Any]) -> Node:
        spec = self._spec(record)
        shape = tuple(int(s) for s in spec.shape)
        elements = math.prod(shape)
        size = elements // 2 if spec.dtype in (INT4, E2M1) else elements * spec.dtype.itemsize
        if record["size_bytes"] != size or record["offset"] < 0:
            raise ValueError(f"weight {record['name']!r} has {record['size_bytes']} bytes for {spec}")
        source = WeightSource(str(record["key"]), self._file, record["offset"], spec.dtype, shape)
        return self.graph.add_weight(record["name"], WeightBinding((source,), Transform.IDENTITY, spec.dtype))

    def _decode(self, value: Any, depth: int = 0) -> Any:
        if depth > _DEPTH:
            raise ValueError("operands are nested too deeply")
        if isinstance(value, list):
            return [self._decode(item, depth + 1) for item in value]
        if not isinstance(value, Mapping):
            return value
        ((kind, content),) = value.items()
        match kind:
            case "node":
                return self._nodes[content]
            case "dtype":
                return _DTYPES[content]
            case "dim":
                return symbol(str(content))
            case "add" | "mul" | "pow" | "floordiv":
                terms = [sympy.sympify(self._decode(item, depth + 1)) for item in content]
                return simplify(_EXPRESSIONS[kind](*terms))
        raise ValueError(f"unknown kind of operand {kind!r}")


_EXPRESSIONS: Mapping[str, Any] = {"add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow, "floordiv": FloorDiv}


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, sympy.Expr):
        return _expression(value)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"an operand of type {type(value).__name__} has no form in a document: {value!r}")


def _expression(value: Size) -> Any:
    value = simplify(value)
    if isinstance(value, int):
        return value
    if isinstance(value, sympy.Symbol):
        return {"dim": value.name}
    for kind, constructor in _EXPRESSIONS.items():
        if isinstance(value, constructor):
            return {kind: [_expression(term) for term in value.args]}
    raise ValueError(f"size {value} has no form in a document")
