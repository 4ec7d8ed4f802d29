"""A graph as a JSON document and back: operations by name, sizes as trees, weights as places in a file.

Reading builds the graph through `Graph.call`, which derives every type and shape again, so a document that does not fit
the dialect is refused, and no text of it is ever evaluated.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import sympy
import torch

from cosmos_export.diagnostics import UserError, shown
from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, Node, is_constant, is_input, is_weight, spec_of
from cosmos_export.ir.size_trees import (
    MAX_INTEGER,
    MAX_RANK,
    SizeReader,
    check_product,
    check_sizes,
    identifier,
    integer,
    size_tree,
)
from cosmos_export.ir.spec import DTYPE_NAMES, E2M1, INT4, TensorSpec, Transform, WeightBinding, WeightSource

SCHEMA = 1
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_TARGETS = {str(target): target for target in ops.OPERATIONS if target not in ops.having(ops.Trait.FUSED)}
_FILE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._+\-]{0,238}[A-Za-z0-9_+\-])?")
_ELEMENT = TensorSpec | sympy.Expr | int | float
"""An operand of elementwise arithmetic."""
MAX_VALUES = 65536
"""Values of one graph: the largest published model has some thousands."""
MAX_OPERANDS = 1024
"""Operands in one list."""

Place = Callable[[WeightBinding], tuple[int, int]]
"""Offset and size in bytes of a binding's value in the weight file."""


def graph_document(graph: Graph, weights_file: str, place: Place) -> dict[str, Any]:
    """``graph`` as plain data; its weights are in ``weights_file``, beside the document."""
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
        record = {"name": node.name, "dtype": DTYPE_NAMES[spec.dtype], "shape": [size_tree(s) for s in spec.shape]}
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
        return _Reader(document, folder).graph
    except ValueError as error:
        said = f"a graph document does not hold a graph: {error}"
        raise UserError("CX231", said, "build the bundle again") from error


_GRAPH = {
    "schema": int, "name": str, "weights_file": str, "inputs": list, "weights": list, "constants": list,
    "operations": list, "outputs": dict,
}  # fmt: skip
_VALUE = {"name": str, "dtype": str, "shape": list}
_WEIGHT = _VALUE | {"key": str, "offset": int, "size_bytes": int}
_CONSTANT = _VALUE | {"values": list}
_OPERATION = {"name": str, "op": str, "args": list}
_MADE_BY_INFERENCE = (ValueError, IndexError, TypeError, ZeroDivisionError, RuntimeError, AttributeError)
"""Errors that a rule of `ops` raises for operands of ranks, sizes and types that its operation does not take."""


def _fields(record: Any, kinds: Mapping[str, type], optional: Mapping[str, type] | None = None) -> Mapping[str, Any]:
    """``record`` where it is an object with exactly these fields, each of its kind."""
    if not isinstance(record, dict):
        raise ValueError(f"{shown(record)} is not an object")
    allowed = {**kinds, **(optional or {})}
    for name, value in record.items():
        if name not in allowed:
            raise ValueError(f"unknown field {shown(name)}")
        if not isinstance(value, allowed[name]) or (allowed[name] is int and isinstance(value, bool)):
            raise ValueError(f"field `{name}` is {shown(value)}")
    for name in kinds:
        if name not in record:
            raise ValueError(f"field `{name}` is missing")
    return record


