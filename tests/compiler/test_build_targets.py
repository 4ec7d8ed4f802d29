"""One checkpoint for other targets, precisions, modalities, outputs and profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
import torch

from cosmos_export.bundle import Manifest, verify_bundle
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.compiler.driver import build
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.reference import Reference, relative_error
from cosmos_export.targets.trt.engine_inspector import EngineSummary, inspect_engine, read_header

pytestmark = [pytest.mark.xdist_group("builds"), pytest.mark.usefixtures("captured_once")]

LAYERS = 3


def built(checkpoint: Path, output: Path, **options: Any) -> Manifest:
    result = build(harness.transformer_only(checkpoint, output, **{"parity": "never", **options}))
    assert result.manifest is not None
    assert verify_bundle(output).ok
    return result.manifest


def plan(bundle: Path, name: str) -> EngineSummary:
    return inspect_engine(bundle / f"engines/{name}.engine")


def files(manifest: Manifest, role: str) -> set[str]:
    return {Path(f.path).name for f in manifest.files if f.role == role}


@pytest.mark.parametrize(("target", "capability"), [("l40s", "8.9"), ("dgx-spark", "12.1"), ("rtx-5090", "12.0")])
def test_an_engine_for_each_compute_capability(tmp_path: Path, omni: Path, target: str, capability: str) -> None:
    manifest = built(omni, tmp_path / "x", target=target)
    assert manifest.target.name == target
    assert manifest.target.compute_capability == capability
    for engine in manifest.engines:
        assert read_header(tmp_path / "x" / engine.path).compute_capabilities == (capability,)
    assert len(plan(tmp_path / "x", "reasoner").graphs[0].attention) == LAYERS - 1
    assert len(plan(tmp_path / "x", "generator").graphs[0].attention) == LAYERS
    assert all(check.passed for check in manifest.plan_checks)


def test_the_cpu_gets_onnx_alone(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x", parity="auto")
    assert (manifest.engines, manifest.plan_checks, files(manifest, "engine")) == ((), (), set())
    assert files(manifest, "onnx") == {f"{name}.cpu.onnx" for name in manifest.graphs}
    assert {v.verdict for v in manifest.evaluation} == {"pass"}
    assert "tensorrt_rtx" not in manifest.tools


@pytest.mark.xdist_group("bundles")
def test_fp32_for_the_cpu(tmp_path: Path, omni_fp32: Path) -> None:
    manifest = built(omni_fp32, tmp_path / "x", parity="auto")
    assert manifest.recipe == "fp32"
    assert files(manifest, "onnx") == {f"{name}.onnx" for name in manifest.graphs}
    # Nothing is narrower than fp32, so there is no such stage.
    assert "bfloat16" not in {v.stage for v in manifest.evaluation}
    config, case = open_checkpoint(omni_fp32).geometry.config, CASES[4]
    inputs = case.inputs(config, ("vision", "sound", "action"))
    found = harness.chain(tmp_path / "x", {k: v.numpy() for k, v in inputs.items()}, ".onnx")
    expected = Reference(omni_fp32 / "transformer", torch.float32).step(inputs, case.fps)
    assert relative_error({k: torch.from_numpy(v) for k, v in found.items()}, expected) <= 1e-4


@pytest.mark.xdist_group("bundles")
def test_fp32_for_a_gpu_says_that_attention_is_not_fused(tmp_path: Path, omni_fp32: Path) -> None:
    manifest = built(omni_fp32, tmp_path / "x", target="rtx-pro-6000")
    (graph,) = plan(tmp_path / "x", "generator").graphs
    assert graph.attention == ()
    assert any(gemm.scores for gemm in graph.gemms)
    (check,) = (c for c in manifest.plan_checks if c.engine == "generator")
    assert check.passed
    assert check.expected == (
        "3 attentions as matrix products over stored scores (no fused kernel computes in fp32), every GEMM in fp32"
    )


@pytest.mark.parametrize("modalities", [("vision",), ("action", "vision")])
def test_modalities(tmp_path: Path, omni: Path, modalities: tuple[str, ...]) -> None:
    manifest = built(omni, tmp_path / "x", target="rtx-pro-6000", modalities=modalities, parity="auto")
    kept = tuple(m for m in ("vision", "sound", "action") if m in modalities)
    assert manifest.options["modalities"] == kept
    assert manifest.loop is not None
    assert manifest.loop.carried == {f"{m}_latent": f"{m}_velocity" for m in kept}
    names = {t.name for graph in manifest.graphs.values() for t in graph.inputs}
    assert not any(name.startswith(m) for name in names for m in {"sound", "action"} - set(kept))
    assert {v.verdict for v in manifest.evaluation} == {"pass", "not-measured"}


def test_one_output_of_three(tmp_path: Path, omni: Path) -> None:
    """Inverse dynamics reads actions alone."""
    outputs, profiles = ("action_velocity",), ("480p-61f,action_len=16:60:60",)
    manifest = built(omni, tmp_path / "x", target="rtx-pro-6000", outputs=outputs, profiles=profiles, parity="auto")
    assert [t.name for t in manifest.graphs["generator"].outputs] == ["action_velocity"]
    assert manifest.loop is not None
    assert manifest.loop.carried == {"action_latent": "action_velocity"}
    assert manifest.options["outputs"] == ("action_velocity",)
    # Only cases with actions can say anything about it; one of them is a request with both branches.
    notes = {v.note for v in manifest.evaluation if v.verdict == "pass" and v.note.endswith("cases")}
    assert notes == {"worst of 3 cases", "rms of 3 cases", "worst of 1 cases"}
    import onnx

    graph = onnx.load(str(tmp_path / "x/onnx/generator.onnx"), load_external_data=False).graph
    assert [o.name for o in graph.output] == ["action_velocity"]


def test_two_profiles_in_one_engine(tmp_path: Path, omni: Path) -> None:
    names = ("256p,frames=1:4:9", "480p-121f+sound,und_len=1:128:1024")
    manifest = built(omni, tmp_path / "x", target="rtx-pro-6000", profiles=names)
    assert tuple(p.name for p in manifest.profiles) == names
    assert {e.profiles for e in manifest.engines} == {names}
    for name, attentions in (("reasoner", LAYERS - 1), ("generator", LAYERS)):
        graphs = plan(tmp_path / "x", name).graphs
        assert sorted(g.profile for g in graphs) == [0, 1]
        assert [len(g.attention) for g in graphs] == [attentions] * 2


def test_the_policy_profile(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x", target="rtx-pro-6000", profiles=("policy-droid",), steps=4)
    (profile,) = manifest.profiles
    assert (profile.dims["action_len"].min, profile.dims["action_len"].max) == (32, 33)
    assert len(manifest.options["schedule.timesteps"]) == 4  # type: ignore[arg-type]
    assert len(plan(tmp_path / "x", "generator").graphs[0].attention) == LAYERS


def test_what_was_not_compared_is_said(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cosmos_export.compiler.first_layers as first_layers
    import cosmos_export.compiler.published as published

    manifest = built(omni, tmp_path / "x")
    verdict = next(v for v in manifest.evaluation if v.stage == "all")
    assert (verdict.verdict, verdict.note) == ("not-measured", "not asked for (--parity never)")
    assert manifest.volatile.measured == {}
    for module in (published, first_layers):
        monkeypatch.setattr(module, "available_bytes", lambda: 1_000_000)
    found = built(omni, tmp_path / "y", parity="auto").evaluation
    assert [v.verdict for v in found] == ["pass", "not-measured", "not-measured"]  # the tables' is the first
    note = "more than 40% of the memory there is (--parity always); its first layer alone does not fit either"
    assert all(note in v.note for v in found[1:])
