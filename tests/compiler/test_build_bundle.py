"""What a user gets from `build` on the tiny omni and edge checkpoints, read from the bundle and nothing else."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
import torch
from build_harness import Built

from cosmos_export.bundle import verify_bundle
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.evaluation.cases import CASES, Case
from cosmos_export.evaluation.reference import Reference, relative_error
from cosmos_export.targets import load_target
from cosmos_export.targets.profiles import input_shapes, parse_profile
from cosmos_export.targets.trt.engine_inspector import inspect_engine
from cosmos_export.targets.trt.tensorrt_rtx import build_engine

pytestmark = pytest.mark.xdist_group("bundles")

LAYERS = 3
MODALITIES = {"omni": ("vision", "sound", "action"), "edge": ("vision", "action")}
KARRAS_35 = (
    995, 994, 993, 992, 991, 990, 988, 986, 984, 981, 978, 975, 970, 965, 958, 950, 941, 929, 915, 898, 877, 852, 822,
    785, 742, 693, 636, 572, 504, 432, 361, 292, 229, 174, 128,
)  # fmt: skip


@pytest.fixture(params=["omni", "edge"])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def built(variant: str, request: pytest.FixtureRequest) -> Built:
    result: Built = request.getfixturevalue(f"{variant}_bundle")
    return result


@pytest.fixture
def source(variant: str, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(variant)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def test_the_verdict_is_the_last_line(built: Built) -> None:
    engines, stages = f"3 engines with {2 * LAYERS - 1} fused attentions", "12 stages within their limits of diffusers"
    assert built.stderr.splitlines()[-1] == f"built {built.path}: transformer, {engines}, {stages}"


def test_every_attention_is_fused_and_every_gemm_computes_in_bf16(built: Built) -> None:
    # The last reasoner layer is there for its keys and values alone: its attention is dead code.
    for name, attentions in (("reasoner", LAYERS - 1), ("generator", LAYERS)):
        plan = inspect_engine(built.path / f"engines/{name}.engine")
        assert plan.header.compute_capabilities == ("12.0",)
        (graph,) = plan.graphs
        assert [a.type for a in graph.attention] == ["bf16"] * attentions
        assert {a.accumulate for a in graph.attention} <= {"fp32", None}
        assert set(graph.gemm_types()) == {"bf16"}
        assert not any(gemm.scores for gemm in graph.gemms)
        assert (graph.softmax, graph.dequantize) == ((), ())
    (tables,) = inspect_engine(built.path / "engines/conditioning.engine").graphs
    assert (tables.attention, tables.gemms) == ((), ())


def test_the_document_says_what_the_plans_say(built: Built) -> None:
    fused = {engine["graph"]: engine["fused_attention"] for engine in built.document["engines"]}
    assert fused == {"reasoner": LAYERS - 1, "generator": LAYERS, "conditioning": 0}
    assert all(engine["check"]["passed"] for engine in built.document["engines"])
    assert [p["name"] for p in built.document["passes"]] == list(built.manifest.options["passes"])[1:]  # type: ignore[arg-type]
    assert {p["stage"]: p["value"] for p in built.document["parity"]} == built.manifest.volatile.measured
    assert built.document["peak_memory_bytes"] < 2 * 2**30


# ---------------------------------------------------------------------------------------------------------------------
# Manifest


def test_verify_passes(built: Built) -> None:
    result = harness.cosmos_export("bundle", "verify", built.path)
    assert result.returncode == 0, result.stderr
    assert verify_bundle(built.path).ok


def test_parity_is_recorded_for_every_stage(built: Built, variant: str) -> None:
    manifest = built.manifest
    passes = manifest.options["passes"]
    assert isinstance(passes, tuple)
    measured = [v for v in manifest.evaluation if v.verdict != "not-measured"]
    compared = [v for v in measured if v.stage == "model of the engine"]
    assert [v.subject for v in compared] == ["reasoner", "conditioning", "schedule", "generator"]
    assert [v.subject for v in measured if v.stage == "schedule"] == ["tables"]
    measured = [v for v in measured if v.subject == "transformer"]
    assert [v.stage for v in measured] == [*passes, "bfloat16", "ONNX Runtime", "request"]
    assert {v.verdict for v in measured} == {"pass"}
    for verdict in measured:
        assert verdict.threshold is not None
        assert 0 < manifest.volatile.measured[verdict.stage] <= verdict.threshold
    assert [v.threshold for v in measured] == [1e-5] * len(passes) + [1.5, 1e-4, 1e-4]
    # What was not measured is said, not left out: no engine has run.
    rest = {(v.subject, v.note) for v in manifest.evaluation if v.verdict == "not-measured"}
    assert rest == {(name, "needs the target's GPU") for name in ("reasoner", "conditioning", "generator")}


def test_contracts(built: Built, source: Path, variant: str) -> None:
    manifest, checkpoint = built.manifest, open_checkpoint(source)
    assert set(manifest.graphs) == {"reasoner", "conditioning", "schedule", "generator"}
    assert manifest.loop is not None
    assert manifest.loop.body == "generator"
    assert manifest.loop.carried == {f"{m}_latent": f"{m}_velocity" for m in MODALITIES[variant]}
    assert [t.name for t in manifest.graphs["reasoner"].inputs] == ["input_ids"]
    assert {e.source for e in manifest.edges if e.target == "generator"} == {"reasoner", "conditioning", "schedule"}
    assert manifest.model.geometry["num_hidden_layers"] == LAYERS
    assert {i.path for i in manifest.inputs} == {f.relative_to(source).as_posix() for f in checkpoint.files()}
    assert manifest.recipe == "bf16"
    assert {e.name: e.profiles for e in manifest.engines} == dict.fromkeys(
        ("reasoner", "conditioning", "generator"), ("480p-121f",)
    )
    assert all(check.passed for check in manifest.plan_checks)
    assert {"torch", "diffusers", "onnx", "tensorrt_rtx"} <= set(manifest.tools)


def test_no_path_of_this_machine_is_in_the_manifest(built: Built, shared: Path) -> None:
    text = (built.path / "manifest.json").read_text()
    assert str(shared) not in text
    assert str(Path.home()) not in text
    assert str(harness.ROOT) not in text


# ---------------------------------------------------------------------------------------------------------------------
# ONNX on the CPU

OTHER_CASES = (
    Case("one odd frame", prompt=3, frames=1, height=3, width=9, sound=2),
    Case("long prompt", prompt=300, frames=2, height=4, width=4, clean_frames=(1,), actions=5, fps=12.0),
    Case("state given", prompt=9, frames=4, height=7, width=3, sound=5, actions=4, clean_actions=(0,), fps=60.0),
)
"""None of them among those that the build itself compares on."""


@pytest.mark.parametrize("case", [*OTHER_CASES, CASES[3], CASES[4]], ids=lambda case: case.name)
def test_the_onnx_form_reproduces_diffusers_from_the_bundle_alone(
    built: Built, source: Path, variant: str, case: Case, tmp_path: Path
) -> None:
    """Read from a place where nothing else is: the bundle is all there is to it."""
    config = open_checkpoint(source).geometry.config
    inputs = case.inputs(config, MODALITIES[variant], seed=7)
    expected = Reference(source / "transformer", torch.float32).step(inputs, case.fps)
    moved = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", built.path, moved], check=True)
    found = harness.chain(moved, {name: value.numpy() for name, value in inputs.items()}, ".cpu.onnx")
    error = relative_error({name: torch.from_numpy(value) for name, value in found.items()}, expected)
    assert error <= 1e-4
    assert len(expected) == 1 + bool(case.sound and variant == "omni") + bool(case.actions)


def test_every_onnx_file_loads(built: Built) -> None:
    import onnx
    import onnxruntime

    files = sorted((built.path / "onnx").glob("*.onnx"))
    assert [f.name for f in files] == sorted(
        f"{name}{suffix}" for name in built.manifest.graphs for suffix in (".onnx", ".cpu.onnx")
    )
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
        if file.name.endswith(".cpu.onnx"):
            onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_onnx_and_manifest_agree_on_names_types_and_dims(built: Built) -> None:
    import onnx
    import onnx.helper

    kinds = {"bfloat16": "BFLOAT16", "float32": "FLOAT", "int64": "INT64"}
    for name, contract in built.manifest.graphs.items():
        graph = onnx.load(str(built.path / f"onnx/{name}.onnx"), load_external_data=False).graph
        for tensors, values in ((contract.inputs, graph.input), (contract.outputs, graph.output)):
            assert [t.name for t in tensors] == [v.name for v in values]
            for tensor, value in zip(tensors, values, strict=True):
                kind = value.type.tensor_type
                assert onnx.TensorProto.DataType.Name(kind.elem_type) == kinds[tensor.dtype]
                assert tuple(d.dim_param or d.dim_value for d in kind.shape.dim) == tensor.dims


def test_two_precisions_share_one_weight_file(built: Built) -> None:
    import onnx

    for name in built.manifest.graphs:
        for suffix in (".onnx", ".cpu.onnx"):
            model = onnx.load(str(built.path / f"onnx/{name}{suffix}"), load_external_data=False)
            files = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
            assert files <= {f"{name}.weights"}


# ---------------------------------------------------------------------------------------------------------------------
# Time table


def test_the_table_is_diffusers_time_embedder_at_each_timestep(built: Built, source: Path) -> None:
    from safetensors.torch import load_file

    table = load_file(built.path / "tables/schedule.safetensors")
    model = Reference(source / "transformer", torch.bfloat16).transformer
    scaled = table["timesteps"] * model.config.timestep_scale
    with torch.no_grad():
        rows = [model.time_embedder(model.time_proj(t.reshape(1)).to(torch.float32)).to(torch.bfloat16) for t in scaled]
    assert torch.equal(table["time_embedding"], torch.cat(rows))


def test_the_timesteps_are_those_of_the_published_pipeline(built: Built, source: Path, variant: str) -> None:
    from diffusers import UniPCMultistepScheduler
    from safetensors.torch import load_file

    steps = load_file(built.path / "tables/schedule.safetensors")["timesteps"].tolist()
    assert list(built.manifest.options["schedule.timesteps"]) == steps  # type: ignore[arg-type]
    if variant == "omni":
        assert steps == list(KARRAS_35)
        return
    # As the pipeline calls it where the model index says use_native_flow_schedule.
    scheduler = UniPCMultistepScheduler.from_pretrained(source / "scheduler")
    import numpy as np

    scheduler.set_timesteps(35, sigmas=np.linspace(1.0 - 1.0 / 1000, 0.0, 36)[:-1])
    assert json.loads((source / "model_index.json").read_text())["use_native_flow_schedule"] is True
    assert steps == scheduler.timesteps.tolist()
    assert steps != list(KARRAS_35)


def test_the_generator_takes_rows_of_the_table(omni_fp32: Path, captured_once: None, tmp_path: Path) -> None:
    """A runtime feeds the table and never runs the schedule graph. In fp32 a row is exact."""
    import onnxruntime
    from safetensors.torch import load_file

    from cosmos_export.compiler.driver import build

    build(harness.transformer_only(omni_fp32, tmp_path / "x", steps=4, parity="never"))
    table = load_file(tmp_path / "x/tables/schedule.safetensors")
    assert table["time_embedding"].dtype == torch.float32
    model = Reference(omni_fp32 / "transformer", torch.float32).transformer
    session = onnxruntime.InferenceSession(str(tmp_path / "x/onnx/schedule.onnx"), providers=["CPUExecutionProvider"])
    for step, row in zip(table["timesteps"], table["time_embedding"], strict=True):
        with torch.no_grad():
            exact = model.time_embedder(model.time_proj(step.reshape(1) * model.config.timestep_scale))
        assert torch.equal(row, exact[0])
        (found,) = session.run(None, {"timestep": step.reshape(1).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), exact, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The same again


def test_an_engine_is_the_same_bytes_on_a_busy_machine(omni_bundle: Built, tmp_path: Path) -> None:
    """The builder's threads come in another order each time; that must not move what the engine is ordered by."""
    manifest = omni_bundle.manifest
    dims = {tensor.name: list(tensor.dims) for tensor in manifest.graphs["generator"].inputs}
    profiles = [input_shapes(parse_profile(name), dims) for name in ("256p-17f", "256p-17f+sound")]
    model = omni_bundle.path / "onnx/generator.onnx"

    def built_again(number: int) -> bytes:
        path = tmp_path / f"{number:02}.engine"
        build_engine(model, path, target=load_target("rtx-pro-6000"), profiles=profiles)
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(built_again, range(16)))) == 1


