"""The law of cutting: the pieces one after the other compute what the whole graph computes, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from quantized import Tiny

from cosmos_export.diagnostics import InternalError
from cosmos_export.ir.dims import bind
from cosmos_export.ir.graph import Graph, Node, spec_of
from cosmos_export.ir.interpreter import run_graph
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.ir.text import print_program
from cosmos_export.passes.cut_graph import cut, narrow_places
from cosmos_export.passes.options import PassOptions
from cosmos_export.passes.pipeline import passes_of, run_passes
from cosmos_export.progress import Silent
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.weights import layout, size_bytes, write_weights
from cosmos_export.targets.partition import partition

pytestmark = pytest.mark.xdist_group("cut")
SIZES = {"und_len": 64, "frames": 4, "height": 8, "width": 8, "sound_len": 16, "action_len": 16}
CUT = ("reasoner", "generator")


@pytest.fixture(scope="module", params=["omni", "edge"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp(request.param))


def places_of(graph: Graph, share: float) -> list[Node]:
    """Where ``graph`` is cut so that no piece has more than ``share`` of its weights."""
    first, places = narrow_places(graph, SIZES, lambda node: size_bytes(node.meta["weight"]))
    sizes = [first, *(place.weight_size for place in places)]
    cuts = partition(sizes, [0.0, *(float(place.crossing_bytes) for place in places)], share * sum(sizes))
    return [places[cut - 1].node for cut in cuts]


def cut_program(program: Program, share: float) -> Program:
    """A copy of ``program`` by the pass, with both towers cut."""
    copy = program.copy()
    options = PassOptions(cuts=lambda name, graph: places_of(graph, share) if name in CUT else ())
    (report,) = run_passes(copy, passes_of(options, "cut"))
    assert report.result.changes["pieces"] == len(copy.graphs) - len(program.graphs) + len(CUT)
    return copy


def pieces_of(program: Program, name: str, share: float) -> list[Graph]:
    return [graph for piece, graph in cut_program(program, share).graphs.items() if piece.startswith(f"{name}_part_")]


def binding_of(program: Program, tiny: Tiny) -> dict[str, int]:
    return bind(
        (name, spec_of(node).shape, tuple(tiny.wide[name].shape))
        for graph in program.graphs.values()
        for name, node in graph.inputs.items()
        if name in tiny.wide
    )


def whole_run(program: Program, tiny: Tiny) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs and outputs of every graph, by the interpreter."""
    binding, results = binding_of(program, tiny), dict[str, dict[str, torch.Tensor]]()
    for name, graph in program.graphs.items():
        given = {i: tiny.wide[i] for i in program.free_inputs(name)}
        given |= {e.input: results[e.source][e.output] for e in program.edges_into(name)}
        made = run_graph(graph, given, tiny.weights, binding, compute=torch.float32)
        results[name] = given | made
    return results


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("share", [0.6, 0.3, 0.0])
def test_chained_is_whole_in_the_interpreter(tiny: Tiny, scheme: str, share: float) -> None:
    program = tiny.quantized(scheme) if scheme != "bf16" else tiny.program
    binding, expected = binding_of(program, tiny), whole_run(program, tiny)
    for name in CUT:
        graph = program.graphs[name]
        pieces = pieces_of(program, name, share)
        assert len(pieces) > (3 if share == 0 else 1)
        known = {i: expected[name][i] for i in graph.inputs}
        for piece in pieces:
            known |= run_graph(piece, known, tiny.weights, binding, compute=torch.float32)
        for output in graph.outputs:
            assert torch.equal(known[output], expected[name][output]), (name, output)
        assert sum(len(piece.calls()) for piece in pieces) == len(graph.calls())


@pytest.mark.parametrize("scheme", ["bf16", "fp8"])
def test_a_cut_program_runs_by_its_edges(tiny: Tiny, scheme: str) -> None:
    """Edges reach the pieces that make and read a value, and what crosses has its own."""
    program = tiny.quantized(scheme) if scheme != "bf16" else tiny.program
    expected = whole_run(program, tiny)
    pieces = cut_program(program, 0.3)
    found = whole_run(pieces, tiny)
    made = {name: value for graph in found.values() for name, value in graph.items()}
    for output in program.graphs["generator"].outputs:
        assert torch.equal(made[output], expected["generator"][output]), output
    assert pieces.loop.body == list(pieces.graphs)[-1]
    again = pieces.copy()
    run_passes(again, passes_of(PassOptions(cuts=lambda *_: ()), "cut"))
    assert print_program(again) == print_program(pieces)


def session(model: onnx.ModelProto, path: Path) -> onnxruntime.InferenceSession:
    onnx.save(model, path)
    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # What is fused across a cut is not fused at it, and rounds differently.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("scheme", ["bf16", "fp8"])
