"""Models too large to be compared whole: their first layers are, through the same passes, models and requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
from test_build_planted_faults import edges_swapped, in_manifest, refused

import cosmos_export.compiler.first_layers as first_layers
import cosmos_export.compiler.first_layers as parts
import cosmos_export.compiler.published as published
from cosmos_export.bundle import Manifest, verify_bundle
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.compiler.driver import build
from cosmos_export.evaluation.reference import Reference
from cosmos_export.ir.graph import Graph, Node, spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.passes.merge_linears import MergeLinears

pytestmark = [pytest.mark.xdist_group("first layers"), pytest.mark.usefixtures("captured_once")]
VOCABULARY = 300
FIRST = "first 2 of 3 layers"


@pytest.fixture(scope="session")
def edge_scales(shared: Path, edge: Path) -> Path:
    return harness.scale_table(edge, shared / "edge-scales")


@pytest.fixture(autouse=True)
def little_memory(edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model of two layers is within its share, that of three is not."""
    monkeypatch.setattr(parts, "_VOCABULARY", VOCABULARY)
    needed = 4 * sum(t.elements for n, t in open_checkpoint(edge).expected.items() if not n.startswith("layers.2."))
    for module in (published, first_layers):
        monkeypatch.setattr(module, "available_bytes", lambda: int(needed / published.MEMORY_SHARE))


def verdicts(manifest: Manifest) -> dict[str, str]:
    return {f"{v.stage} of {v.subject}": v.verdict for v in manifest.evaluation}


@pytest.mark.parametrize("loop", ["host", "device"])
def test_they_are_compared(tmp_path: Path, edge: Path, monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    read: list[dict[str, Any]] = []
    made = Reference.__init__

    def watched(self: Reference, folder: Path, dtype: Any, values: Any = None) -> None:
        read.append({name: tuple(value.shape) for name, value in values.items()})
        made(self, folder, dtype, values)

    monkeypatch.setattr(Reference, "__init__", watched)
    options = harness.transformer_only(edge, tmp_path / "x", target="h100", backend="tensorrt", steps=4, loop=loop)
    result = build(options)
    assert result.manifest is not None
    found = verdicts(result.manifest)
    stages_of_part = {"capture", "passes", "bfloat16", "ONNX Runtime", "request"}
    stages_of_part |= {"loop of 4 steps"} if loop == "device" else set()
    assert {name for name, verdict in found.items() if FIRST in name and verdict == "pass"} == {
        f"{stage}, {FIRST} of transformer" for stage in stages_of_part
    }
    assert found["all of transformer"] == found["request of bundle"] == "not-measured"
    assert f"its {FIRST} were compared" in next(v.note for v in result.manifest.evaluation if v.stage == "all")
    # Nothing else was read, and nothing of it is in the bundle.
    assert len(read) == 2 and not any(name.startswith("layers.2.") for one in read for name in one)
    assert {one["embed_tokens.weight"][0] for one in read} == {VOCABULARY}
    assert result.manifest.model.geometry["num_hidden_layers"] == 3
    assert verify_bundle(tmp_path / "x").ok and harness.leftovers(tmp_path) == ["x"]
    assert not [path for path in harness.leftovers(tmp_path / "x") if path.startswith(".")]


def test_a_merge_in_another_order(tmp_path: Path, edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values take each other's part of the merged product."""
    made = MergeLinears._merge

    def wrong(self: MergeLinears, graph: Graph, group: list[Node], result: Any) -> None:
        before = set(graph.calls(aten.slice.Tensor))
        made(self, graph, group, result)
        parts_of = [node for node in graph.calls(aten.slice.Tensor) if node not in before]
        if len(parts_of) == 3 and spec_of(parts_of[1]).shape == spec_of(parts_of[2]).shape:
            key, value = parts_of[1:]
            key.args, value.args = value.args, key.args

    monkeypatch.setattr(MergeLinears, "_merge", wrong)
    error = refused(edge, tmp_path / "x", parity="auto")
    assert error.code == "CX601" and error.message.startswith(f"{FIRST} alone: ") and "passes" in error.message


def test_a_quantized_bundle_and_an_edge_of_one(
    tmp_path: Path, edge: Path, edge_scales: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"recipe": "fp8", "calibration": edge_scales, "quality": "report", "steps": 8, "target": "cpu"}
    made = build(harness.transformer_only(edge, tmp_path / "good/x", **options)).manifest
    assert made is not None
    found = {name: verdict for name, verdict in verdicts(made).items() if FIRST in name}
    assert set(found.values()) == {"pass"}
    bodies = [f"ONNX Runtime, {body} as quantized, {FIRST} of transformer" for body in ("generator", "generator_2")]
    assert {*bodies, f"request, {FIRST} of transformer"} <= set(found)
    in_manifest(monkeypatch, edges_swapped)
    (tmp_path / "bad").mkdir()
    error = refused(edge, tmp_path / "bad/x", **options)
    assert error.code == "CX622" and error.message.startswith(f"{FIRST} alone: ")


def test_how_many(tmp_path: Path, edge: Path) -> None:
    whole = open_checkpoint(edge)
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    one, two, three = (
        parts.first_layers(whole, folder, weight_bytes, 10**9)
        for folder, weight_bytes in zip(folders, (0, 1_020_000, 10**9), strict=True)
    )
    counts = [part.geometry.num_hidden_layers for part in (one, two, three) if part is not None]
    assert counts == [1, 2, 3]
    assert one is not None and one.tensors["proj_in.weight"] == whole.tensors["proj_in.weight"]
    embedding = one.tensors["embed_tokens.weight"]
    assert embedding.size_bytes == 2 * VOCABULARY * whole.geometry.hidden_size
    assert embedding.array().tobytes() == whole.tensors["embed_tokens.weight"].array()[:VOCABULARY].tobytes()
