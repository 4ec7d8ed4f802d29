"""The models of a bundle: every graph, and every closed loop, as ONNX, on files of weights that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cosmos_export.bundle import BundleWriter, WeightInput
from cosmos_export.compiler.artifacts import layout_of, model_bytes, weight_inputs, write_models
from cosmos_export.compiler.forms import Forms, Pieces
from cosmos_export.compiler.loop import LOOP_TABLES, loop_inputs
from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.passes.fold_schedule import SCHEDULE
from cosmos_export.progress import Progress
from cosmos_export.targets.backends import Backend
from cosmos_export.targets.backends.protocol import LoweredGraph
from cosmos_export.targets.onnx.plugins import Plugins


@dataclass(frozen=True)
class LoweredModel:
    """One model of the transformer, and what an engine that is built from it takes."""

    name: str
    graph: Graph
    stem: str
    """The program's graph whose file of weights it reads."""
    inputs: Mapping[str, TensorSpec]
    weights: tuple[WeightInput, ...]
    """Weights that its engine takes as inputs."""
    in_loop: bool = False
    """Whether it is a closed loop over the graph."""
    has_engine: bool = True
    """False for the table of the schedule, which is computed at build time, and for the body of a closed loop."""


def models_of(forms: Forms, pieces: Pieces, *, external: bool) -> tuple[LoweredModel, ...]:
    """Every model of the transformer: graph by graph with their other forms and pieces, then the closed loops.

    ``external``: engines take their large weights as inputs.
    """
    return (*_graph_models(forms, pieces, external), *_loop_models(forms, external))


def _graph_models(forms: Forms, pieces: Pieces, external: bool) -> Iterator[LoweredModel]:
    for stem in forms.program.graphs:
        has_engine = stem != SCHEDULE and not (forms.closed and stem == forms.program.loop.body)
        for form in sharing(stem, forms):
            for graph in pieces[form]:
                inputs = {i: spec_of(node) for i, node in graph.inputs.items()}
                name = graph.name if len(pieces[form]) > 1 else form
                yield LoweredModel(
                    name, graph, stem, inputs, _external_inputs(graph, stem, forms, external), has_engine=has_engine
                )


def _loop_models(forms: Forms, external: bool) -> Iterator[LoweredModel]:
    stem = forms.program.loop.body
    for name, closed in forms.closed.items():
        body = closed.graphs[closed.loop.body]
        weights = _external_inputs(body, stem, forms, external)
        yield LoweredModel(name, body, stem, loop_inputs(closed, LOOP_TABLES), weights, in_loop=True)


def sharing(stem: str, forms: Forms) -> dict[str, Graph]:
    """The graphs on the file of weights of graph ``stem``: every form of the loop's body, or the graph alone."""
    program = forms.program
    others = forms.variants if stem == program.loop.body else {}
    return {stem: program.graphs[stem], **{other: one.graphs[one.loop.body] for other, one in others.items()}}


def _external_inputs(graph: Graph, stem: str, forms: Forms, external: bool) -> tuple[WeightInput, ...]:
    if not external:
        return ()
    return weight_inputs(graph, f"onnx/{stem}.weights", layout_of(sharing(stem, forms).values()))


def write_graph_models(
    stem: str,
    models: Iterable[LoweredModel],
    forms: Forms,
    backend: Backend,
    writer: BundleWriter,
    progress: Progress,
    plugins: Plugins | None,
    *,
    external: bool,
) -> str:
    """Write graph ``stem``, or what it was cut into, with its weights; returns the suffix of the models that run on a
    CPU.

    Bodies of the loop that differ in precision, and the pieces of a graph, read one file of weights.
    """
    graphs = {model.name: model.graph for model in models if model.stem == stem and not model.in_loop}
    # As the whole graphs have them, whatever they were cut into: engines' inputs are parts of this file.
    places = layout_of(sharing(stem, forms).values())
    narrow = model_dtype(forms.program) != torch.float32
    return write_models(
        graphs, stem, narrow, backend, writer, progress, external=external, plugins=plugins, places=places
    )  # fmt: skip


def write_loop_model(
    name: str,
    forms: Forms,
    tables: Mapping[str, np.ndarray],
    backend: Backend,
    writer: BundleWriter,
    plugins: Plugins | None,
    *,
    external: bool,
) -> None:
    """Closed loop ``name`` as one model, on the weights of the program's body; an engine's form writes attention
    out."""
    import onnx

    from cosmos_export.targets.onnx.loop import lower_loop

    closed = forms.closed[name]
    body = closed.graphs[closed.loop.body]
    stored = layout_of([forms.program.graphs[closed.loop.body]])
    file = f"{closed.loop.body}.weights"
    apart = external or _body_dtype(closed) != torch.float32
    engines = backend.engines is not None
    for suffix, compute in {".cpu.onnx": torch.float32, ".onnx": None}.items() if apart else {".onnx": None}.items():
        on_cpu = suffix == ".cpu.onnx" or not engines
        if apart and suffix == ".onnx" and not engines:
            continue
        model = lower_loop(
            body, closed.loop, tables, stored, file, compute=compute, explicit_attention=not on_cpu,
            external=external and not on_cpu, plugins=None if on_cpu else plugins,
        )  # fmt: skip
        path = writer.path(f"onnx/{name}{suffix}", "onnx")
        path.write_bytes(model_bytes(model))
        onnx.checker.check_model(str(path))
    backend.write(LoweredGraph(name, body, file, stored, closed.loop, tables), writer)


def _body_dtype(closed: Program) -> torch.dtype:
    """The type in which a closed loop's body computes: that of its attention."""
    attention = closed.graphs[closed.loop.body].calls(*ops.having(ops.Trait.JOINT))
    return spec_of(attention[0]).dtype


def model_dtype(program: Program) -> torch.dtype:
    """The type in which the loop's body computes: that of its first carried value."""
    body = program.graphs[program.loop.body]
    return spec_of(body.inputs[next(iter(program.loop.carried))]).dtype
