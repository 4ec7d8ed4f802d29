"""Quantized builds: what is in the engines, what is measured, and that planted mistakes are caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
import torch

import cosmos_export.compiler.published as published
from cosmos_export.bundle import open_verdicts, read_bundle, verify_bundle
from cosmos_export.calibration.table import ScaleTable, read_scale_table, write_scale_table
from cosmos_export.cli.build import _verdict
from cosmos_export.compiler.coverage import coverage_note, coverage_verdicts
from cosmos_export.compiler.document import _write_evidence
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.evidence import BuildResult
from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.remarks import other_schedule
from cosmos_export.diagnostics import CosmosExportError, FindingError, InternalError, UnsupportedError, UserError
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.parity import Parity
from cosmos_export.ir import ops, packing
from cosmos_export.ir.spec import WeightBinding
from cosmos_export.passes.assign_precision import AssignPrecision
from cosmos_export.passes.insert_quantization import InsertQuantization
from cosmos_export.passes.options import Ranges

pytestmark = pytest.mark.xdist_group("builds")
KEYS_VALUES = "und.attention.kv=fp8"
FIXED = "256p-9f,und_len=33,sound_len=0,action_len=0"


@pytest.fixture(autouse=True)
def _quick(captured_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "Parity", partial(Parity, cases=CASES[1:2]))


@pytest.fixture(scope="session")
def scales(shared: Path, omni: Path) -> Path:
    return harness.scale_table(omni, shared / "omni-scales")


@pytest.fixture(scope="session")
def edge_scales(shared: Path, edge: Path) -> Path:
    return harness.scale_table(edge, shared / "edge-scales")


def quantized(checkpoint: Path, output: Path | None, recipe: str = "fp8", **options: Any) -> BuildResult:
    """A build whose losses are reported: a network of random weights may lose more than a trained one."""
    defaults = {"parity": "never", "quality": "report", "steps": 8}
    return build(harness.transformer_only(checkpoint, output, recipe=recipe, **{**defaults, **options}))


def types(result: BuildResult) -> dict[str, dict[str, int]]:
    return {e.graph: dict(e.graphs[0].gemm_types()) for e in result.engines if e.graphs[0].gemms}


# -- engines ----------------------------------------------------------------------------------------------------------

PLANS: dict[str, dict[str, dict[str, int]]] = {
    "fp8": {
        "reasoner": {"fp8-weight": 9},
        "generator": {"bf16": 2, "fp8-weight": 12},
        "generator_2": {"bf16": 2, "fp8": 12},
    },
    "memory": {
        "reasoner": {"int4-weight": 9},
        "generator": {"bf16": 2, "fp8-weight": 12},
        "generator_2": {"bf16": 2, "fp8": 12},
    },
    "fp4": {"reasoner": {"fp8-weight": 9}, "generator": {"bf16": 2, "fp8": 9, "nvfp4": 3}},
    "int4": {"reasoner": {"int4-weight": 9}, "generator": {"bf16": 2, "int4-weight": 12}},
}
"""Three layers, the reasoner's last cut down to its keys and values; the profile has no sound and no actions."""


@pytest.mark.parametrize("recipe", PLANS)
def test_engines_contain_what_the_recipe_says(tmp_path: Path, edge: Path, edge_scales: Path, recipe: str) -> None:
    calibration = None if recipe == "int4" else edge_scales
    result = quantized(edge, tmp_path / "x", recipe, target="rtx-pro-6000", calibration=calibration)
    assert types(result) == PLANS[recipe]
    for engine in result.engines:
        graph = engine.graphs[0]
        assert engine.check.passed and not graph.dequantize and len(graph.attention) == engine.attention
        if graph.gemms:
            assert "100.0% of the layers' weights in 8 or 4 bit" in engine.check.found
    manifest = read_bundle(tmp_path / "x")
    assert manifest.recipe == recipe and manifest.precision is not None and manifest.precision.rounding == "exact"
    assert (manifest.precision.calibration is None) == (recipe == "int4")
    assert verify_bundle(tmp_path / "x").ok


@pytest.mark.parametrize("target", ["l40s", "dgx-spark"])
def test_other_targets_build_what_is_native_there(tmp_path: Path, edge: Path, edge_scales: Path, target: str) -> None:
    result = quantized(edge, tmp_path / "x", "memory", target=target, calibration=edge_scales)
    assert types(result) == PLANS["memory"]
    if target == "l40s":
        with pytest.raises(UnsupportedError, match="Ada has no FP4"):
            quantized(edge, tmp_path / "y", "fp4", target=target, calibration=edge_scales)


