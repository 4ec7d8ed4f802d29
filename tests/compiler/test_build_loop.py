"""`--loop device`: every step in one engine, and the schedule that it was built for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import build_harness as harness
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import cosmos_export.compiler.stages as stages
from cosmos_export.bundle import Manifest, read_bundle, verify_bundle
from cosmos_export.compiler import forms
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.planned import Prediction
from cosmos_export.diagnostics import FindingError, UnsupportedError, UserError
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.reference import Reference, relative_error
from cosmos_export.evaluation.sampled import negative_ids, sampled
from cosmos_export.ir.program import Program
from cosmos_export.options import BuildOptions
from cosmos_export.targets.trt.engine_inspector import inspect_engine

pytestmark = [pytest.mark.xdist_group("builds"), pytest.mark.usefixtures("captured_once")]

LAYERS, BRANCHES = 3, 2


def built(checkpoint: Path, output: Path, **options: Any) -> Manifest:
    chosen = {"loop": "device", "parity": "never", "steps": 5, "components": (), **options}
    result = build(BuildOptions(checkpoint, output, **chosen))
    assert result.manifest is not None
    assert verify_bundle(output).ok
    return result.manifest


def test_the_loop_is_an_engine_with_both_branches_fused(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x", target="rtx-pro-6000")
    assert {e.name for e in manifest.engines} == {"reasoner", "conditioning", "denoise"}
    (plan,) = inspect_engine(tmp_path / "x" / "engines/denoise.engine").graphs
    # A short body is unrolled a few times; every copy is fused.
    assert len(plan.attention) > 0
    assert len(plan.attention) % (LAYERS * BRANCHES) == 0
    assert set(plan.gemm_types()) == {"bf16"}
    assert plan.stream_capturable
    assert all(check.passed for check in manifest.plan_checks)


@pytest.mark.parametrize("backbone", ["omni", "edge"])
def test_the_loop_is_compared_with_diffusers_own(tmp_path: Path, request: pytest.FixtureRequest, backbone: str) -> None:
    manifest = built(request.getfixturevalue(backbone), tmp_path / "x", parity="always", steps=4)
    verdicts = {v.stage: v for v in manifest.evaluation}
    assert verdicts["loop of 4 steps"].verdict == "pass"
    assert 0 < manifest.volatile.measured["loop of 4 steps"] <= 1e-4


@pytest.mark.parametrize("output", ["vision_velocity", "action_velocity"])
def test_a_loop_with_fewer_outputs_is_compared_where_it_can_be(tmp_path: Path, omni: Path, output: str) -> None:
    """In cases with noise in a modality that is not computed, the stock model moves what the loop holds."""
    profile = "256p,frames=1:2:3,action_len=4:8:16"
    manifest = built(
        omni, tmp_path / "x", parity="always", steps=4, outputs=(output,), target="cpu", profiles=(profile,)
    )
    assert {v.stage: v.verdict for v in manifest.evaluation}["loop of 4 steps"] == "pass"


def test_a_wrong_coefficient_is_found(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stages.loop_tables

    def wrong(*arguments: Any) -> Any:
        tables = dict(real(*arguments))
        tables["coefficients"] = tables["coefficients"] * 1.001
        return tables

    monkeypatch.setattr(stages, "loop_tables", wrong)
    with pytest.raises(FindingError, match="loop of 4 steps"):
        built(omni, tmp_path / "x", parity="always", steps=4)
    assert not (tmp_path / "x").exists()


INTERVALS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "t2i": ("omni", {"mode": "t2i", "steps": 8}, [7, 1]),  # its default interval is [400, 1000]
    "both-ends": ("omni", {"steps": 8, "guidance_interval": (500.0, 900.0)}, [4, 2, 2]),
    "droid": ("edge", {"mode": "policy", "steps": 4, "guidance": 3.0, "guidance_interval": (960.0, 1001.0)}, [1, 3]),
}
"""Backbone, options, and the steps of the segments that follow."""


@pytest.mark.parametrize("name", INTERVALS)
def test_a_guidance_interval_is_a_chain_of_segments(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    """Compared with diffusers twice: by the build, and by a reader who knows the manifest and nothing else."""
    backbone, options, steps = INTERVALS[name]
    checkpoint: Path = request.getfixturevalue(backbone)
    result = build(BuildOptions(checkpoint, tmp_path / "x", loop="device", parity="always", **options))
    assert verify_bundle(tmp_path / "x").ok
    manifest = result.manifest
    assert manifest is not None and manifest.loop is not None
    assert 0 < manifest.volatile.measured[f"loop of {sum(steps)} steps"] <= 1e-4
    names = [f"denoise_{i}" for i in range(1, len(steps) + 1)]
    assert [(s.graph, s.steps, s.rows) for s in manifest.loop.segments] == [
        (graph, count, ()) for graph, count in zip(names, steps, strict=True)
    ]
    assert [f.path for f in manifest.files if f.role == "weights" and "denoise" in f.path] == []
    case, plan = CASES[4], result.job
    inputs = case.inputs(plan.checkpoint.geometry.config, plan.modalities)
    negative = negative_ids(plan.checkpoint.geometry.config)
    stock = Reference(checkpoint / "transformer", torch.float32)
    expected = sampled(stock, inputs, negative, case.fps, plan.schedule, plan.checkpoint.scheduler)
    samples = {n.replace("_latent", "_sample"): value for n, value in inputs.items()}
    columns = torch.ones(plan.checkpoint.geometry.action_dim)
    found = played(tmp_path / "x", inputs | samples | {"negative_input_ids": negative, "action_columns": columns})
    assert relative_error(found, expected) <= 1e-4


def played(bundle: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the last segment returns: each model on what the manifest's edges say, or else on the caller's inputs."""
    manifest = read_bundle(bundle)
    results: dict[tuple[str, str | None], dict[str, Any]] = {}

    def run(graph: str, instance: str | None) -> dict[str, Any]:
        if (graph, instance) not in results:
            edges = {e.input: e for e in manifest.edges if e.target == graph}
            prefix = f"{instance}_" if instance else ""
            contract = manifest.graphs[graph]
            feed = {t.name: inputs[prefix + t.name].numpy() for t in contract.inputs if t.name not in edges}
            feed |= {name: run(e.source, e.instance)[e.output] for name, e in edges.items()}
            model = onnxruntime.InferenceSession(
                str(bundle / f"onnx/{graph}.cpu.onnx"), providers=["CPUExecutionProvider"]
            )
            names = [t.name for t in contract.outputs]
            results[graph, instance] = dict(zip(names, model.run(names, feed), strict=True))
        return results[graph, instance]

    assert manifest.loop is not None
    return {name: torch.from_numpy(value) for name, value in run(manifest.loop.segments[-1].graph, None).items()}


