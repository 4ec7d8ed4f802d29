"""Faults of a compiler, planted into otherwise stock builds of a tiny checkpoint: a gate refuses each of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import build_harness as harness
import numpy as np
import onnx
import pytest
import torch

import cosmos_export.compiler.artifacts as artifacts
import cosmos_export.compiler.models as models
import cosmos_export.compiler.precision as precision
import cosmos_export.compiler.published as published
import cosmos_export.compiler.stages as stages
import cosmos_export.compiler.time_table as time_table
import cosmos_export.targets.onnx.weights as weights
from cosmos_export.bundle import Manifest, read_bundle
from cosmos_export.compiler.driver import build
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.parity import Parity
from cosmos_export.ir.spec import Part

pytestmark = pytest.mark.xdist_group("planted")
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="session")
def edge_scales(shared: Path, edge: Path) -> Path:
    return harness.scale_table(edge, shared / "edge-scales")


@pytest.fixture(autouse=True)
def _quick(captured_once: None, monkeypatch: Patch) -> None:
    """One case of seven is enough to see that something is wrong."""
    monkeypatch.setattr(published, "Parity", partial(Parity, cases=CASES[1:2]))


def refused(checkpoint: Path, output: Path, **options: Any) -> CosmosExportError:
    with pytest.raises(CosmosExportError) as caught:
        build(harness.transformer_only(checkpoint, output, **{"target": "cpu", "steps": 4, **options}))
    assert harness.leftovers(output.parent) == []
    return caught.value


# ---------------------------------------------------------------------------------------------------------------------
# The manifest and its tables


def in_manifest(monkeypatch: Patch, fault: Callable[[Manifest], Manifest]) -> None:
    made = stages.manifest
    monkeypatch.setattr(stages, "manifest", lambda *arguments: fault(made(*arguments)))


def edges_swapped(manifest: Manifest) -> Manifest:
    other = {"key_0": "value_0", "value_0": "key_0"}
    edges = tuple(replace(e, output=other.get(e.output, e.output)) for e in manifest.edges)
    assert edges != manifest.edges
    return replace(manifest, edges=edges)


def with_request(manifest: Manifest, part: str, **values: Any) -> Manifest:
    request = manifest.request
    return replace(manifest, request=replace(request, **{part: replace(getattr(request, part), **values)}))


IN_MANIFEST: Mapping[str, tuple[Callable[[Manifest], Manifest], str, str]] = {
    "keys for values": (edges_swapped, "CX622", "request of mode t2v: "),
    "base_fps": (lambda m: with_request(m, "video", base_fps=7.0), "CX622", "request of mode t2v: "),
    "no modulation": (lambda m: with_request(m, "video", fps_modulation=False), "CX622", "request of mode t2v: "),
    "native": (lambda m: with_request(m, "sampling", native=not m.request.sampling.native), "CX621", "its native"),
}


@pytest.mark.parametrize("name", IN_MANIFEST)
def test_in_the_manifest(tmp_path: Path, edge: Path, monkeypatch: Patch, name: str) -> None:
    fault, code, said = IN_MANIFEST[name]
    in_manifest(monkeypatch, fault)
    error = refused(edge, tmp_path / "x")
    assert (error.code, error.exit_code) == (code, 1) and said in error.message


def test_edges_of_a_quantized_bundle(tmp_path: Path, edge: Path, edge_scales: Path, monkeypatch: Patch) -> None:
    """Its results are those of its own models along the program's edges, however much the recipe loses."""
    in_manifest(monkeypatch, edges_swapped)
    error = refused(edge, tmp_path / "x", recipe="fp8", calibration=edge_scales, quality="report", steps=8)
    assert error.code == "CX622"


@pytest.mark.parametrize("table", ["schedule_table", "coefficient_table"])
def test_in_the_table_of_the_schedule(tmp_path: Path, edge: Path, monkeypatch: Patch, table: str) -> None:
    """Time embeddings in the reverse order, or coefficients that are all one."""
    made = getattr(time_table, table)

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = made(*arguments, **options)
        return np.ones_like(found) if table == "coefficient_table" else {n: v.flip(0) for n, v in found.items()}

    monkeypatch.setattr(time_table, table, wrong)
    error = refused(edge, tmp_path / "x")
    assert error.code == "CX621"
    assert ("sampler" if table == "coefficient_table" else "time_embedding of step") in error.message


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def swap_two(model: onnx.ModelProto) -> None:
    """The places of two weights of one shape."""
    stored = [i for i in model.graph.initializer if i.external_data]
    first, second = next(
        (a, b) for i, a in enumerate(stored) for b in stored[:i] if a.dims == b.dims and a.data_type == b.data_type
    )
    for one, other in zip(first.external_data, second.external_data, strict=True):
        one.value, other.value = other.value, one.value


def test_in_the_model_that_the_engine_is_built_from(tmp_path: Path, edge: Path, monkeypatch: Patch) -> None:
    made = models.write_models

    def wrong(graphs: Any, stem: str, narrow: bool, plan: Any, writer: Any, *rest: Any, **options: Any) -> str:
        suffix = made(graphs, stem, narrow, plan, writer, *rest, **options)
        if stem == "generator":
            path = writer.path("onnx/generator.onnx", "onnx")
            model = onnx.load(str(path), load_external_data=False)
            swap_two(model)
            path.write_bytes(model.SerializeToString())
        return suffix

    monkeypatch.setattr(models, "write_models", wrong)
    error = refused(edge, tmp_path / "x", target="h100", backend="tensorrt")
    assert (error.code, error.exit_code) == ("CX620", 1)
    assert error.message.startswith("onnx/generator.onnx, which engines are built from, is not the model that was run")


