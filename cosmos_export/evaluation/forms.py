"""The model an engine is built from against the model that was run: the same operations on the same weights.

A graph is lowered twice, for an engine in its own precision and for ONNX Runtime on a CPU in float32, and only the
second is ever run here. The two are compared operation by operation: kind, attributes, constants up to their type, the
place of each weight, and what each operand comes from. An operation that the two write differently is evaluated in both
forms by ONNX's reference evaluator, on the same random operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from cosmos_export.bundle import WeightInput
from cosmos_export.ir import ops
from cosmos_export.ir.dims import evaluate
from cosmos_export.ir.graph import Graph, Node, is_op, is_weight, spec_of
from cosmos_export.targets.onnx.model import weight_name

EVALUATED_LIMIT = 1e-5
"""float32, relative L2, of an operation that the two forms write differently."""
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_SIZES = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Concat", "Squeeze", "Unsqueeze"})
"""A value that these compute from shapes alone is a size: it belongs to no operation of the graph."""
_UP_TO_TYPE = frozenset({"output_dtype"})
_SMALLEST = 3
"""The first dim when an operation is evaluated."""
_NO_EVALUATOR = ops.having(ops.Trait.BLOCKS)
"""Blocks of four-bit floats: TensorRT's own operations, for which the CPU's form computes with codes."""
_REFUSED = (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError)
"""Errors that ONNX's evaluator raises for operations and operands that it does not know."""


@dataclass(frozen=True)
class FormsComparison:
    """Operations of two forms of a graph, compared."""

    same: int
    """Operations that are written alike."""
    evaluated: int
    """Operations that are written differently, and were evaluated in both forms."""
    unknown: tuple[str, ...]
    """Operations that cannot be evaluated here: they read the same weights and values, and no more is known."""
    differences: tuple[str, ...]


def compare_forms(
    graph: Graph, engine: onnx.ModelProto, run: onnx.ModelProto, weights: Sequence[WeightInput] = ()
) -> FormsComparison:
    """Compare the form of ``graph`` that an engine is built from with the one that was ``run``.

    ``weights`` are those that the engine takes as inputs.
    """
    return _Comparison(graph, _Form(engine, weights), _Form(run)).result()


def load_form(path: Path) -> onnx.ModelProto:
    """The model at ``path`` without its weights."""
    return onnx.load(str(path), load_external_data=False)


@dataclass(frozen=True)
class _Weight:
    """The place of a weight. Its type follows from the operations around it."""

    file: str
    offset: int
    size_bytes: int


