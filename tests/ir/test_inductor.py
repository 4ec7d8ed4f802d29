"""Compiled graphs equal the reference, and a graph survives being written down."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_denoise_loop import case_of, closed, schedule
from tiny_cosmos import Compiled, Tensors, assert_close, request

from cosmos_export.ir.dims import bind, evaluate
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.ir.interpreter import run_graph
from cosmos_export.ir.program import Loop, Program
from cosmos_export.ir.serialize import graph_document, read_graph
from cosmos_export.ir.spec import WeightBinding
from cosmos_export.ir.text import print_program
from cosmos_export.passes.batch_guidance import NEGATIVE_LEN
from cosmos_export.targets.inductor.executable import Captured, Executable, Function, Steps, unrolled
from cosmos_export.targets.inductor.specialise import CompileSettings, specialise
from cosmos_export.targets.onnx.weights import layout

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")


def written(graph: Graph, folder: Path = Path()) -> tuple[Graph, dict[str, WeightBinding]]:
    """``graph`` through its document, and the binding that each weight had."""
    stored = layout(node.meta["weight"] for node in graph.weights.values())
    document = graph_document(graph, f"{graph.name}.weights", lambda b: (stored[b].offset, stored[b].size_bytes))
    again = read_graph(json.loads(json.dumps(document)), folder)
    return again, {name: node.meta["weight"] for name, node in graph.weights.items()}


def inputs_of(graph: Graph, compiled: Compiled, known: Tensors, prompts: tuple[int, int] = (7, 5)) -> Tensors:
    """Random values for what the request does not say: keys, values, sampler state."""
    generator = torch.Generator().manual_seed(3)
    binding = dict(zip(("und_len", NEGATIVE_LEN), prompts, strict=True))
    binding |= bind((n, spec_of(node).shape, tuple(known[n].shape)) for n, node in graph.inputs.items() if n in known)
    for name, node in compiled.final.graphs["generator"].inputs.items():
        if name in known:
            binding |= bind([(name, spec_of(node).shape, tuple(known[name].shape))])
    found = {}
    for name, node in graph.inputs.items():
        spec = spec_of(node)
        shape = [evaluate(size, binding) for size in spec.shape]
        found[name] = known[name] if name in known else torch.randn(shape, generator=generator).to(spec.dtype)
    return found


def requested(compiled: Compiled, program: Program) -> Tensors:
    known = request(compiled.config, case_of(compiled))
    latents = {name.removesuffix("_latent"): known[name] for name in known if name.endswith("_latent")}
    state = {f"{n}_{s}": torch.randn(t.shape) for n, t in latents.items() for s in ("sample", "last", "m0", "m1")}
    return known | state


@pytest.mark.parametrize("graph", ["reasoner", "conditioning", "generator", "denoise"])
def test_a_graph_survives_its_document(compiled: Compiled, graph: str) -> None:
    program = closed(compiled, schedule()) if graph == "denoise" else compiled.final
    original = program.graphs["generator" if graph == "denoise" else graph]
    again, bindings = written(original)
    assert list(again.inputs) == list(original.inputs) and list(again.outputs) == list(original.outputs)
    assert [spec_of(a) for a in again.calls()] == [spec_of(b) for b in original.calls()]
    once_more, _ = written(again)
    first, second = (print_of(g) for g in (again, once_more))
    assert first == second
    inputs = inputs_of(original, compiled, requested(compiled, program))
    by_key = {str(b): compiled.weights(b) for b in bindings.values()}
    found = run_graph(again, inputs, lambda binding: by_key[binding.keys[0]])
    assert_close(found, run_graph(original, inputs, compiled.weights), 0.0, graph)


def print_of(graph: Graph) -> str:
    program = Program({graph.name: graph}, {}, {}, _NO_LOOP)
    return print_program(program)


_NO_LOOP = Loop("", {})


def executable(graph: Graph, model: Compiled, device: torch.device = CPU, **settings: Any) -> Executable:
    weights = {name: model.weights(node.meta["weight"]).to(device) for name, node in graph.weights.items()}
    return Executable(graph, weights, device, CompileSettings(**settings))


def on(device: torch.device, tensors: Tensors) -> Tensors:
    return {name: t.to(device) for name, t in tensors.items()}


@pytest.mark.parametrize("graph", ["reasoner", "conditioning", "generator", "denoise"])
def test_specialised_graphs_are_the_graphs(compiled: Compiled, graph: str) -> None:
    program = closed(compiled, schedule()) if graph == "denoise" else compiled.final
    own = program.graphs["generator" if graph == "denoise" else graph]
    inputs = inputs_of(own, compiled, requested(compiled, program))
    found = executable(own, compiled, compiled=False)(inputs)
    assert_close(found, run_graph(own, inputs, compiled.weights), 2e-6, graph)


@needs_compiler
def test_compiled_graphs_equal_the_reference(compiled: Compiled) -> None:
    """The body of the closed loop: both branches, guidance and sampler."""
    program = closed(compiled, schedule())
    body = program.graphs["generator"]
    inputs = inputs_of(body, compiled, requested(compiled, program))
    own = executable(body, compiled)
    assert_close(own(inputs), run_graph(body, inputs, compiled.weights), 5e-6)


@needs_compiler
@pytest.mark.parametrize("graph", ["reasoner", "denoise"])
def test_a_prompt_of_another_length_compiles_nothing(compile_tiny: Any, graph: str) -> None:
    model = compile_tiny("omni")
    program = closed(model, schedule()) if graph == "denoise" else model.final
    own = program.graphs["generator" if graph == "denoise" else graph]
    run = executable(own, model, open_dims=frozenset({"und_len", NEGATIVE_LEN}))
    counted = torch._dynamo.utils.counters["stats"]
    before, graphs = counted["unique_graphs"], []
    for lengths in ((7, 5), (12, 9), (31, 2)):
        known = requested(model, program)
        if graph == "reasoner":
            known = {"input_ids": torch.arange(lengths[0]) % 50}
        inputs = inputs_of(own, model, known, lengths)
        assert_close(run(inputs), run_graph(own, inputs, model.weights), 5e-6, str(lengths))
        graphs.append(counted["unique_graphs"])
    assert before < graphs[0] == graphs[1] == graphs[2]


def test_sizes_that_come_again_are_captured(compile_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And at most two at a time: each has memory of its own."""
    model, made = compile_tiny("omni"), list[int]()

    class Counted(Emulated):
        def _capture(self, function: Function, warm: Function) -> tuple[Callable[[], None], Tensors]:
            made.append(self._inputs["input_ids"].numel())
            return super()._capture(function, warm)

    monkeypatch.setattr("cosmos_export.targets.inductor.executable.Captured", Counted)
    monkeypatch.setattr(Executable, "_captures", property(lambda self: True))
    own = model.final.graphs["reasoner"]
    run = executable(own, model, compiled=False)
    captured = []
    for length in (7, 5, 7, 9, 7, 9, 5, 9, 5):
        inputs = {"input_ids": (torch.arange(length) * 3) % 50}
        assert_close(run(inputs), run_graph(own, inputs, model.weights), 2e-6, str(length))
        captured.append(list(made))
    assert captured == [[], [], [7], [7], [7], [7, 9], *[[7, 9, 5]] * 3]
    assert [dict(key[1])["input_ids"] for key in run._captured] == [(9,), (5,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("graph", ["reasoner", "denoise"])
def test_on_the_gpu_graphs_equal_the_reference(compile_tiny: Any, graph: str, attention: str) -> None:
    """Compiled, captured and replayed, for prompts of several lengths in turn."""
    model, gpu = compile_tiny("omni"), torch.device("cuda")
    program = closed(model, schedule()) if graph == "denoise" else model.final
    own = program.graphs["generator" if graph == "denoise" else graph]
    run = executable(own, model, gpu, open_dims=frozenset({"und_len", NEGATIVE_LEN}), attention=attention)
    for lengths in ((7, 5), (12, 9), (7, 5), (7, 5), (12, 9), (31, 2), (7, 5)):
        known = requested(model, program)
        if graph == "reasoner":
            known = {"input_ids": torch.arange(lengths[0]) % 50}
        inputs = inputs_of(own, model, known, lengths)
        assert_close(on(CPU, run(on(gpu, inputs))), run_graph(own, inputs, model.weights), 1e-4, str(lengths))
    assert len(run._captured) == 2


def repeated(compile_tiny: Any) -> tuple[Compiled, Graph]:
    model = compile_tiny("omni")
    return model, model.final.graphs["generator"]


def test_sizes_are_checked_in_every_call(compile_tiny: Any) -> None:
    """Also once there is code that takes any number of the prompt's rows."""
    model, own = repeated(compile_tiny)
    run = executable(own, model, compiled=False, open_dims=frozenset({"und_len"}))
    inputs = inputs_of(own, model, requested(model, model.final))
    run(inputs)
    (longer, *_) = [name for name in inputs if name.startswith("key_")]
    wrong = torch.cat((inputs[longer], inputs[longer]))
    with pytest.raises(ValueError, match="und_len"):
        run({**inputs, longer: wrong})
    with pytest.raises(ValueError, match="rank"):
        run({**inputs, longer: wrong[None]})


def test_an_executable_goes_with_its_last_name(compile_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights take most of a GPU, and the next graph's must fit: no collector is waited for."""

    class Held(Captured):
        def _capture(self, function: Function, warm: Function) -> tuple[Callable[[], None], Tensors]:
            return (lambda: None), function(self._inputs)

    monkeypatch.setattr("cosmos_export.targets.inductor.executable.Captured", Held)
    monkeypatch.setattr(Executable, "_captures", property(lambda self: True))
    model = compile_tiny("omni")
    own = model.final.graphs["reasoner"]
    weights = {name: model.weights(node.meta["weight"]).clone() for name, node in own.weights.items()}
    run = Executable(own, weights, CPU, CompileSettings(compiled=False))
    for _ in range(3):
        run({"input_ids": torch.arange(7)})
    assert run._captured
    gone = [weakref.ref(run), weakref.ref(next(iter(weights.values())))]
    gc.collect()
    gc.disable()
    try:
        del run, weights
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_without_memory_for_a_captured_graph(compile_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that cannot be captured run as they are; what is captured makes room for what cannot run beside it."""
    tried = list[int]()

    class Large(Emulated):
        def _capture(self, function: Function, warm: Function) -> tuple[Callable[[], None], Tensors]:
            tried.append(self._inputs["input_ids"].numel())
            if tried[-1] > 8:
                try:
                    raise torch.OutOfMemoryError("captured")
                finally:
                    raise RuntimeError("the end of the capture failed")  # as PyTorch's does
            return super()._capture(function, warm)

    monkeypatch.setattr("cosmos_export.targets.inductor.executable.Captured", Large)
    monkeypatch.setattr(Executable, "_captures", property(lambda self: True))
    model = compile_tiny("omni")
    own = model.final.graphs["reasoner"]
    run = executable(own, model, compiled=False)
    for length in (7, 7, 9, 9, 9, 9):
        inputs = {"input_ids": torch.arange(length)}
        assert_close(run(inputs), run_graph(own, inputs, model.weights), 2e-6)
    assert tried == [7, 9] and len(run._captured) == 1

    def needs_room(inputs: Mapping[str, torch.Tensor]) -> Tensors:
        if run._captured:
            raise torch.OutOfMemoryError("beside what is captured")
        return {"found": inputs["input_ids"]}

    found = run._run((None, (("input_ids", (11,)),)), needs_room, {"input_ids": torch.arange(11)}, {})
    assert found["found"].numel() == 11 and not run._captured


@pytest.mark.parametrize("whole", [True, False])
def test_a_captured_loop_is_the_loop(compile_tiny: Any, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """As a whole, or its step again and again: other states and rows in every call, what is steady read once."""
    model = compile_tiny("omni")
    program = closed(model, schedule())
    own = program.graphs["generator"]
    inputs = inputs_of(own, model, requested(model, program))
    carried, rows = program.loop.carried, program.loop.rows
    steps = Steps(3, carried, rows, program.loop.returned)
    assert carried and rows and steps.returned
    plain = executable(own, model, compiled=False)
    monkeypatch.setattr("cosmos_export.targets.inductor.executable.Captured", Emulated)
    run = executable(own, model, compiled=False, whole_loop=whole)
    tokens = {name: object() for name in inputs if name not in carried and name not in rows}
    for seed in (1, 2, 3, 1):
        generator = torch.Generator().manual_seed(seed)
        now = dict(inputs)
        now |= {n: torch.stack([inputs[n] * (1 + 0.05 * torch.rand((), generator=generator))] * 3) for n in rows}
        now |= {n: torch.randn(inputs[n].shape, generator=generator) for n in carried}
        with monkeypatch.context() as patched:
            patched.setattr(Executable, "_captures", property(lambda self: self is run))
            found = {name: t.clone() for name, t in run.loop(steps, now, tokens).items()}
            assert_close(found, plain.loop(steps, now), 0.0, f"seed {seed}")
    assert run._captured


class Emulated(Captured):
    """Replayed on the CPU as a CUDA graph is: reads the memory of its inputs, writes that of its first results."""

    def _capture(self, function: Function, warm: Function) -> tuple[Callable[[], None], Tensors]:
        warm(self._inputs)
        outputs = function(self._inputs)

        def replay() -> None:
            for name, value in {n: t.clone() for n, t in function(self._inputs).items()}.items():
                outputs[name].copy_(value)

        return replay, outputs


def shifted(given: Mapping[str, torch.Tensor]) -> Tensors:
    """A sampler's hand-over: what was the last becomes the one before, unchanged."""
    return {"next_m0": given["x"] + given["m0"], "next_m1": given["m0"], "y": given["x"] * 2}


def test_what_a_captured_graph_hands_through_survives_its_next_call() -> None:
    own = Emulated(shifted, {name: torch.zeros(1) for name in ("x", "m0", "m1")})
    state, expected = {"m0": torch.tensor([1.0]), "m1": torch.tensor([0.0])}, {"m0": 1.0, "m1": 0.0}
    for x in (10.0, 20.0, 30.0):
        made = own({"x": torch.tensor([x]), **state}, {})
        expected = {"m0": x + expected["m0"], "m1": expected["m0"]}
        state = {"m0": made["next_m0"], "m1": made["next_m1"]}
        assert {name: float(t) for name, t in state.items()} == expected and float(made["y"]) == 2 * x


def test_an_input_with_the_token_of_the_last_call_is_not_read_again() -> None:
    own, token = Emulated(shifted, {name: torch.zeros(1) for name in ("x", "m0", "m1")}), object()
    given = {"x": torch.tensor([5.0]), "m0": torch.tensor([1.0]), "m1": torch.zeros(1)}
    for value, tokens, seen in ((5.0, {"x": token}, 10.0), (7.0, {"x": token}, 10.0), (7.0, {"x": object()}, 14.0)):
        assert float(own({**given, "x": torch.tensor([value])}, tokens)["y"]) == seen


@pytest.mark.parametrize("capture", [False, True])
def test_a_whole_loop_is_its_steps(capture: bool) -> None:
    steps = Steps(3, {"m0": "next_m0", "m1": "next_m1"}, ("x",), ("m0", "m1"))
    given = {"x": torch.tensor([[1.0], [10.0], [100.0]]), "m0": torch.tensor([1000.0]), "m1": torch.tensor([0.0])}
    whole = unrolled(shifted, steps)
    if capture:
        own = Emulated(whole, given, warm=unrolled(shifted, replace(steps, count=1)))
        assert float(own({**given, "m0": torch.zeros(1)}, {})["m1"]) == 11.0
        found = own(given, {})
    else:
        found = whole(given)
    assert {name: float(t) for name, t in found.items()} == {"m0": 1111.0, "m1": 1011.0}


def test_layers_are_the_same_few_functions(compile_tiny: Any) -> None:
    """What is compiled does not grow with the number of layers: before the first attention, then a layer each."""
    different = []
    for layers in (3, 4):
        compiled = compile_tiny("omni", layers=layers)
        body = compiled.final.graphs["generator"]
        inputs = inputs_of(body, compiled, requested(compiled, compiled.final))
        chunks = specialise(body, {name: tuple(t.shape) for name, t in inputs.items()}).chunks
        assert [chunk.compiled for chunk in chunks] == [True, *[False, True] * layers]
        different.append(len({chunk.key for chunk in chunks}))
    assert different[0] == different[1]