@pytest.mark.slow
def test_in_the_decoder_that_the_engine_is_built_from(tmp_path: Path, edge: Path, monkeypatch: Patch) -> None:
    from cosmos_export.compiler import components

    made = components.write_models

    def wrong(graphs: Any, stem: str, narrow: bool, plan: Any, writer: Any, *rest: Any, **options: Any) -> str:
        suffix = made(graphs, stem, narrow, plan, writer, *rest, **options)
        path = writer.path("onnx/vae_decoder_next.onnx", "onnx")
        model = onnx.load(str(path), load_external_data=False)
        swap_two(model)
        path.write_bytes(model.SerializeToString())
        return suffix

    monkeypatch.setattr(components, "write_models", wrong)
    options = {"target": "h100", "backend": "tensorrt", "components": ("vae-decoder",), "parity": "never"}
    error = refused(edge, tmp_path / "x", **options)
    assert error.code == "CX620" and "vae_decoder_next" in error.message


def test_in_the_file_of_weights(tmp_path: Path, edge: Path, monkeypatch: Patch) -> None:
    made = artifacts.write_weights

    def wrong(path: Path, stored: Any, *rest: Any) -> str:
        digest = made(path, stored, *rest)
        if path.name != "generator.weights":
            return digest
        places = list(stored.items())
        (_, a), (_, b) = next(
            (one, other)
            for i, one in enumerate(places)
            for other in places[:i]
            if one[0].shape == other[0].shape and len(one[0].shape) == 2
        )
        data = bytearray(path.read_bytes())
        size = a.size_bytes
        first, second = data[a.offset : a.offset + size], data[b.offset : b.offset + size]
        assert first != second
        data[a.offset : a.offset + size], data[b.offset : b.offset + size] = second, first
        path.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    monkeypatch.setattr(artifacts, "write_weights", wrong)
    error = refused(edge, tmp_path / "x")
    assert error.code == "CX601" and "ONNX Runtime" in error.message


# ---------------------------------------------------------------------------------------------------------------------
# Quantization


def test_in_the_scales_of_weights(tmp_path: Path, edge: Path, edge_scales: Path, monkeypatch: Patch) -> None:
    made = weights._packed

    def wrong(binding: Any, scales: Any) -> Iterator[bytes]:
        for block in made(binding, scales):
            doubled = binding.packing is not None and binding.packing.part is Part.SCALE
            yield (2 * np.frombuffer(block, np.float32)).tobytes() if doubled else block

    monkeypatch.setattr(weights, "_packed", wrong)
    error = refused(edge, tmp_path / "x", recipe="fp8", calibration=edge_scales, quality="report", steps=8)
    assert (error.code, error.exit_code) == ("CX601", 1)


_QKV = re.compile(r"(_|\.)[qkv]_proj")


@pytest.mark.parametrize("factor", [0.05, 0.3, 0.6, 100.0, 10_000.0])
def test_in_the_ranges_of_inputs(
    tmp_path: Path, edge: Path, edge_scales: Path, monkeypatch: Patch, factor: float
) -> None:
    """Those of queries, keys and values."""
    made = precision.activation_ranges

    def wrong(*sources: Any) -> Any:
        found = made(*sources)
        every = {k: v * (factor if _QKV.search(k) else 1) for k, v in found.amax.items()}
        assert every != found.amax
        return replace(found, amax=every)

    monkeypatch.setattr(precision, "activation_ranges", wrong)
    error = refused(edge, tmp_path / "x", recipe="fp8", calibration=edge_scales, quality="report", steps=8)
    assert error.code == "CX363"


# ---------------------------------------------------------------------------------------------------------------------
# The model itself


def test_a_generator_that_reads_the_prompt_another_way(tmp_path: Path, edge: Path, monkeypatch: Patch) -> None:
    """A row of the prompt, scaled by a table of the request, is added to the generated rows."""
    import diffusers

    from cosmos_export.compiler.captures import capture

    transformer: Any = diffusers.Cosmos3OmniTransformer
    stack = transformer._run_decoder_stack

    def pooled(self: Any, und: torch.Tensor, gen: torch.Tensor, rotary: Any) -> Any:
        return stack(self, und, gen + und[:1] * rotary[2][:1, :1], rotary)

    monkeypatch.setattr(transformer, "_run_decoder_stack", pooled)
    monkeypatch.setattr(stages, "capture", capture)  # what is captured here is no other test's
    error = refused(edge, tmp_path / "x", modalities=("vision",))
    assert error.code == "CX220" and "reads the prompt's value" in error.message


def test_without_a_fault_all_of_it_is_measured(tmp_path: Path, edge: Path) -> None:
    build(harness.transformer_only(edge, tmp_path / "x", target="h100", backend="tensorrt", steps=4))
    verdicts = {(v.stage, v.subject): v.verdict for v in read_bundle(tmp_path / "x").evaluation}
    assert verdicts["request", "transformer"] == verdicts["schedule", "tables"] == "pass"
    assert verdicts["model of the engine", "generator"] == "pass"
    assert "fail" not in verdicts.values()