class _Reader:
    def __init__(self, document: Any, folder: Path) -> None:
        if isinstance(document, dict) and document.get("schema") != SCHEMA:
            raise ValueError(f"schema {shown(document.get('schema'))}, this version reads {SCHEMA}")
        fields = _fields(document, _GRAPH)
        for what in ("name", "weights_file"):
            if not _FILE_NAME.fullmatch(fields[what]):
                raise ValueError(f"{what} {shown(fields[what])} is not a name of letters, digits and ._+-")
        if sum(len(fields[part]) for part in ("inputs", "weights", "constants", "operations")) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        self.graph = Graph(fields["name"])
        self._nodes: dict[str, Node] = {}
        self._sizes = SizeReader()
        self._file = folder / fields["weights_file"]
        for record in fields["inputs"]:
            name, spec = self._declared(_fields(record, _VALUE))
            self._nodes[name] = self.graph.add_input(name, spec)
        for record in fields["weights"]:
            name, spec = self._declared(_fields(record, _WEIGHT))
            self._nodes[name] = self.graph.add_weight(name, self._binding(record, spec))
        for record in fields["constants"]:
            name, spec = self._declared(_fields(record, _CONSTANT))
            self._nodes[name] = self.graph.add_constant(name, _constant(name, spec, record["values"]))
        for record in fields["operations"]:
            self._operation(_fields(record, _OPERATION, {"kwargs": dict}))
        self.graph.set_outputs({identifier(name): self._node(node) for name, node in fields["outputs"].items()})

    def _new(self, record: Mapping[str, Any]) -> str:
        name = identifier(record["name"])
        if name in self._nodes:
            raise ValueError(f"two values have the name `{name}`")
        return name

    def _node(self, name: Any) -> Node:
        if not isinstance(name, str) or name not in self._nodes:
            raise ValueError(f"no value {shown(name)} comes before it is read")
        return self._nodes[name]

    def _declared(self, record: Mapping[str, Any]) -> tuple[str, TensorSpec]:
        shape = tuple(self._sizes.read(size) for size in record["shape"])
        return self._new(record), check_sizes(TensorSpec(_dtype(record["dtype"]), shape))

    def _binding(self, record: Mapping[str, Any], spec: TensorSpec) -> WeightBinding:
        shape = _fixed(record["name"], spec)
        elements = math.prod(shape)
        size = elements // 2 if spec.dtype in (INT4, E2M1) else elements * spec.dtype.itemsize
        if record["size_bytes"] != size or not 0 <= record["offset"] <= MAX_INTEGER - size:
            raise ValueError(f"weight `{record['name']}` has {shown(record['size_bytes'])} bytes for {spec}")
        source = WeightSource(record["key"], self._file, record["offset"], spec.dtype, shape)
        return WeightBinding((source,), Transform.IDENTITY, spec.dtype)

    def _operation(self, record: Mapping[str, Any]) -> None:
        name, target = self._new(record), _TARGETS.get(record["op"])
        if target is None:
            raise ValueError(f"operation {shown(record['op'])} is not in the dialect")
        positional, named = _operand_types(target)
        if len(record["args"]) > len(positional):
            raise ValueError(f"`{target}` takes {len(positional)} operands, {len(record['args'])} are given")
        args = [self._operand(kind, value) for kind, value in zip(positional, record["args"], strict=False)]
        kwargs = {}
        for key, value in record.get("kwargs", {}).items():
            if key not in named:
                raise ValueError(f"`{target}` takes no operand {shown(key)}")
            kwargs[key] = self._operand(named[key], value)
        try:
            node = self.graph.call(target, *args, **kwargs)
        except _MADE_BY_INFERENCE as error:
            raise ValueError(f"operation `{name}`, {target}: {error}") from error
        check_sizes(spec_of(node))
        self._nodes[name] = node

    def _operand(self, kind: Any, value: Any) -> Any:
        """``value`` as the rule of its operation annotates it; a text is never an operand."""
        alternatives = get_args(kind)
        if get_origin(kind) is Sequence:
            if not isinstance(value, list) or len(value) > MAX_OPERANDS:
                raise ValueError(f"{shown(value)} is not a list of at most {MAX_OPERANDS} operands")
            items = [self._operand(alternatives[0], item) for item in value]
            if _takes(alternatives[0], sympy.Expr):
                if len(items) > 2 * MAX_RANK or -1 in items:
                    raise ValueError(f"{shown(value)} is not a list of sizes")
                check_product(items)
            return items
        if value is None and NoneType in alternatives:
            return None
        if isinstance(value, dict) and value.keys() == {"node"} and _takes(kind, TensorSpec):
            return self._node(value["node"])
        if isinstance(value, dict) and value.keys() == {"dtype"} and _takes(kind, torch.dtype):
            return _dtype(value["dtype"])
        if isinstance(value, bool) and _takes(kind, bool):
            return value
        if isinstance(value, float) and _takes(kind, float) and math.isfinite(value):
            return value
        if _takes(kind, sympy.Expr):
            return self._sizes.read(value)
        if _takes(kind, int) or _takes(kind, float):
            return integer(value)
        raise ValueError(f"{shown(value)} is not an operand that is expected here")


def _takes(kind: Any, wanted: type) -> bool:
    return kind is wanted or wanted in get_args(kind)


@cache
def _operand_types(target: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Annotations of the operands of an operation: by position, and by name."""
    rule = ops.OPERATIONS[target].rule
    hints = get_type_hints(rule)
    parameters = inspect.signature(rule).parameters.values()
    named = {p.name: _ELEMENT if hints[p.name] is Any else hints[p.name] for p in parameters}
    return tuple(named[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY), named


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{shown(name)} is not a type")
    return _DTYPES[name]


def _fixed(name: str, spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(size for size in spec.shape if isinstance(size, int))
    if len(shape) != spec.rank:
        raise ValueError(f"`{name}` is {spec}, not of fixed sizes")
    return shape


def _constant(name: str, spec: TensorSpec, values: list[Any]) -> torch.Tensor:
    shape = _fixed(name, spec)
    if len(values) != math.prod(shape):
        raise ValueError(f"constant `{name}` has {len(values)} numbers for {spec}")
    if spec.dtype == torch.bool:
        fits = all(isinstance(v, bool) for v in values)
    elif spec.dtype in (INT4, E2M1):
        fits = False
    else:
        limits = torch.finfo(spec.dtype) if spec.dtype.is_floating_point else torch.iinfo(spec.dtype)
        kinds = (int, float) if spec.dtype.is_floating_point else (int,)
        fits = all(isinstance(v, kinds) and not isinstance(v, bool) and limits.min <= v <= limits.max for v in values)
    if not fits:
        raise ValueError(f"constant `{name}` has numbers that are not {DTYPE_NAMES[spec.dtype]}")
    return torch.tensor(values, dtype=spec.dtype).reshape(shape)


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, sympy.Expr):
        return size_tree(value)
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"an operand of type {type(value).__name__} has no form in a document: {value!r}")