class _Form:
    """A model with its loop's body opened: no two values of it have one name."""

    def __init__(self, model: onnx.ModelProto, weights: Sequence[WeightInput] = ()) -> None:
        self.nodes: list[NodeProto] = []
        self.results: dict[str, str] = {}
        """Outputs of the model and of the loop's body: name → value."""
        self.weights: dict[str, _Weight] = {w.name: _Weight(Path(w.path).name, w.offset, w.size_bytes) for w in weights}
        self.constants: dict[str, np.ndarray] = {}
        self.model = model
        self._open(model.graph)
        self.producer = {name: (node, i) for node in self.nodes for i, name in enumerate(node.output)}
        self._is_size: dict[str, bool] = {}
        self.handed_over = self._handed_over()
        self.place = {value: (owner, i) for owner, values in self.handed_over.items() for i, value in enumerate(values)}

    def _open(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                place = _Weight(where["location"], int(where.get("offset", 0)), int(where["length"]))
                self.weights[tensor.name] = place
            else:
                self.constants[tensor.name] = numpy_helper.to_array(tensor)
        for node in graph.node:
            self.nodes.append(node)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self._open(attribute.g)
        self.results |= {output.name: output.name for output in graph.output}

    def base(self, value: str) -> str:
        """``value`` without the casts and copies on the way to it."""
        while value in self.producer:
            node, _ = self.producer[value]
            widens = node.op_type == "Cast" and _attributes(node)["to"] in _FLOATS and not self.is_size(node.input[0])
            if not widens and node.op_type != "Identity":
                break
            value = node.input[0]
        return value

    def is_size(self, value: str) -> bool:
        """Whether ``value`` follows from shapes alone."""
        if value not in self._is_size:
            self._is_size[value] = False
            if value in self.constants:
                found = self.constants[value].dtype == np.int64
            elif value in self.producer:
                node, _ = self.producer[value]
                of_sizes = node.op_type in _SIZES and all(self.is_size(name) for name in node.input)
                found = node.op_type == "Shape" or of_sizes
            else:
                found = False
            self._is_size[value] = found
        return self._is_size[value]

    def owner(self, value: str) -> str | None:
        """The operation of the graph that ``value`` is part of; None for leaves and sizes."""
        if value not in self.producer or self.is_size(value):
            return None
        node, _ = self.producer[value]
        return _owner(node)

    def _handed_over(self) -> dict[str, list[str]]:
        """Operation of the graph → its values that others read, in the order in which they are made."""
        read: set[str] = {self.base(value) for value in self.results.values()}
        for node in self.nodes:
            if node.op_type not in ("Cast", "Identity"):
                read |= {base for base in map(self.base, node.input) if self.owner(base) != _owner(node)}
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for value in node.output:
                owner = self.owner(value)
                if value in read and owner is not None:
                    found.setdefault(owner, []).append(value)
        return found


def _owner(node: NodeProto) -> str:
    """The lowering names nodes after the operation that they are made for."""
    name = str(node.name)
    if name.startswith("gemm_"):
        return name.removeprefix("gemm_")
    return name.rsplit("_", 1)[0].removesuffix("_plugin")


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {
        a.name: onnx.helper.get_attribute_value(a)
        for a in node.attribute
        if a.name not in _UP_TO_TYPE and a.type != onnx.AttributeProto.GRAPH
    }


@dataclass
class _Comparison:
    graph: Graph
    engine: _Form
    run: _Form
    same: int = 0
    evaluated: int = 0
    unknown: dict[str, None] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def result(self) -> FormsComparison:
        ours, theirs = self.engine.handed_over, self.run.handed_over
        if self.engine.results.keys() != self.run.results.keys():
            self.differences.append(f"outputs {sorted(self.engine.results)} and {sorted(self.run.results)}")
        for name, value in self.engine.results.items():
            if name in self.run.results and not self._alike(value, self.run.results[name], None):
                self.differences.append(f"output `{name}` is another value")
        for owner, values in ours.items():
            # An operation that only the engine's form has is a kernel in the place of several: its operands differ.
            others = theirs.get(owner, [])
            if len(values) == len(others) and all(map(lambda a, b: self._alike(a, b, owner), values, others)):
                self.same += 1
            else:
                self._written_differently(owner, values, others)
        missing = [owner for owner in theirs if owner not in ours]
        if missing and not any(node.domain for node in self.engine.nodes):
            self.differences.append(f"`{missing[0]}` is missing, and {len(missing) - 1} more")
        return FormsComparison(self.same, self.evaluated, tuple(self.unknown), tuple(self.differences))

    # -- written alike ------------------------------------------------------------------------------------------------

    def _alike(self, ours: str, theirs: str, owner: str | None) -> bool:
        """Two values of operation ``owner``: the same operations down to what other operations hand over."""
        waiting, seen = [(ours, theirs)], set[tuple[str, str]]()
        while waiting:
            a, b = waiting.pop()
            a, b = self.engine.base(a), self.run.base(b)
            if (a, b) in seen:
                continue
            seen.add((a, b))
            if a in self.engine.producer and b in self.run.producer:
                first, second = self.engine.owner(a), self.run.owner(b)
                if (first, second) not in ((owner, owner), (None, None)):
                    if not self._hands_over_alike(a, b):
                        return False
                    continue
                (left, i), (right, j) = self.engine.producer[a], self.run.producer[b]
                if (left.op_type, left.domain, i) != (right.op_type, right.domain, j):
                    return False
                if not _same_attributes(_attributes(left), _attributes(right)) or len(left.input) != len(right.input):
                    return False
                waiting += zip(left.input, right.input, strict=True)
            elif not self._leaf_alike(a, b):
                return False
        return True

    def _hands_over_alike(self, a: str, b: str) -> bool:
        """Two values of other operations: the same of the same one. Both are compared where they are made."""
        if self.engine.place.get(a) == self.run.place.get(b):
            return True
        made, _ = self.engine.producer[a]
        if made.domain:  # a kernel in the place of several operations
            self.unknown[made.op_type] = None
        return bool(made.domain)

    def _leaf_alike(self, a: str, b: str) -> bool:
        if a in self.engine.weights or b in self.run.weights:
            return self.engine.weights.get(a) == self.run.weights.get(b)
        if a in self.engine.constants and b in self.run.constants:
            return _same_array(self.engine.constants[a], self.run.constants[b])
        leaf = not (a in self.engine.producer or b in self.run.producer)
        return leaf and a == b and a not in self.engine.constants

    @cached_property
    def _dims(self) -> dict[str, int]:
        """A size of each dim of the graph, no two alike: a size that is computed wrongly is another number."""
        return {name: _SMALLEST + 2 * i for i, name in enumerate(sorted(_dim_names(self.graph)))}

    # -- written differently ------------------------------------------------------------------------------------------

    def _written_differently(self, owner: str, ours: Sequence[str], theirs: Sequence[str]) -> None:
        node = next((n for n in self.graph.nodes if n.name == owner), None)
        kinds = {self.engine.producer[v][0].op_type for v in ours if self.engine.producer[v][0].domain}
        if kinds or (node is None and any(n.domain for n in self.engine.nodes)):
            self.unknown |= dict.fromkeys(sorted(kinds) or [owner])
            return
        if node is None or len(ours) != 1 or len(theirs) != 1:
            self.differences.append(f"`{owner}` is not the operation that was run")
            return
        read = [_borders(form, value, owner) for form, value in ((self.engine, ours[0]), (self.run, theirs[0]))]
        if read[0] != read[1]:
            other = sorted(map(str, read[0] ^ read[1]))
            self.differences.append(f"`{owner}` reads other weights or values than the one that was run: {other[:2]}")
            return
        if is_op(node, *_NO_EVALUATOR):
            self.unknown[str(node.target)] = None
            return
        try:
            found, expected = (
                _evaluated(self.graph, node, form, value, self._dims)
                for form, value in ((self.engine, ours[0]), (self.run, theirs[0]))
            )
        except _REFUSED as error:
            self.differences.append(f"`{owner}` is written differently, and its two forms cannot be compared: {error}")
            return
        if found.size == expected.size:
            distance = np.linalg.norm(found.ravel() - expected.ravel())
            if distance <= EVALUATED_LIMIT * np.linalg.norm(expected):
                self.evaluated += 1
                return
        self.differences.append(f"`{owner}` computes something else than the one that was run")


def _borders(form: _Form, value: str, owner: str) -> set[tuple[str, Any]]:
    """Weights, inputs and values of other operations that ``value`` of operation ``owner`` is made of."""
    found: set[tuple[str, Any]] = set()
    for name in _walk(form, value, owner):
        of = form.owner(name)
        if name in form.weights:
            found.add(("weight", form.weights[name]))
        elif of is not None and of != owner:
            found.add(("value of", of))
        elif name not in form.producer and name not in form.constants:
            found.add(("input", name))
    return found


def _walk(form: _Form, value: str, owner: str) -> Iterator[str]:
    """Values that ``value`` is made of, up to those of other operations; casts and sizes are passed over."""
    waiting, seen = [form.base(value)], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or not name or form.is_size(name):
            continue
        seen.add(name)
        yield name
        if form.owner(name) == owner:
            waiting += map(form.base, form.producer[name][0].input)


# -- one operation by ONNX's reference evaluator ----------------------------------------------------------------------


def _evaluated(graph: Graph, node: Node, form: _Form, value: str, dims: Mapping[str, int]) -> np.ndarray:
    """Operation ``node`` of ``form`` in float32 on seeded operands; ValueError where an operand has no such form."""
    from onnx.reference import ReferenceEvaluator

    read = [*node.all_input_nodes, *_through_views(node)]
    operands = {weight_name(n) if is_weight(n) else n.name: n for n in read}
    feeds: dict[str, np.ndarray] = {}
    constants: dict[str, np.ndarray] = {}
    nodes: list[NodeProto] = []

    def visit(name: str) -> None:
        if not name or name in feeds or name in constants or any(name in made.output for made in nodes):
            return
        if name in form.constants:
            constants[name] = _wide(form.constants[name])
            return
        base, owner = form.base(name), form.owner(form.base(name))
        if base in form.weights or (owner is not None and owner != node.name) or base not in form.producer:
            known = operands.get(owner or base) or graph.inputs.get(base)
            if known is None:
                raise ValueError(f"`{base}` is not an operand that can be made up")
            feeds[name] = _random(known, dims)
            return
        made, _ = form.producer[name]
        for read in made.input:
            visit(read)
        nodes.append(_in_float32(made))

    visit(value)
    inputs = [onnx.helper.make_tensor_value_info(n, _onnx_type(a), None) for n, a in feeds.items()]
    outputs = [onnx.helper.make_tensor_value_info(value, TensorProto.FLOAT, None)]
    weights = [numpy_helper.from_array(a, n) for n, a in constants.items()]
    body = onnx.helper.make_graph(nodes, "operation", inputs, outputs, weights)
    model = onnx.helper.make_model(body, opset_imports=list(form.model.opset_import))
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(found, dtype=np.float64)


def _through_views(node: Node) -> Iterator[Node]:
    """Operands of the operands: a form may read past a cast."""
    for operand in node.all_input_nodes:
        yield from operand.all_input_nodes


def _dim_names(graph: Graph) -> set[str]:
    sizes = {size for n in graph.nodes if "spec" in n.meta for size in spec_of(n).shape if not isinstance(size, int)}
    return {s.name for size in sizes for s in size.free_symbols}


def _random(node: Node, dims: Mapping[str, int]) -> np.ndarray:
    """float32 values for ``node``; the same for both forms."""
    shape = [evaluate(size, dims) for size in spec_of(node).shape]
    if not spec_of(node).dtype.is_floating_point:
        return np.zeros(shape, np.int64)
    seed = sum(map(ord, node.name))
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _wide(array: np.ndarray) -> np.ndarray:
    """Floating constants in float32, as the narrower form has them; those of other types, and of FP8, as they are."""
    if array.dtype.name not in ("float32", "bfloat16", "float16"):
        return array
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def _onnx_type(array: np.ndarray) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _in_float32(node: NodeProto) -> NodeProto:
    """``node`` with float32 in the place of the narrow types that it may name."""
    result = NodeProto()
    result.CopyFrom(node)
    for attribute in list(result.attribute):
        if attribute.name in _UP_TO_TYPE:
            result.attribute.remove(attribute)
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in _FLOATS:
            attribute.i = TensorProto.FLOAT
    return result


# -- up to type -------------------------------------------------------------------------------------------------------


def _same_attributes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    if ours.keys() != theirs.keys():
        return False
    return all(_same_attribute(value, theirs[name]) for name, value in ours.items())


def _same_attribute(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, TensorProto) and isinstance(theirs, TensorProto):
        return _same_array(numpy_helper.to_array(ours), numpy_helper.to_array(theirs))
    return bool(ours == theirs)


def _same_array(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal once the wider is rounded to the type of the narrower."""
    if ours.shape != theirs.shape:
        return False
    if ours.dtype != theirs.dtype:
        if "float" not in ours.dtype.name or "float" not in theirs.dtype.name:
            return False
        narrow = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        ours, theirs = ours.astype(narrow), theirs.astype(narrow)
    return bool((ours == theirs).all() | ((ours != ours) & (theirs != theirs)).all())
