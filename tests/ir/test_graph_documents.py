"""Documents of graphs come from whoever wrote a bundle: nothing in one is evaluated, and nothing in one takes long."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from tiny_cosmos import Compiled

from cosmos_export.bench.geometry import read_graphs
from cosmos_export.diagnostics import UserError
from cosmos_export.ir import size_trees
from cosmos_export.ir.dims import expression, symbol
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.ops import aten
from cosmos_export.ir.serialize import graph_document, read_graph
from cosmos_export.ir.spec import TensorSpec, Transform, WeightBinding, WeightSource
from cosmos_export.targets.onnx.weights import layout

Place = tuple[str | int, ...]


def document_of(graph: Graph) -> dict[str, Any]:
    stored = layout(node.meta["weight"] for node in graph.weights.values())
    document = graph_document(graph, f"{graph.name}.weights", lambda b: (stored[b].offset, stored[b].size_bytes))
    return dict(json.loads(json.dumps(document)))


def small() -> dict[str, Any]:
    """A document with every kind of field: inputs, weights, constants, operands of all types."""
    graph = Graph("small")
    rows = symbol("rows")
    source = WeightSource("w", Path("w.safetensors"), 0, torch.float32, (4, 4))
    x = graph.add_input("x", TensorSpec(torch.float32, (2 * rows**2 + 1, 4)))
    w = graph.add_weight("w", WeightBinding((source,), Transform.IDENTITY, torch.float32))
    c = graph.add_constant("c", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    y = graph.call(aten.add.Tensor, graph.call(aten.linear.default, x, w), c)
    y = graph.call(aten._to_copy.default, graph.call(aten.clamp.default, y, -1.5, 2), dtype=torch.bfloat16)
    y = graph.call(aten.slice.Tensor, y, 0, 1, 2 * rows**2 + 1)
    y = graph.call(aten.mean.dim, graph.call(aten.view.default, y, [2, rows**2, 4]), [2], True)
    graph.set_outputs({"y": graph.call(aten.cat.default, [y, y], 2)})
    return document_of(graph)


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every leaf of a document, and every object and list in it."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def value_at(document: Any, place: Place) -> Any:
    for key in place:
        document = document[key]
    return document


def with_value(document: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    value_at(changed, place[:-1])[place[-1]] = value
    return changed


def with_key(document: dict[str, Any], place: Place, key: str) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    inside = value_at(changed, place[:-1])
    inside[key] = inside.pop(place[-1])
    return changed


def at_depth(levels: int) -> str:
    return '{"add":[' * levels + "1" + "]}" * levels


def refused(document: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_graph(document, Path())
    assert caught.value.code == "CX231"
    return caught.value.message


def changed_by(document: dict[str, Any], code: str, *, thorough: bool) -> Iterator[tuple[Place, dict[str, Any]]]:
    """``document`` with code in the place of every value and of every key, in all forms or in the plain one."""
    for place in places(document):
        old = value_at(document, place)
        if not place or not (thorough or isinstance(old, str | int | float)):
            continue
        forms = [code, f"x={code}", [code], {"add": [f"0*{code}", 1]}, {"dim": code}, {"node": code}]
        yield from ((place, with_value(document, place, form)) for form in (forms if thorough else forms[:1]))
        if thorough and isinstance(place[-1], str):
            yield place, with_key(document, place, code)


@pytest.mark.parametrize("thorough", [True, False])
def test_no_text_of_a_document_is_code(omni: Compiled, tmp_path: Path, thorough: bool) -> None:
    """A document with all kinds of fields thoroughly, and every value of a real one."""
    document = small() if thorough else document_of(omni.final.graphs["conditioning"])
    read_graph(document, Path())
    mark = tmp_path / "ran"
    read, tried = set(), 0
    for place, changed in changed_by(document, f"__import__('os').mkdir({str(mark)!r})", thorough=thorough):
        tried += 1
        try:
            read_graph(changed, Path())
            read.add(place)
        except UserError as error:
            assert error.code == "CX231", (place, error)
        assert not mark.exists(), place
    assert tried > 300
    assert {(place[0], place[-1]) for place in read} == {("weights", "key")}, "what says where a weight is from is text"


@pytest.mark.parametrize("value", [None, True, -1, 1.5, 1e308, 2**63, "x", "", [], {}, {"node": "nothing"}])
def test_every_place_takes_its_own_type_alone(value: Any) -> None:
    """Whatever is put in a place, the answer is a graph or CX231."""
    document, kept = small(), []
    for place in places(document):
        if place:
            try:
                read_graph(with_value(document, place, value), Path())
                kept.append(place)
            except UserError as error:
                assert error.code == "CX231", (place, error)
    shapes = [place for place in kept if place[-2:-1] == ("shape",)]
    assert not shapes, f"sizes that are none were read: {shapes}"


def sized(size: Any) -> dict[str, Any]:
    return with_value(small(), ("inputs", 0, "shape", 0), size)


A_DIM = {"dim": "n"}


def deep(kind: str, depth: int) -> Any:
    size: Any = A_DIM
    for _ in range(depth):
        size = {kind: [size, 2]}
    return size


def many(count: int) -> dict[str, Any]:
    return {"add": [{"dim": f"n{i}"} for i in range(count)]}


@pytest.mark.parametrize(
    "size",
    [
        {"pow": [9, {"pow": [9, {"pow": [9, 9]}]}]},
        {"pow": [A_DIM, 10**9]},
        {"pow": [A_DIM, -1]},
        {"pow": [2, 64]},
        {"pow": [A_DIM, A_DIM]},
        deep("pow", 12),
        deep("pow", 200),
        deep("add", 200),
        {"mul": [many(9)] * 20},
        {"pow": [many(20), 30]},
        {"add": [many(100)]},
        {"mul": [2**62, 2**62]},
        {"mul": [-1, A_DIM]},
        {"floordiv": [A_DIM, 0]},
        {"floordiv": [A_DIM, A_DIM]},
        {"floordiv": [A_DIM]},
        {"add": []},
        {"add": [1], "mul": [1]},
        {"sub": [1, 1]},
        {"dim": "lambda"},
        {"dim": "n\n"},
        {"dim": "n" * 1000},
        {"dim": 3},
        -5,
        2.5,
        True,
        1e308,
        2**64,
        "4",
        None,
    ],
)
def test_sizes_that_are_none_are_refused_at_once(size: Any) -> None:
    document, start = sized(size), time.monotonic()
    refused(document)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("levels", [20, 100, 300, 450, 480, 490])
def test_nesting_is_refused_or_read(levels: int) -> None:
    """As deep as a reader of JSON goes: nothing that follows it runs out of stack."""
    text = json.dumps(sized("SIZE")).replace('"SIZE"', at_depth(levels))
    try:
        document = json.loads(text)
    except RecursionError:
        return
    if levels <= size_trees.MAX_DEPTH:
        read_graph(document, Path())
    else:
        refused(document)
        refused(document | {"outputs": document["inputs"]})


def test_sizes_of_a_document_come_back() -> None:
    rows = symbol("rows")
    assert read_graph(small(), Path()).inputs["x"].meta["spec"].shape == (2 * rows**2 + 1, 4)


def with_constant(values: Any, dtype: str = "float32") -> dict[str, Any]:
    changed = with_value(small(), ("constants", 0, "values"), values)
    return with_value(changed, ("constants", 0, "dtype"), dtype)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (with_value(small(), ("weights", 0, "name"), {"a": 1}), "field `name` is"),
        (with_value(small(), ("weights", 0, "name"), "x"), "two values have the name"),
        (with_value(small(), ("weights", 0, "name"), "w=print()"), "not a name"),
        (with_value(small(), ("weights", 0, "name"), "class"), "not a name"),
        (with_value(small(), ("weights", 0, "offset"), -8), "bytes for"),
        (with_value(small(), ("weights", 0, "offset"), True), "field `offset`"),
        (with_value(small(), ("weights", 0, "size_bytes"), 63), "63 bytes for"),
        (with_value(small(), ("weights", 0, "shape"), [{"dim": "n"}, 4]), "not of fixed sizes"),
        (with_value(small(), ("weights_file",), "../w"), "not a name"),
        (with_value(small(), ("weights_file",), ".w"), "not a name"),
        (with_value(small(), ("name",), "a/b"), "not a name"),
        (with_value(small(), ("outputs", "y"), "later"), "comes before"),
        (with_value(small(), ("operations", 0, "op"), "aten.system"), "not in the dialect"),
        (with_constant([1.0, 2.0, 3.0]), "has 3 numbers"),
        (with_constant([1.0, 2.0, 3.0, "4"]), "not float32"),
        (with_constant([1.0, 2.0, 3.0, 1e300]), "not float32"),
        (with_constant([1, 2, 3, 2**40], "int32"), "not int32"),
        (with_constant([1, 2, 3, 4], "bool"), "not bool"),
        (with_constant([1, 2, 3, 4], "int4"), "not int4"),
        ([], "not an object"),
        ({}, "schema"),
        (small() | {"schema": 2}, "schema"),
        (small() | {"more": 1}, "unknown field"),
    ],
)
def test_what_is_wrong_is_said(document: Any, said: str) -> None:
    assert said in refused(document)


def test_sizes_in_code_are_numbers_and_expressions() -> None:
    assert expression(3) == sympy.Integer(3) and expression(symbol("n")) is symbol("n")
    for value in ("3", "__import__('os')", True, 2.5, None, [1]):
        with pytest.raises(TypeError):
            expression(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        TensorSpec(torch.float32, ("__import__('os')",))  # type: ignore[arg-type]


def test_growing_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that operations make are bounded as those of the document are."""
    graph = Graph("growing")
    x = graph.add_input("x", TensorSpec(torch.float32, (2, 3)))
    for _ in range(80):
        x = graph.call(aten.cat.default, [x, x], 0)
    graph.set_outputs({"y": x})
    assert "outside 0" in refused(document_of(graph))
    monkeypatch.setattr(size_trees, "MAX_SIZES", 1)
    assert "different sizes" in refused(small())


@pytest.mark.parametrize(
    "text", ['{"step-guided": 3}', '{"step-plain": {}}', '{"other": {}}', '{"step-plain": {"graphs": {"a": "../x"}}}']
)
def test_what_joins_graphs_is_read_as_strictly(tmp_path: Path, text: str) -> None:
    (tmp_path / "programs.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_graphs(tmp_path)
    assert caught.value.code == "CX671" and "benchmarks/geometry.py" in caught.value.hint