def test_chained_is_whole_in_onnx_runtime(tiny: Tiny, scheme: str) -> None:
    program = tiny.quantized(scheme) if scheme != "bf16" else tiny.program
    inputs = whole_run(program, tiny)
    for name in CUT:
        graph = program.graphs[name]
        stored = layout(node.meta["weight"] for node in graph.weights.values())
        write_weights(tiny.folder / "cut.bin", stored, "weights", Silent())

        def run(one: Graph, given: dict[str, Any], stored: Any = stored) -> dict[str, np.ndarray]:
            found = session(lower(one, stored, "cut.bin", compute=torch.float32), tiny.folder / "one.onnx")
            names = [output.name for output in found.get_outputs()]
            results = found.run(names, {i.name: given[i.name] for i in found.get_inputs()})
            return dict(zip(names, results, strict=True))

        known: dict[str, Any] = {i: inputs[name][i].numpy() for i in graph.inputs}
        whole = run(graph, known)
        for piece in pieces_of(program, name, 0.3):
            known |= run(piece, known)
        for output in graph.outputs:
            assert np.array_equal(known[output], whole[output]), (name, output)


def test_what_crosses_is_the_stream_and_tables(tiny: Tiny) -> None:
    """One value a row, no wider than the model, where a piece takes attention whole."""
    hidden = tiny.config["hidden_size"]
    for name in CUT:
        pieces = pieces_of(tiny.program, name, 0.36)
        own = set(tiny.program.graphs[name].inputs)
        for piece in pieces[1:]:
            crossing = [spec_of(node) for i, node in piece.inputs.items() if i not in own]
            widths = [math.prod(size for size in spec.shape if isinstance(size, int)) for spec in crossing]
            assert widths.count(hidden) == 1
            assert sum(widths) <= hidden + 2 * tiny.config["head_dim"], list(piece.inputs)


def test_partition() -> None:
    assert partition([1, 1, 1, 1], [0, 1, 1, 1], 4) == []
    assert partition([1, 1, 1, 1], [0, 1, 1, 1], 2) == [2]
    assert partition([1, 1, 1, 1], [0, 1, 9, 1], 3) == [1]
    assert partition([5, 1, 1, 1], [0, 1, 1, 1], 3) == [1]
    assert partition([1, 9, 1], [0, 1, 1], 3) == [1, 2]
    assert partition([0, 9, 0, 1], [0, 1, 1, 1], 3) in ([2], [3])
    assert partition([2, 2, 2, 2, 2], [0, 1, 1, 1, 1], 4) in ([1, 3], [2, 4], [2, 3])


def test_cutting_nowhere_is_the_graph(tiny: Tiny) -> None:
    graph = tiny.program.graphs["generator"]
    (whole,) = cut(graph, [], ["generator"])
    assert list(whole.inputs) == [i for i, node in graph.inputs.items() if node.users]
    assert list(whole.outputs) == list(graph.outputs)
    assert [n.name for n in whole.calls()] == [n.name for n in graph.calls()]


def small() -> tuple[Graph, Any, Any, Any]:
    """neg(x), relu of it, and their sum."""
    graph = Graph("g")
    x = graph.add_input("x", TensorSpec(torch.float32, (4,)))
    neg = graph.call(aten.neg.default, x)
    relu = graph.call(aten.relu.default, x)
    return graph, x, neg, relu


def run_cut(graph: Graph, before: Any) -> dict[str, torch.Tensor]:
    """The pieces one after the other, by name as a runtime does it."""
    given = {"x": torch.tensor([1.0, -2.0, 3.0, 0.5])}
    made: dict[str, torch.Tensor] = {}
    for piece in cut(graph, [before], ["a", "b"]):
        results = run_graph(piece, {name: given[name] for name in piece.inputs}, lambda _: torch.zeros(0), {})
        made |= {name: value for name, value in results.items() if name in graph.outputs}
        given |= results
    return made


def test_an_output_that_is_an_input_is_handed_out() -> None:
    graph, x, neg, relu = small()
    total = graph.call(aten.add.Tensor, neg, relu)
    graph.set_outputs({"y": total, "same": x})
    made = run_cut(graph, relu)
    torch.testing.assert_close(made["same"], torch.tensor([1.0, -2.0, 3.0, 0.5]), rtol=0, atol=0)
    torch.testing.assert_close(made["y"], torch.tensor([0.0, 2.0, 0.0, 0.0]), rtol=0, atol=0)


def test_an_output_called_like_another_value_is_that_output() -> None:
    graph, _, neg, relu = small()
    total = graph.call(aten.add.Tensor, neg, relu)
    graph.set_outputs({"y": total, neg.name: relu})
    made = run_cut(graph, total)
    torch.testing.assert_close(made[neg.name], torch.tensor([1.0, 0.0, 3.0, 0.5]), rtol=0, atol=0)
    torch.testing.assert_close(made["y"], torch.tensor([0.0, 2.0, 0.0, 0.0]), rtol=0, atol=0)
    graph.set_outputs({"y": total, "x": relu})
    with pytest.raises(InternalError, match="an input and another output"):
        run_cut(graph, total)
