"""Whether the models that engines are built from are the models that were run on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cosmos_export.bundle import BundleWriter, Verdict, WeightInput
from cosmos_export.compiler.components import Codec
from cosmos_export.compiler.models import LoweredModel
from cosmos_export.diagnostics import FindingError
from cosmos_export.evaluation.forms import FormsComparison, compare_forms, load_form
from cosmos_export.evaluation.parity import REPORT
from cosmos_export.ir.graph import Graph

_NAMED = 3
"""Differences that a message names."""


def engine_form_verdicts(
    models: Iterable[LoweredModel], codecs: Iterable[Codec], writer: BundleWriter
) -> Iterator[Verdict]:
    """Every model that an engine is built from against its form that runs on a CPU; CX620 where they differ."""
    for name, graph, weights in _lowered(models, codecs):
        engine, run = (writer.staged(f"onnx/{name}{suffix}") for suffix in (".onnx", ".cpu.onnx"))
        if engine is not None and run is not None:  # a graph with one model runs what its engine is built from
            yield _verdict(name, compare_forms(graph, load_form(engine), load_form(run), weights))


def _lowered(
    models: Iterable[LoweredModel], codecs: Iterable[Codec]
) -> Iterator[tuple[str, Graph, tuple[WeightInput, ...]]]:  # fmt: skip
    for model in models:
        yield model.name, model.graph, model.weights
    for codec in codecs:
        yield from ((name, graph, ()) for name, graph in codec.program.graphs.items())


def _verdict(name: str, found: FormsComparison) -> Verdict:
    if found.differences:
        raise FindingError(
            "CX620",
            f"onnx/{name}.onnx, which engines are built from, is not the model that was run: "
            + "; ".join(found.differences[:_NAMED]),
            REPORT,
        )
    note = f"{found.same} operations alike, {found.evaluated} written otherwise and evaluated in both forms"
    if found.unknown:
        note += f"; no evaluator here has {', '.join(found.unknown)}"
    metric = "operations, constants and places of weights, up to type"
    return Verdict("model of the engine", name, metric, None, "not-measured" if found.unknown else "pass", note)