def test_two_builds_are_the_same_bytes_but_for_what_is_volatile(
    shared: Path, omni: Path, omni_bundle: Built, tmp_path: Path
) -> None:
    """Other threads, other working directory, other name, a relative path to the checkpoint, no graphs of others."""
    arguments = (omni.name, *harness.TRANSFORMER_ONLY, "--no-cache")
    again = harness.command_line_build(tmp_path, "another name", *arguments, threads=2, cwd=omni.parent)
    names = sorted(p.relative_to(omni_bundle.path) for p in omni_bundle.path.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again.path) for p in again.path.rglob("*") if p.is_file())
    different = [n for n in names if (omni_bundle.path / n).read_bytes() != (again.path / n).read_bytes()]
    assert different == [Path("manifest.json")]
    first, second = (json.loads((b.path / "manifest.json").read_text()) for b in (omni_bundle, again))
    volatile: list[dict[str, Any]] = [m.pop("volatile") for m in (first, second)]
    assert first.pop("digest") != second.pop("digest")
    assert first == second
    # What may differ, by name. Nothing else of a manifest may.
    for fields in volatile:
        assert fields.pop("golden") is None  # no policy
        assert set(fields) == {"created", "build_seconds", "peak_memory_bytes", "stage_seconds", "measured", "planned"}