def test_segments_are_engines_with_every_attention_fused(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x", target="rtx-pro-6000", mode="t2i", steps=8)
    assert {e.name for e in manifest.engines} == {"reasoner", "conditioning", "denoise_1", "denoise_2"}
    for name, attention in (("denoise_1", LAYERS * BRANCHES), ("denoise_2", LAYERS)):
        (plan,) = inspect_engine(tmp_path / "x" / f"engines/{name}.engine").graphs
        assert len(plan.attention) > 0
        assert len(plan.attention) % attention == 0
        assert set(plan.gemm_types()) == {"bf16"}
        assert plan.stream_capturable
    assert all(check.passed for check in manifest.plan_checks)


def first_rows(loop_tables: Any) -> Any:
    """Every segment reads the tables from the schedule's first step on."""

    def wrong(closed: Program, *arguments: Any) -> Any:
        closed = closed.copy()
        closed.loop = replace(closed.loop, start=0)
        return loop_tables(closed, *arguments)

    return wrong


def forgetful(close_loop: Any) -> Any:
    """A later segment takes the samples alone; the sampler's memory begins as zeros again."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        closed = close_loop(*arguments, **options)
        for program in closed.values():
            samples = tuple(n for n in program.loop.carried if n.endswith("_sample"))
            program.loop = replace(program.loop, taken=samples)
        return closed

    return wrong


@pytest.mark.parametrize(
    ("function", "bug"), [((stages, "loop_tables"), first_rows), ((forms, "close_loop"), forgetful)]
)
def test_a_segment_that_does_not_go_on_where_the_last_one_ended_is_found(
    tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch, function: tuple[Any, str], bug: Any
) -> None:
    monkeypatch.setattr(*function, bug(getattr(*function)))
    with pytest.raises(FindingError, match="loop of 6 steps"):
        built(omni, tmp_path / "x", parity="always", steps=6, guidance_interval=(900.0, 1000.0))
    assert not (tmp_path / "x").exists()


def test_disk_is_asked_for_each_segments_copy_of_the_weights(omni: Path, tmp_path: Path) -> None:
    def planned(loop: Any) -> Prediction:
        return resolve(BuildOptions(omni, tmp_path / "x", "rtx-pro-6000", mode="t2i", loop=loop)).plan

    device, host = planned("device"), planned("host")
    assert (device.copies, host.copies) == (2, 1)
    assert device.bundle_bytes - host.bundle_bytes == host.engines["generator"].engine_bytes
    assert device.required_bytes > device.bundle_bytes


def test_the_manifest_says_how_to_run_it(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x", guidance=4.0)
    assert manifest.loop is not None
    assert manifest.loop.body == "generator"
    (segment,) = manifest.loop.segments
    assert (segment.graph, segment.steps, segment.rows) == ("denoise", 5, ())
    assert {t.name for t in manifest.graphs["denoise"].outputs} == {
        f"{m}_sample_final" for m in ("vision", "sound", "action")
    }
    into = {e.input: e for e in manifest.edges if e.target == "denoise"}
    assert into["key_0"].instance is None
    assert into["negative_key_0"].instance == "negative"
    assert into["negative_key_0"].source == "reasoner"
    model = onnx.load(str(tmp_path / "x" / "onnx/denoise.cpu.onnx"), load_external_data=False)
    contract = manifest.graphs["denoise"]
    assert {i.name for i in model.graph.input} == {t.name for t in contract.inputs}
    assert {o.name for o in model.graph.output} == {t.name for t in contract.outputs}


def test_the_schedule_is_recorded(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x", grid="flow", shift=10.0, guidance=4.0, steps=6)
    options = manifest.options
    assert (options["mode"], options["loop"]) == ("t2v", "device")
    assert options["schedule.grid"] == "flow"
    assert options["schedule.shift"] == 10.0
    assert options["schedule.guidance"] == 4.0
    assert len(options["schedule.sigmas"]) == 7  # type: ignore[arg-type]
    with safe_open(tmp_path / "x" / "tables/schedule.safetensors", "numpy") as file:
        assert file.get_tensor("coefficients").shape[0] == 6
        assert file.get_tensor("timesteps").tolist() == list(options["schedule.timesteps"])  # type: ignore[arg-type]


def test_without_guidance_there_is_one_branch(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x", guidance=1.0)
    assert not [e for e in manifest.edges if e.instance]
    assert not [t for t in manifest.graphs["denoise"].inputs if t.name.startswith("negative")]


def test_the_loop_shares_the_generators_weights(tmp_path: Path, omni: Path) -> None:
    manifest = built(omni, tmp_path / "x")
    assert "onnx/generator.weights" in {f.path for f in manifest.files}
    assert "onnx/denoise.weights" not in {f.path for f in manifest.files}


def test_two_builds_are_the_same(tmp_path: Path, omni: Path) -> None:
    documents = []
    for name in ("a", "b"):
        built(omni, tmp_path / name, target="rtx-pro-6000")
        document = json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8"))
        del document["volatile"], document["digest"]
        documents.append(document)
    assert documents[0] == documents[1]


def test_what_cannot_be_built_is_refused_before_work(tmp_path: Path, omni: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises((UserError, UnsupportedError)) as caught:
            build(BuildOptions(omni, tmp_path / "x", **options))
        assert not (tmp_path / "x").exists()
        return caught.value.code

    assert refused(loop="gpu") == "CX451"
    assert refused(mode="t2x") == "CX464"
    assert refused(grid="cosine") == "CX462"
    assert refused(guidance=-1.0) == "CX463"
    assert refused(steps=0) == "CX460"


@pytest.fixture(scope="module")
def distilled(omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.distilled(omni, tmp_path_factory.mktemp("distilled") / "checkpoint")


def test_a_distilled_checkpoint_has_its_own_loop(tmp_path: Path, distilled: Path) -> None:
    """Against diffusers' stochastic scheduler, which draws the same noise from the same seed."""
    manifest = built(distilled, tmp_path / "x", target="rtx-pro-6000", mode="i2v", steps=None, parity="always")
    assert manifest.volatile.measured["loop of 4 steps"] <= 1e-4
    assert manifest.loop is not None
    assert set(manifest.loop.segments[0].rows) == {"vision_noise", "sound_noise", "action_noise"}
    (noise,) = [t for t in manifest.graphs["denoise"].inputs if t.name == "vision_noise"]
    assert noise.dims[0] == 4
    assert not [e for e in manifest.edges if e.instance]


def test_a_distilled_checkpoint_takes_its_own_steps_only(tmp_path: Path, distilled: Path) -> None:
    with pytest.raises(UserError, match="5"):
        build(BuildOptions(distilled, tmp_path / "x", loop="device", mode="i2v", steps=5))