def test_a_loop_of_segments_that_share_weights(tmp_path: Path, omni: Path, scales: Path) -> None:
    """16-bit activations, 8-bit ones, 16-bit ones: a step of the first kind is an engine of its own."""
    result = quantized(omni, tmp_path / "x", target="rtx-pro-6000", calibration=scales, loop="device")
    manifest = read_bundle(tmp_path / "x")
    assert manifest.loop is not None
    assert [s.steps for s in manifest.loop.segments] == [1, 1, 1, 2, 1, 1, 1] and not manifest.loop.bodies
    found = [types(result)[s.graph] for s in manifest.loop.segments]
    assert ["fp8" in one for one in found] == [False, False, False, True, False, False, False]
    assert all(e.check.passed for e in result.engines)
    weights = [f.path for f in manifest.files if f.path.endswith(".weights")]
    assert "onnx/generator.weights" in weights and not any("denoise" in path for path in weights)


def test_weights_alone_in_a_loop_are_refused_where_they_would_be_widened(omni: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve(harness.transformer_only(omni, recipe="int4", target="rtx-pro-6000", loop="device", output=Path("x")))
    assert caught.value.code == "CX364" and "engine of its own" in caught.value.message


@pytest.mark.parametrize("recipe", ["fp8", "fp4"])
def test_weights_as_inputs_keep_the_kernels(
    tmp_path: Path, edge: Path, edge_scales: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever multiplies narrow by narrow. With 16-bit activations a weight is widened in the product, and stays."""
    from cosmos_export.targets.onnx import model as onnx_model

    monkeypatch.setattr(onnx_model, "EXTERNAL_BYTES", 1024)
    options = {"target": "rtx-pro-6000", "calibration": edge_scales, "weights": "external"}
    result = quantized(edge, tmp_path / "x", recipe, **options)
    assert types(result) == PLANS[recipe]
    narrow = "generator_2" if recipe == "fp8" else "generator"
    for engine in result.engines:
        assert engine.check.passed
        kinds = {weight.dtype for weight in engine.weights}
        assert ("float8_e4m3fn" in kinds) == (engine.graph == narrow)
        assert ("float4_e2m1" in kinds) == (engine.graph == narrow and recipe == "fp4")
        own = len(engine.report.inputs) - len(engine.weights)
        assert [i.name for i in engine.report.inputs[own:]] == [w.name for w in engine.weights]
    (engine,) = [e for e in result.engines if e.graph == narrow]
    manifest = read_bundle(tmp_path / "x")
    record = next(r for r in manifest.engines if r.graph == narrow)
    assert record.weights == engine.weights and {w.path for w in record.weights} == {"onnx/generator.weights"}
    assert verify_bundle(tmp_path / "x").ok


def test_a_table_made_on_another_schedule_is_said(edge: Path, edge_scales: Path) -> None:
    for steps, differs in ((35, True), (None, False)):
        options = {"recipe": "fp8", "calibration": edge_scales, "mode": "t2v"}
        made = read_scale_table(edge_scales).lineage.get("schedules", ())
        job = resolve(harness.transformer_only(edge, Path("x"), **options, steps=steps))
        table = replace(job.scales, lineage={"schedules": [job.schedule.text("t2v").replace(" 35 ", " 4 ")]})
        job = replace(job, scales=table if differs else job.scales)
        found = list(other_schedule(job.scales, "t2v", job.schedule))
        assert bool(found) is differs, (found, made)


def test_weights_that_cannot_be_inputs_are_cut(
    tmp_path: Path, edge: Path, edge_scales: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a product widens stays in the engine, and in the builder's memory; what is an input does not."""
    from cosmos_export.plan.sizes import BUILDER_BYTES, compiler_bytes
    from cosmos_export.targets.onnx import model as onnx_model

    monkeypatch.setattr(onnx_model, "EXTERNAL_BYTES", 1024)
    layers = resolve(harness.transformer_only(edge, Path("x"))).layers
    options = {"target": "rtx-pro-6000", "calibration": edge_scales, "weights": "external"}
    budget = f"{(compiler_bytes(layers) + BUILDER_BYTES) / 1e6 + 0.2}MB"
    result = quantized(edge, tmp_path / "x", "fp8", **options, memory_budget=budget)
    parts = {name: len(chain) for name, chain in read_bundle(tmp_path / "x").chains.items()}
    assert set(parts) == {"generator"} and parts["generator"] > 1  # generator_2 multiplies FP8 by FP8
    for engine in result.engines:
        if engine.graph.startswith("generator_part"):
            assert engine.check.passed and "float8_e4m3fn" not in {weight.dtype for weight in engine.weights}
    assert verify_bundle(tmp_path / "x").ok


def test_weights_in_a_loop_on_the_device(tmp_path: Path, edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_export.targets.onnx import model as onnx_model

    monkeypatch.setattr(onnx_model, "EXTERNAL_BYTES", 1024)
    options = {"target": "rtx-pro-6000", "weights": "external", "loop": "device", "steps": 4}
    result = quantized(edge, tmp_path / "x", "bf16", **options)
    (loop,) = [engine for engine in result.engines if engine.graph == "denoise"]
    assert loop.check.passed and {weight.dtype for weight in loop.weights} == {"bfloat16"}
    with pytest.raises(UnsupportedError, match="CX452"):
        resolve(harness.transformer_only(edge, Path("x"), target="cpu", weights="external"))


def test_fp8_attention_is_fused_over_fixed_sizes(tmp_path: Path, shared: Path, omni: Path, scales: Path) -> None:
    complete = harness.with_attention(scales, shared / "omni-kv-scales")
    options = {"target": "rtx-pro-6000", "calibration": complete}
    result = quantized(omni, tmp_path / "x", "fp8-attention", profiles=(FIXED,), **options)
    kinds = {e.graph: {a.type for a in e.graphs[0].attention} for e in result.engines if e.attention}
    assert kinds == {"reasoner": {"bf16"}, "generator": {"bf16"}, "generator_2": {"fp8"}}
    with pytest.raises(UnsupportedError) as caught:
        quantized(omni, tmp_path / "y", "fp8-attention", **options)
    assert caught.value.code == "CX359" and "und_len" in caught.value.message and "und_len=" in caught.value.hint
    with pytest.raises(UserError, match=r"CX312.*q_amax of attention in layer 0"):
        quantized(omni, tmp_path / "z", "fp8-attention", profiles=(FIXED,), target="cpu", calibration=scales)


@pytest.mark.parametrize("recipe", ["fp8", "fp8-attention"])
def test_keys_and_values_of_the_prompt_in_fp8(
    tmp_path: Path, shared: Path, omni: Path, scales: Path, recipe: str
) -> None:
    """Half the bytes from engine to engine, and every attention as fused as before; nothing is read as a weight."""
    complete = harness.with_attention(scales, shared / "omni-kv-scales")
    options = {"target": "rtx-pro-6000", "calibration": complete, "profiles": (FIXED,), "overrides": (KEYS_VALUES,)}
    result = quantized(omni, tmp_path / "x", recipe, **options)
    attention = {e.graph: {a.type for a in e.graphs[0].attention} for e in result.engines if e.attention}
    body = {"fp8"} if recipe == "fp8-attention" else {"bf16"}
    assert attention == {"reasoner": {"bf16"}, "generator": {"bf16"}, "generator_2": body}
    assert all(e.check.passed and e.fused_attention == e.attention for e in result.engines)
    manifest = read_bundle(tmp_path / "x")
    assert {t.dtype for t in manifest.graphs["reasoner"].outputs} == {"float8_e4m3fn"}
    assert manifest.precision is not None and manifest.precision.table["und.attention.kv"] == "fp8"


# -- patterns that are no quantized product ---------------------------------------------------------------------------


def test_a_scale_that_is_computed_is_caught(
    tmp_path: Path, edge: Path, edge_scales: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The activation's scale as a value of the graph: it builds, and multiplies in 16 bit."""
    from cosmos_export.targets.onnx.rules import RULES

    rule = RULES[ops.QUANTIZE]

    def computed(low: Any, node: Any) -> str:
        x, scale = node.args
        name = low.op("ReduceMax", low.op("Abs", low.values[x]), keepdims=0)
        wide = low.op("Cast", name, to=1)
        low.values[scale] = low.op("Div", wide, low.constant(packing_constant(), "largest"))
        return rule(low, node)

    monkeypatch.setitem(RULES, ops.QUANTIZE, computed)
    with pytest.raises(FindingError) as caught:
        quantized(edge, tmp_path / "x", "fp8", target="rtx-pro-6000", calibration=edge_scales, steps=1)
    assert caught.value.code == "CX450" and "planned fp8" in caught.value.message


def packing_constant() -> Any:
    import numpy as np

    return np.asarray(packing.E4M3_MAX, np.float32)


def test_block_sizes_on_fp8_are_caught(
    tmp_path: Path, edge: Path, edge_scales: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights with a scale for each block of 32 columns: it builds, and a kernel widens them in every call."""
    import numpy as np

    from cosmos_export.ir.graph import is_weight, spec_of
    from cosmos_export.targets.onnx.rules import RULES

    rule = RULES[ops.DEQUANTIZE]

    def blocked(low: Any, node: Any) -> str:
        x, _, dtype = node.args
        if not is_weight(x):
            return rule(low, node)
        rows, columns = spec_of(x).shape
        scales = low.constant(np.full((rows, columns // 32), 0.01, np.float32), "blocks")
        kind = {"output_dtype": low.type_of(dtype)}
        if low.portable:
            kind = {}
        return low.op("DequantizeLinear", low.values[x], scales, axis=1, block_size=32, **kind)

    monkeypatch.setitem(RULES, ops.DEQUANTIZE, blocked)
    with pytest.raises(CosmosExportError) as caught:
        quantized(
            edge,
            tmp_path / "x",
            "fp8",
            target="rtx-pro-6000",
            calibration=edge_scales,
            overrides=("und=bf16",),
            steps=1,
        )
    assert caught.value.code in ("CX450", "CX421"), caught.value


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp8", "int4"])
def test_onnx_runtime_runs_the_loop(tmp_path: Path, omni: Path, scales: Path, recipe: str) -> None:
    """Free-running, from the same noise: cosine ≥ 0.98 to the unquantized model. FP8 is within all other limits too."""
    options = {"calibration": scales, "quality": "enforce"} if recipe == "fp8" else {}
    result = quantized(omni, tmp_path / "x", recipe, loop="device", parity="auto", **options)
    by_stage = {m.stage: m for m in result.parity}
    g0 = by_stage["ONNX Runtime, generator as quantized"]
    assert g0.limit == 1e-4 and g0.value < 1e-5
    (loop,) = result.quality
    assert loop.limit == 0.02 and 0 < loop.value <= loop.limit
    assert result.losses is not None and bool(result.losses.step_problems) == (recipe == "int4")


def test_the_loop_runs_on_keys_and_values_in_fp8(tmp_path: Path, shared: Path, omni: Path, scales: Path) -> None:
    complete = harness.with_attention(scales, shared / "omni-kv-scales")
    options = {"overrides": (KEYS_VALUES,), "calibration": complete, "loop": "device", "parity": "auto", "steps": 3}
    result = quantized(omni, tmp_path / "x", "bf16", quality="enforce", **options)
    g0 = next(m for m in result.parity if m.stage == "ONNX Runtime, generator as quantized")
    (loop,) = result.quality
    assert g0.value < 1e-5 and 0 < loop.value < 1e-3
    assert result.losses is not None and all(0 < step.relative < 0.02 for step in result.losses.steps)


def test_the_identity_recipe_is_the_unquantized_build(tmp_path: Path, edge: Path) -> None:
    found = []
    for name, overrides in (("plain", ()), ("identity", ("gen=bf16", "und=bf16"))):
        result = quantized(edge, tmp_path / name, "bf16", overrides=overrides, loop="device", steps=2)
        assert result.losses is None and result.manifest is not None and result.manifest.precision is None
        found.append({f.path: f.sha256 for f in result.manifest.files})
    assert found[0] == found[1]


def test_what_is_measured_is_in_the_bundle(tmp_path: Path, omni: Path, scales: Path) -> None:
    result = quantized(omni, tmp_path / "x", calibration=scales, overrides=("gen.mlp.down[0:1]=bf16",))
    document = json.loads((tmp_path / "x/report/quantization.json").read_text())
    sites = {(one["tower"], one["kind"], one["layer"], one["scheme"]) for one in document["linears"]}
    assert ("gen", "mlp.down", 1, "fp8") in sites and ("gen", "mlp.down", 1, "fp8-w8a16") in sites
    assert not any(site[:3] == ("gen", "mlp.down", 0) for site in sites)
    assert all(one["passed"] and 15 < one["sqnr_db"] < 60 for one in document["linears"])
    assert document["steps"] and document["overrides"] == ["gen.mlp.down[0:1]=bf16"]
    # Nothing is sampled, and still a step of each body is seen: 16-bit activations in the first and last three.
    assert document["alike"] == [
        {"first": 0, "steps": 6, "measured": [0]}, {"first": 3, "steps": 2, "measured": [3]},
    ]  # fmt: skip
    assert [step["step"] for step in document["steps"]] == [0, 3]
    assert document["steps"][1]["relative"] > 1.1 * document["steps"][0]["relative"]
    assert "--parity never" in document["measured_on"] and "too large" not in document["measured_on"]
    page = (tmp_path / "x/report/quantization.html").read_text()
    assert page.startswith("<!doctype html>") and "attention.qkv" in page and "<script" not in page
    manifest = result.manifest
    assert manifest is not None and manifest.precision is not None and manifest.loop is not None
    assert manifest.precision.table["gen.mlp.down[1:3]@3:5"] == "fp8"
    assert manifest.loop.bodies == ("generator",) * 3 + ("generator_2",) * 2 + ("generator",) * 3
    verdicts = {v.stage: v for v in manifest.evaluation}
    assert verdicts["G1"].verdict == "pass"
    assert "1 of 6 that compute as step 1, 1 of 2 that compute as step 4" in verdicts["G2"].note
    assert verdicts["coverage"].verdict == "not-measured"  # the tests' table does not say what it saw
    lineage = json.loads((tmp_path / "x/calibration/lineage.json").read_text())
    assert lineage["checkpoint"] == read_scale_table(scales).checkpoint


def test_a_loss_beyond_the_limit_ends_the_build_and_leaves_its_evidence(tmp_path: Path, omni: Path) -> None:
    written: list[Path] = []

    def found(result: BuildResult, error: FindingError) -> None:
        written.extend(_write_evidence(tmp_path / "x", result, error))

    options = {"parity": "never", "quality": "enforce", "steps": 8}
    with pytest.raises(FindingError) as caught:
        build(harness.transformer_only(omni, tmp_path / "x", recipe="int4", **options), found=found)
    assert caught.value.code == "CX362" and "--set '" in caught.value.hint and "--quality report" in caught.value.hint
    names = ["x.build.json", "x.quantization.html", "x.quantization.json"]
    assert harness.leftovers(tmp_path) == sorted(path.name for path in written) == names
    document = json.loads((tmp_path / "x.build.json").read_text())
    assert document["failed"]["code"] == "CX362" and document["gates"]["problems"]
    assert {v["stage"]: v["verdict"] for v in document["verdicts"]}["G2"] == "fail"
    report = json.loads((tmp_path / "x.quantization.json").read_text())
    assert report["problems"] and report["steps"]


def test_a_loss_that_is_only_reported_is_the_last_line(tmp_path: Path, omni: Path) -> None:
    result = quantized(omni, tmp_path / "x", "int4", steps=1)
    assert result.losses is not None and result.losses.step_problems and result.manifest is not None
    said = _verdict(result, tmp_path / "x")
    assert "failures that were only to be reported: G2 of steps failed: the median step is" in said
    assert said.startswith(f"built {tmp_path / 'x'}") and "within their limits" not in said
    assert open_verdicts(result.manifest).line.startswith("this bundle failed checks of its build: G2 of steps (the")


SEEN = {
    modality: {quarter: {"cond": 1, "uncond": 1} for quarter in ("0-25 %", "25-50 %", "50-75 %", "75-100 %")}
    for modality in ("vision", "sound")
}


@pytest.mark.parametrize(
    ("seen", "schedules", "missing"),
    [
        (SEEN, ["t2v: unipc on karras, 8 steps, guidance 6"], ""),
        ({"vision": SEEN["vision"]}, [], "sound"),
        (SEEN, ["i2v: unipc on karras, 8 steps, guidance 6"], "mode t2v (it saw i2v)"),
        ({**SEEN, "sound": {**SEEN["sound"], "50-75 %": {"cond": 1}}}, [], "sound at 50-75 % of the steps (uncond)"),
        ({**SEEN, "vision": {"0-25 %": {"cond": 1, "uncond": 1}}}, [], "vision at 25-50 % of the steps (cond, uncond)"),
        ({**SEEN, "vision": 3}, "t2v", "vision"),
    ],
)
def test_what_the_scale_table_never_saw(
    tmp_path: Path, omni: Path, scales: Path, seen: Any, schedules: Any, missing: str
) -> None:
    table = read_scale_table(scales)
    lineage = {"coverage": seen, "schedules": schedules}
    write_scale_table(replace(table, lineage=lineage), tmp_path / "table")
    profiles = ("256p-9f+sound",)
    asked = {"recipe": "fp8", "calibration": tmp_path / "table", "steps": 8, "profiles": profiles}
    job = resolve(harness.transformer_only(omni, tmp_path / "x", quality="report", **asked))
    note = coverage_note(job.coverage)
    assert (missing in note) if missing else not note
    (verdict,) = coverage_verdicts(job.coverage)
    assert verdict.verdict == ("fail" if missing else "pass")
    if missing:
        with pytest.raises(FindingError) as caught:
            build(harness.transformer_only(omni, tmp_path / "x", **asked))
        assert caught.value.code == "CX327" and missing in caught.value.message
        assert "--quality report" in caught.value.hint


@pytest.mark.parametrize(
    ("modes", "missing"),
    [
        ({"t2v": SEEN["vision"], "i2v": {}}, ""),
        ({"i2v": SEEN["vision"], "v2v": SEEN["vision"]}, "mode t2v (it saw i2v, v2v)"),
        (
            {"t2v": {**SEEN["vision"], "75-100 %": {"cond": 3, "uncond": 0}}},
            "mode t2v at 75-100 % of the steps (uncond)",
        ),
    ],
)
def test_a_mode_is_seen_in_every_part_of_its_schedule(
    tmp_path: Path, omni: Path, scales: Path, modes: Any, missing: str
) -> None:
    lineage = {"coverage": SEEN, "modes": modes, "schedules": ["t2v: listed, and perhaps without a pass"]}
    write_scale_table(replace(read_scale_table(scales), lineage=lineage), tmp_path / "table")
    asked = {"recipe": "fp8", "calibration": tmp_path / "table", "steps": 8, "profiles": ("256p-9f+sound",)}
    note = coverage_note(resolve(harness.transformer_only(omni, tmp_path / "x", **asked)).coverage)
    assert (missing in note) if missing else not note


def test_a_modality_that_no_request_can_have_needs_no_ranges(tmp_path: Path, omni: Path, scales: Path) -> None:
    lineage = {"coverage": {"vision": SEEN["vision"]}, "schedules": []}
    write_scale_table(replace(read_scale_table(scales), lineage=lineage), tmp_path / "table")
    asked = {"recipe": "fp8", "calibration": tmp_path / "table", "steps": 8, "profiles": ("256p-9f",)}
    job = resolve(harness.transformer_only(omni, tmp_path / "x", **asked))
    assert not coverage_note(job.coverage)


# -- planted mistakes -------------------------------------------------------------------------------------------------


def _planted(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, InsertQuantization], None]) -> None:
    run = InsertQuantization.run

    def wrong(self: InsertQuantization, program: Any) -> Any:
        result = run(self, program)
        change(program, self)
        return result

    monkeypatch.setattr(InsertQuantization, "run", wrong)


def test_swapped_towers_are_caught(tmp_path: Path, omni: Path, scales: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_export.passes import assign_precision

    towers = assign_precision.towers_of
    monkeypatch.setattr(
        assign_precision, "towers_of", lambda program: dict(zip(("gen", "und"), towers(program).values(), strict=True))
    )
    with pytest.raises(InternalError) as caught:
        quantized(omni, tmp_path / "x", calibration=scales)
    assert caught.value.code == "CX360" and "is of the und tower" in caught.value.message
    assert AssignPrecision.name and harness.leftovers(tmp_path) == []


def test_transposed_scales_are_caught(tmp_path: Path, omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = packing.int4_scale

    def transposed(rows: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
        found = scale(rows, group, dtype)
        return found.T.reshape(found.shape)

    values = packing.to_int4
    monkeypatch.setattr(packing, "to_int4", lambda rows, s, group: values(rows, scale(rows, group, s.dtype), group))
    monkeypatch.setattr(packing, "int4_scale", transposed)
    with pytest.raises(FindingError) as caught:
        quantized(omni, tmp_path / "x", "int4")
    assert caught.value.code == "CX361" and "int4" in caught.value.message and "--set" in caught.value.hint


def test_keys_for_values_are_caught(tmp_path: Path, omni: Path, scales: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a merged weight in another order than the slices of its result."""

    def swap(program: Any, _: Any) -> None:
        for graph in program.graphs.values():
            for node in graph.weights.values():
                binding = node.meta["weight"]
                if binding.packing is not None and len(binding.sources) == 3:
                    q, k, v = binding.sources
                    node.meta["weight"] = replace(binding, sources=(q, v, k))

    _planted(monkeypatch, swap)
    with pytest.raises(FindingError) as caught:
        quantized(omni, tmp_path / "x", calibration=scales)
    assert caught.value.code in ("CX361", "CX362")


@pytest.mark.parametrize("factor", [0.05, 0.3, 0.6, 100.0, 10000.0])
def test_ranges_of_query_key_and_value_that_the_compiler_changes_are_caught(
    tmp_path: Path, omni: Path, scales: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Where they are wrong in the graph, everything that is made of the graph agrees; 0.6 and 100 lose little."""
    of = Ranges.input_amax

    def wrong(self: Ranges, weight: WeightBinding) -> float:
        return of(self, weight) * (factor if "_q_proj" in weight.keys[0] else 1.0)

    monkeypatch.setattr(Ranges, "input_amax", wrong)
    with pytest.raises(InternalError) as caught:
        quantized(omni, tmp_path / "x", calibration=scales)
    assert caught.value.code == "CX363" and "add_q_proj" in caught.value.message
    assert harness.leftovers(tmp_path) == []


def test_a_constant_of_another_value_is_caught(
    tmp_path: Path, shared: Path, omni: Path, scales: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = harness.with_attention(scales, shared / "omni-kv-scales")

    def larger(program: Any, _: Any) -> None:
        for graph in program.graphs.values():
            for node in graph.calls(ops.JOINT_ATTENTION_FP8)[-1:]:
                node.args[5].meta["constant"] = node.args[5].meta["constant"] * torch.tensor([1.0, 1.2, 1.0])

    _planted(monkeypatch, larger)
    with pytest.raises(InternalError, match="attention of layer 2"):
        quantized(omni, tmp_path / "x", "fp8-attention", calibration=complete, profiles=(FIXED,))


def test_stale_scales_are_caught(tmp_path: Path, omni: Path, edge: Path, scales: Path, edge_scales: Path) -> None:
    with pytest.raises(UserError) as caught:
        quantized(omni, tmp_path / "x", calibration=edge_scales)
    assert caught.value.code == "CX311" and "another checkpoint" in caught.value.message
    # Of this checkpoint by name, and of other numbers: a range ten times too small.
    table = read_scale_table(scales)
    small = {key: value / 10 for key, value in table.amax.items()}
    write_scale_table(ScaleTable(small, {}, table.checkpoint, {}), tmp_path / "small")
    with pytest.raises(FindingError) as lost:
        quantized(omni, tmp_path / "x", calibration=tmp_path / "small", steps=1)
    assert lost.value.code == "CX361" and "calibrate again" in lost.value.hint


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"recipe": "fp8"}, "CX356"),
        ({"recipe": "bf16", "calibration": "scales"}, "CX356"),
        ({"recipe": "int8"}, "CX350"),
        ({"recipe": "fp4", "calibration": "scales"}, "CX352"),
        ({"recipe": "fp8", "overrides": ("gen.mlp@0:2=int4",), "calibration": "scales"}, "CX354"),
        ({"recipe": "fp8", "overrides": ("gen.fc=int4",), "calibration": "scales"}, "CX353"),
        ({"recipe": "fp8", "calibration": "nowhere"}, "CX310"),
        ({"recipe": "fp8", "quality": "high", "calibration": "scales"}, "CX451"),
    ],
)
def test_requests_that_are_refused(
    tmp_path: Path, omni: Path, scales: Path, options: dict[str, Any], code: str
) -> None:
    if "calibration" in options:
        options = {**options, "calibration": scales if options["calibration"] == "scales" else tmp_path / "nowhere"}
    with pytest.raises(CosmosExportError) as caught:
        resolve(harness.transformer_only(omni, tmp_path / "x", **options))
    assert caught.value.code == code and caught.value.hint


def test_fp32_checkpoints_are_refused_for_gpus(tmp_path: Path, omni_fp32: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve(harness.transformer_only(omni_fp32, tmp_path / "x", recipe="int4", target="rtx-pro-6000"))
    assert caught.value.code == "CX358"
