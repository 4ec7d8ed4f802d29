"""The model of an engine against the one that is run: whatever is changed in one of them alone is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from captured import captured
from onnx import numpy_helper
from tiny_cosmos import random_model, sources_of_model, tiny_config, weights_of_model

from cosmos_export.compiler.forms import close_loop
from cosmos_export.compiler.loop import loop_tables
from cosmos_export.evaluation.forms import FormsComparison, compare_forms
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.program import Program
from cosmos_export.passes.pipeline import default_passes, run_passes
from cosmos_export.sampling import CheckpointSampling, Overrides, resolve_schedule
from cosmos_export.targets.onnx.loop import lower_loop
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.weights import layout

SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
    "num_train_timesteps": 1000, "flow_shift": 1.0, "solver_order": 2, "use_karras_sigmas": True, "sigma_max": 200.0,
    "sigma_min": 0.147, "final_sigmas_type": "zero",
}  # fmt: skip


@pytest.fixture(scope="module")
def narrow() -> tuple[Program, Any]:
    """A tiny model that computes in bf16, and its weights."""
    config = tiny_config("omni", layers=1)
    model = random_model(config)
    program = captured(config, sources_of_model(model, torch.bfloat16))
    run_passes(program, default_passes())
    return program, weights_of_model(model)


def forms(graph: Graph) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    places = layout(node.meta["weight"] for node in graph.weights.values())
    return lower(graph, places, "x.weights"), lower(graph, places, "x.weights", compute=torch.float32)


@pytest.mark.parametrize("name", ["reasoner", "conditioning", "schedule", "generator"])
def test_both_forms_of_a_graph_are_alike(narrow: tuple[Program, Any], name: str) -> None:
    graph = narrow[0].graphs[name]
    found = compare_forms(graph, *forms(graph))
    assert (found.differences, found.unknown, found.evaluated) == ((), (), 0)
    assert found.same > 10


def weights_swapped(model: onnx.ModelProto) -> None:
    norms = [i for i in model.graph.initializer if i.external_data and len(i.dims) == 1]
    first, second = next((a, b) for a in norms for b in norms if a.name < b.name and a.dims == b.dims)
    places = [[entry.value for entry in i.external_data] for i in (first, second)]
    for one, values in ((first, places[1]), (second, places[0])):
        for entry, value in zip(one.external_data, values, strict=True):
            entry.value = value


def node_of(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


def operands_swapped(model: onnx.ModelProto) -> None:
    node = node_of(model, "Attention")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def attribute_changed(model: onnx.ModelProto) -> None:
    next(a for a in node_of(model, "RMSNormalization").attribute if a.name == "epsilon").f = 1e-3


def another_operation(model: onnx.ModelProto) -> None:
    node_of(model, "Add").op_type = "Mul"


def outputs_swapped(model: onnx.ModelProto) -> None:
    first, second = [node for node in model.graph.node if node.op_type == "Identity"][:2]
    first.input[0], second.input[0] = second.input[0], first.input[0]


def constant_changed(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        value = None if tensor.external_data else numpy_helper.to_array(tensor)
        if value is not None and value.dtype.name == "bfloat16" and value.size == 1 and float(value) not in (0, 1):
            tensor.CopyFrom(numpy_helper.from_array((value * np.asarray(1.01)).astype(value.dtype), tensor.name))
            return
    raise AssertionError("no such constant")


FAULTS: Mapping[str, Callable[[onnx.ModelProto], None]] = {
    "weights swapped": weights_swapped,
    "operands swapped": operands_swapped,
    "attribute changed": attribute_changed,
    "another operation": another_operation,
    "outputs swapped": outputs_swapped,
    "constant changed": constant_changed,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_model_of_the_engine_is_found(narrow: tuple[Program, Any], fault: str) -> None:
    graph = narrow[0].graphs["generator"]
    engine, run = forms(graph)
    FAULTS[fault](engine)
    assert compare_forms(graph, engine, run).differences


# -- written differently: attention in a loop -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop(narrow: tuple[Program, Any]) -> Callable[[], tuple[Graph, onnx.ModelProto, onnx.ModelProto]]:
    program, weights = narrow
    stated = CheckpointSampling(SCHEDULER, native=True)
    schedule = resolve_schedule(stated, "t2v", Overrides(steps=3, guidance=3.0, guidance_interval=(0.0, 1000.0)))
    ((_, closed),) = close_loop(program, schedule).items()
    graph, tables = closed.graphs[closed.loop.body], loop_tables(closed, schedule, weights)
    places = layout(node.meta["weight"] for node in graph.weights.values())

    def both() -> tuple[Graph, onnx.ModelProto, onnx.ModelProto]:
        engine = lower_loop(graph, closed.loop, tables, places, "x.weights", explicit_attention=True)
        run = lower_loop(graph, closed.loop, tables, places, "x.weights", compute=torch.float32)
        return graph, engine, run

    return both


def test_attention_that_is_written_out_is_evaluated(loop: Any) -> None:
    found: FormsComparison = compare_forms(*loop())
    assert (found.differences, found.unknown) == ((), ())
    assert found.evaluated == 2  # one layer, two branches


def step_of(model: onnx.ModelProto) -> onnx.GraphProto:
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    return next(a for a in loop.attribute if a.name == "body").g


@pytest.mark.parametrize("axis", [-1, 0])
def test_attention_that_is_written_out_wrongly_is_found(loop: Any, axis: int) -> None:
    graph, engine, run = loop()
    softmax = next(node for node in step_of(engine).node if node.op_type == "Softmax")
    product = next(node for node in step_of(engine).node if node.output[0] == softmax.input[0])
    if axis == 0:
        softmax.attribute[0].i = 0
    else:  # scaled twice
        scaled = next(node for node in step_of(engine).node if node.op_type == "Mul" and node.name[:5] == "joint")
        scaled.op_type = "Sub"
    assert product.op_type == "MatMul"
    assert any("computes something else" in text for text in compare_forms(graph, engine, run).differences)


@pytest.mark.parametrize("table", ["time_embedding_table", "coefficients_table"])
def test_a_table_of_the_loop_that_was_changed_is_found(loop: Any, table: str) -> None:
    graph, engine, run = loop()
    tensor = next(t for t in engine.graph.initializer if t.name.startswith(table))
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), tensor.name))
    assert compare_forms(graph, engine, run).differences
