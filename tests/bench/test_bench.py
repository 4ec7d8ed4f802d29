"""`bench` and `doctor`: on shapes that take no time, everything but the device."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from cosmos_export.bench.clock import CardSample, CardWatch
from cosmos_export.bench.geometry import GUIDED, PLAIN, capture_graphs, quantize_geometry, read_graphs, write_graphs
from cosmos_export.bench.measure import GeometryRequest, geometry_schedule, measure_geometry
from cosmos_export.bench.published import published_cells, target_of
from cosmos_export.bench.result import MeasuredPart, Measurement, compare, read_measurement, regressions, write
from cosmos_export.cli import console, verbs
from cosmos_export.cli.bench import register as register_bench
from cosmos_export.cli.doctor import register as register_doctor
from cosmos_export.compiler.precision import planned_types
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.doctor import CheckState, Facts, examine
from cosmos_export.ir import ops
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.ops import aten
from cosmos_export.machine.gpu import Gpu
from cosmos_export.machine.packages import pins
from cosmos_export.plan import published_subject
from cosmos_export.precision.recipe import load_recipe, resolve_recipe
from cosmos_export.progress import Silent
from cosmos_export.targets import load_target

pytestmark = pytest.mark.xdist_group("bench")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny graphs of a video model with both kinds of steps, captured once."""
    folder = tmp_path_factory.mktemp("graphs")
    _, schedule = geometry_schedule(GeometryRequest("nano", "t2i-720p"))
    found = capture_graphs(published_subject("nano").geometry, ("vision",), schedule, tiny=True)
    assert set(found.graphs) == {"reasoner", "conditioning", GUIDED, PLAIN}
    write_graphs(found, folder / "tiny-vision")
    return folder


def asked(graphs: Path, folder: Path | None = None, **options: Any) -> GeometryRequest:
    given = {"runs": 1, "warm_up": 0, "graphs": folder or graphs / "tiny-vision", "compiled": False, "dry_run": True}
    return GeometryRequest("nano", **{"workload": "t2i-720p", "device": "cpu", **given, **options})


def guided_steps(graphs: Path, **options: Any) -> int:
    return sum(geometry_schedule(asked(graphs, **options))[1].guided)


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8-attention", "int4", "memory"])
def test_a_geometry_is_measured(graphs: Path, recipe: str) -> None:
    """As a build of the recipe would run it: steps that compute alike are one component."""
    found = measure_geometry(asked(graphs, recipe=recipe), Silent(), "a command")
    calls = {c.name: c.calls for c in found.components}
    guided = guided_steps(graphs)
    wanted = {"reasoner": 1, "reasoner-negative": 1, "conditioning": 1, GUIDED: guided, PLAIN: 50 - guided}
    if recipe not in ("bf16", "int4"):  # the first three steps, which are guided, and the last three, which are not
        wanted |= {GUIDED: guided - 3, PLAIN: 47 - guided, f"{GUIDED}/fp8-w8a16": 3, f"{PLAIN}/fp8-w8a16": 3}
    assert calls == wanted
    assert found.forwards == 50 + guided and found.request_s > 0 and found.forward_s is not None
    document = json.loads(json.dumps(found.document()))
    assert document["subject"].startswith("geometry:tiny, random weights") and document["dry_run"]
    assert {"cores", "gpus", "versions"} <= set(document["machine"])
    assert {cell["gpu"] for cell in document["published"]} >= {"h100", "b200"}
    assert "extrapolated" in document and "measured" in document["extrapolated"]


def test_baselines_stand_in_the_same_run(graphs: Path, app: typer.Typer) -> None:
    """diffusers' own model and scheduler on the same request; ratios of this project's time over theirs, and what is
    not there."""
    found = measure_geometry(asked(graphs, recipe="fp8", baselines=True, runs=2), Silent())
    eager, regional = found.baselines
    guided = sum(geometry_schedule(asked(graphs))[1].guided)
    for one in (eager, regional):
        assert {c.name: c.calls for c in one.components} == {GUIDED: guided, PLAIN: 50 - guided}
        assert one.recipe == "bf16" and one.forwards == found.forwards and len(one.components[0].samples_s) == 2
    assert "regional" in regional.name and "(eager)" in regional.name  # a dry run traces and does not compile
    document = json.loads(json.dumps(found.document()))
    row = document["baselines"][0]
    assert row["ours_over_request"] == pytest.approx(found.request_s / eager.request_s)
    assert row["ours_over_forward"] == pytest.approx(found.forward_s / eager.forward_s)
    assert not row["same_precision"] and "no FP8 product" in document["baselines_left_out"][0]


def test_a_baseline_is_diffusers_own_arithmetic(graphs: Path) -> None:
    """One guided step: the stock model on both branches, guidance and the stock scheduler, nothing left out."""
    from cosmos_export.bench.baseline import BaselineRequest, random_transformer, stock_step
    from cosmos_export.bench.geometry import dims_of, tiny_geometry
    from cosmos_export.evaluation.cases import Case
    from cosmos_export.evaluation.reference import Reference

    subject = published_subject("nano")
    workload, schedule = geometry_schedule(asked(graphs, workload="t2v-480p-189f"))
    geometry, dims = tiny_geometry(subject.geometry), dims_of(workload, tiny=True)
    cpu = torch.device("cpu")
    model = random_transformer(geometry, cpu, torch.bfloat16)
    given = BaselineRequest(geometry, ("vision",), dims, schedule, subject.sampling.scheduler, cpu, 1, 0)
    step = stock_step(model, given, 2)
    first, second = step()["vision"], step()["vision"]
    inputs = [
        Case("x", prompt, dims["frames"], dims["height"], dims["width"]).inputs(geometry.config, ("vision",))
        for prompt in (dims["und_len"], dims["negative_und_len"])
    ]
    cond, uncond = (Reference.of(model, torch.bfloat16).step(one, 24.0)["vision_velocity"] for one in inputs)
    velocity, sigmas = uncond + schedule.guidance * (cond - uncond), schedule.sigmas
    x = inputs[1]["vision_latent"]
    # UniPC's first step is of first order: along the velocity, from one sigma to the next.
    assert torch.allclose(first, x + (sigmas[1] - sigmas[0]) * velocity.float(), atol=2e-2)
    assert not torch.equal(first, second)  # the second is the next of the trajectory


def test_the_reasoner_alone(graphs: Path) -> None:
    found = measure_geometry(asked(graphs, workload="reasoner"), Silent())
    assert [(c.name, c.calls) for c in found.components] == [("reasoner", 1)]
    assert (found.steps, found.forwards, found.forward_s, found.extrapolated) == (0, 0, None, "")
    with pytest.raises(CosmosExportError, match="no reasoner without"):
        measure_geometry(asked(graphs, workload="reasoner", baselines=True), Silent())


def test_a_recipe_is_changed_as_in_a_build(graphs: Path) -> None:
    found = measure_geometry(asked(graphs, recipe="fp8", places=("gen=fp8",)), Silent())
    assert {c.name for c in found.components if c.name.startswith("step")} == {GUIDED, PLAIN}
    assert found.recipe == "fp8 --set gen=fp8"


def test_what_the_prompt_hands_on_is_in_fp8_where_asked(graphs: Path) -> None:
    """As in a build, by the pass of builds: both runs of the reasoner hand on FP8, and the body takes it."""
    found, schedule = read_graphs(graphs / "tiny-vision"), geometry_schedule(asked(graphs))[1]
    places = ("und.attention.kv=fp8",)
    assignment = resolve_recipe(load_recipe("bf16"), places, load_target("h100"), layers=2, steps=schedule.steps)
    program = quantize_geometry(found.programs[GUIDED], assignment, 9)
    narrow = {torch.float8_e4m3fn}
    assert {spec_of(node).dtype for node in program.graphs["reasoner"].outputs.values()} == narrow
    body = program.graphs[program.loop.body].inputs
    assert {spec_of(body[edge.input]).dtype for edge in program.edges if edge.source == "reasoner"} == narrow
    assert measure_geometry(asked(graphs, places=places), Silent()).recipe == f"bf16 --set {places[0]}"


@pytest.mark.parametrize("damage", ["site", "edge", "rate", "graph", "kind", "loop", "layer"])
def test_documents_that_do_not_fit_together(graphs: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(graphs / "tiny-vision", tmp_path / "graphs")
    path = folder / "programs.json"
    document = json.loads(path.read_text())
    program = document[GUIDED]
    if damage == "site":
        program["sites"]["generator"]["nowhere"] = ["gen", "mlp.down", 0]
    elif damage == "layer":
        next(iter(program["sites"]["generator"].values()))[2] = "0"
    elif damage == "edge":
        program["edges"].pop()
    elif damage == "rate":
        program["rates"]["input_ids"] = "SOMETIMES"
    elif damage == "graph":
        program["graphs"]["more"] = "../../passwords"
    elif damage == "kind":
        document["step-other"] = program
    else:
        program["carried"]["vision_sample"] = "nowhere"
    path.write_text(json.dumps(document))
    with pytest.raises(CosmosExportError, match=r"programs\.json: ") as caught:
        read_graphs(folder)
    assert caught.value.code == "CX671" and "benchmarks/geometry.py" in caught.value.hint


@pytest.mark.parametrize(
    ("recipe", "step", "products", "attentions"),
    [
        ("bf16", 9, {}, 0), ("fp8", 9, {"fp8": 8}, 0), ("fp8", 0, {"fp8-weight": 8}, 0),
        ("fp8-attention", 9, {"fp8": 8}, 2), ("int4", 9, {"int4-weight": 8}, 0),
    ],
)  # fmt: skip
def test_the_products_of_a_geometry_are_those_of_its_recipe(
    graphs: Path, recipe: str, step: int, products: dict[str, int], attentions: int
) -> None:
    """Read from the carried documents: two layers of QKV, output, gate and up, down; no projection of patches."""
    found, workload = read_graphs(graphs / "tiny-vision"), geometry_schedule(asked(graphs))[1]
    assignment = resolve_recipe(load_recipe(recipe), (), load_target("h100"), layers=2, steps=workload.steps)
    program = quantize_geometry(found.programs[PLAIN], assignment, step)
    graph = program.graphs[program.loop.body]
    assert Counter(planned_types(graph).values()) == products
    assert len(graph.calls(ops.JOINT_ATTENTION_FP8)) == attentions
    assert len(graph.calls(aten.linear.default)) > 8  # what no recipe is for


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"runs": 0}, "CX672"), ({"dry_run": False}, "CX672"),
        ({"recipe": "int8"}, "CX350"), ({"recipe": "fp4"}, "CX352"),
        ({"workload": "t9v-480p"}, "CX481"), ({"device": "cuda:63"}, "CX505"), ({"folder": Path("nowhere")}, "CX671"),
        ({"dry_run": False, "runs": 5, "warm_up": 1}, "CX671"),
        ({"places": ("gen.mlp=int9",)}, "CX353"),
        ({"kernels": frozenset({"fast"})}, "CX672"), ({"attention": "magic"}, "CX672"),
        ({"dry_run": False, "runs": 5, "warm_up": 1, "kernels": frozenset({"qkv-pack"})}, "CX505"),
        ({"dry_run": False, "runs": 5, "warm_up": 1, "attention": "triton"}, "CX505"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(graphs: Path, options: dict[str, Any], code: str) -> None:
    with pytest.raises(CosmosExportError) as caught:
        measure_geometry(asked(graphs, **options), Silent())
    assert caught.value.code == code
    with pytest.raises(CosmosExportError, match="no published size"):
        measure_geometry(replace(asked(graphs), size="mega"), Silent())


def test_a_dry_run_interprets_kernels(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(CosmosExportError, match="CX671"):
        measure_geometry(asked(graphs, kernels=frozenset({"qkv-pack"}), folder=Path("nowhere")), Silent())
    assert os.environ["TRITON_INTERPRET"] == "1"


def measurement(seconds: float, **changes: Any) -> Measurement:
    parts = (MeasuredPart("reasoner", (0.1, 0.2, 0.3)), MeasuredPart("step-guided", (seconds,) * 5, 35))
    plain = Measurement("geometry:nano", "nano", "t2v-480p-189f", "bf16", "inductor", "cuda", "NVIDIA H100 80GB HBM3",
                        parts, 35, 70, "", "all")  # fmt: skip
    return replace(plain, **changes)


def test_percentiles_and_sums() -> None:
    found = measurement(1.0)
    assert found.request_s == pytest.approx(35.2) and found.forward_s == pytest.approx(0.5)
    own = MeasuredPart("x", tuple(float(i) for i in range(1, 101)))
    assert (own.percentile_s(0.05), own.median_s, own.percentile_s(0.95)) == (5.0, 50.5, 95.0)
    assert MeasuredPart("x", (3.0,)).percentile_s(0.95) == 3.0
    cells = {(c["engine"], c["recipe"]): c["seconds"] for c in found.document()["published"]}
    assert cells["vllm-omni", "bf16"] == 58.17 and all(c["gpu"] == "h100" for c in found.document()["published"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"components": [3]},
        {"components": [{"name": ["a"], "median_s": 1.0}]},
        {"components": [{"median_s": 1.0}]},
        {"components": [{"name": "a"}]},
        {"components": [{"name": "a", "median_s": "1"}]},
        {"components": [{"name": "a", "median_s": -1.0}]},
        {"components": [{"name": "a", "median_s": 10**400}]},
        {"components": [{"name": "a", "median_s": 1.0}] * 2},
        {"components": {}},
        {"request_s": "1"},
        {"forward_s": [1.0]},
        {"model": {"a": 1}},
        {"covers": [[]]},
        {"schema": True},
        {"schema": 2},
    ],
)
def test_what_is_no_measurement_is_not_compared(wrong: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(measurement(1.0).document() | wrong))
    with pytest.raises(CosmosExportError, match="is no measurement of `bench`") as caught:
        read_measurement(path)
    assert caught.value.code == "CX670"


def test_a_measurement_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path / "gone", "No such")):
        with pytest.raises(CosmosExportError, match=why) as caught:
            read_measurement(path)
        assert caught.value.code == "CX670"


def test_two_measurements_are_compared(tmp_path: Path, app: typer.Typer) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, seconds in zip(paths, (1.0, 1.2), strict=True):
        write(measurement(seconds).document(), path)
    before, after = (read_measurement(path) for path in paths)
    ratios, unlike = compare(before, after)
    by_name = {r.name: r.ratio for r in ratios}
    assert by_name["step-guided"] == pytest.approx(1.2) and by_name["reasoner"] == 1.0 and unlike == []
    assert {r.name for r in regressions(ratios, 0.05)} == {"request", "forward"}
    assert regressions(ratios, 0.25) == []
    assert compare(before, measurement(1.0, recipe="fp8").document())[1] == ["recipe: bf16 and fp8"]
    result = CliRunner().invoke(app, ["bench", "compare", *map(str, paths)])
    assert result.exit_code == 1 and "error[CX673]" in result.stderr
    result = CliRunner().invoke(app, ["bench", "compare", *map(str, reversed(paths)), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["regressions"] == []
    write(measurement(1.0, workload="t2i-720p").document(), paths[0])
    result = CliRunner().invoke(app, ["bench", "compare", *map(str, paths)])
    assert result.exit_code == 2 and "error[CX674]" in result.stderr
    assert "workload is t2i-720p and t2v-480p-189f" in result.stderr
    faster = ["bench", "compare", "--allow-unlike", "--json", *map(str, reversed(paths))]
    console.configure()  # as a process of its own
    result = CliRunner().invoke(app, faster)
    assert result.exit_code == 0 and "workload: t2v-480p-189f and t2i-720p" in json.loads(result.stdout)["unlike"]
    paths[0].write_text("{}")
    with pytest.raises(CosmosExportError, match="no measurement"):
        read_measurement(paths[0])


def test_cards_are_known_by_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200", "NVIDIA GB10": "dgx-spark",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000", "Tesla T4": None,
    }  # fmt: skip
    assert {name: target_of(name) for name in names} == names
    assert [c.seconds for c in published_cells("nano", "t2v-720p-189f", "h100") if c.engine == "nim"] == [173.2]


@pytest.fixture
def app() -> typer.Typer:
    console.configure()
    application = verbs.Verbs()
    application.callback()(lambda: None)
    register_bench(application)
    register_doctor(application)
    return application


def test_the_verb_writes_what_it_shows(graphs: Path, app: typer.Typer, tmp_path: Path) -> None:
    output = tmp_path / "m.json"
    arguments = ["bench", "--geometry", "nano", "--workload", "t2i-720p", "--dry-run", "--runs", "1", "--warm-up", "0"]
    result = CliRunner().invoke(
        app, [*arguments, "--graphs", str(graphs / "tiny-vision"), "-o", str(output), "--json"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown.pop("document"), shown.pop("version")) == ("bench", 1)
    assert shown == json.loads(output.read_text())
    for taken in (output, tmp_path, tmp_path / "none/m.json"):  # before any work: there is no such bundle either
        assert "error[CX675]" in CliRunner().invoke(app, ["bench", "x", "-o", str(taken)]).stderr
    replaced = CliRunner().invoke(app, ["bench", "x", "-o", str(output), "--force"])
    assert "error[" in replaced.stderr and "error[CX675]" not in replaced.stderr
    others = [["bench", "x", "--baselines"], ["bench", "x", "--recipe", "fp8"], ["bench", "x", "--kernels", "qkv-pack"]]
    others += [["bench", "--geometry", "nano", "--profile", "480p"], ["bench", "--geometry", "nano", "--backend", "x"]]
    for wrong in (
        ["bench"], ["bench", "x", "y"], ["bench", "x", "--geometry", "nano"], ["bench", "compare", "x"], *others,
    ):  # fmt: skip
        assert "error[CX672]" in CliRunner().invoke(app, wrong).stderr, wrong


def test_what_fails_a_run_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong result of this project, a kernel of it that does not run; no library, and no tile that does not fit."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", ROOT / "benchmarks/kernels.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    is_wrong = benchmark.is_wrong
    wrong = [{"candidate": name, "right": False} for name in ("triton", "triton-fast", "triton 128×128 w8 s2", "sdpa")]
    assert [is_wrong(row) for row in wrong] == [True, True, True, False]
    failed = [{"candidate": name, "failed": "shared memory"} for name in ("triton", "triton 128×128 w8 s2", "cudnn")]
    assert [is_wrong(row) for row in failed] == [True, False, False] and not is_wrong({"right": True})


def test_the_whole_gpu_run_in_a_dry_run(graphs: Path, tmp_path: Path) -> None:
    script = ROOT / "benchmarks/gpu_all.py"
    (graphs / "tiny-action").exists() or (graphs / "tiny-action").symlink_to(graphs / "tiny-vision")
    command = [sys.executable, str(script), "--graphs", str(graphs), "--dry-run", "-o", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "gpu-all-dry-run.json").read_text())
    assert summary["dry_run"] and all(stage["wrong"] == 0 for stage in summary["stages"].values())
    rows = json.loads((tmp_path / "kernels-dry-run.json").read_text())["shapes"]["tiny"]
    assert {row["kernel"].split()[0] for row in rows} >= {
        "joint_attention", "joint_attention_fp8", "qkv_pack", "qkv_pack_fp8", "norm_quantize_row", "sampler_step",
        "activation_quantize_gated_static", "gemm_w8a8", "gemm_w4a16",
    }  # fmt: skip
    assert all(row.get("right", True) for row in rows)
    checks = json.loads((tmp_path / "graphs-dry-run.json").read_text())["checks"]
    assert [check["right"] for check in checks] == [True, True]
    numerics = json.loads((tmp_path / "numerics-dry-run.json").read_text())["checks"]
    assert [check["recipe"] for check in numerics] == ["bf16", "fp8-w8a16", "fp8"]
    fusions = json.loads((tmp_path / "fusions-dry-run.json").read_text())["fusions"]
    names = [row["kernels"] for row in fusions]
    in_fp8 = [[], ["norm-quantize"], ["activation-quantize"], [], ["qkv-pack"], ["sampler-step"], []]
    assert names == [*in_fp8, [], ["w4a16"], [], []]
    beside = json.loads((tmp_path / "bench-t2v-480p-189f-bf16-dry-run.json").read_text())["baselines"]
    assert [row["name"].split(",")[0] for row in beside] == ["diffusers"] * 2


# -- what the GPU does meanwhile --------------------------------------------------------------------------------------


def test_clocks_and_power_are_watched() -> None:
    seen = iter(
        [
            CardSample(1980.0, None, 300.0, 40.0),
            CardSample(1500.0, None, 650.0, 60.0),
            CardSample(1700.0, None, 700.0, 70.0),
        ]
    )
    with CardWatch(0, read=lambda: next(seen, None), period_s=0.001) as watch:
        deadline = time.monotonic() + 20
        while len(watch._samples) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
    found = watch.summary()
    assert found is not None and found["samples"] == 3
    assert found["sm_clock_mhz"] == {"median": 1700.0, "min": 1500.0, "max": 1980.0}
    assert found["power_w"] == {"median": 650.0, "min": 300.0, "max": 700.0} and found["memory_clock_mhz"] is None


def test_without_a_gpu_nothing_is_watched() -> None:
    with CardWatch(None) as watch:
        pass
    assert watch.summary() is None
    with CardWatch(0, period_s=0.001) as watch:  # no driver: the tool finds no card
        time.sleep(0.01)
    assert watch.summary() is None or watch.source in ("NVML", "nvidia-smi")


# -- doctor -----------------------------------------------------------------------------------------------------------

H100 = Gpu(
    0, "NVIDIA H100 80GB HBM3", "9.0", 80 << 30, 79 << 30, "580.1", 1980.0, 1980.0, 2619.0, 70.0, 700.0, 33.0, False
)
EVERYTHING = dict.fromkeys(
    ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "safetensors", "tensorrt-cu13", "tensorrt-rtx-cu13"),
    "1",
) | pins("compile")
GOOD = Facts("3.12", "Linux x86_64", (H100,), EVERYTHING, 64 << 30, 400 << 30, {}, "/usr/bin/g++")


def found(facts: Facts, target: str | None = None) -> dict[str, list[tuple[CheckState, str]]]:
    result: dict[str, list[tuple[CheckState, str]]] = {}
    for one in examine(facts, load_target(target) if target else None):
        result.setdefault(one.check, []).append((one.state, f"{one.found} {one.hint}"))
    return result


def test_a_good_machine_has_no_blocker() -> None:
    assert not any(state is CheckState.BLOCKER for rows in found(GOOD).values() for state, _ in rows)
    assert {"target h100", "target h200"} <= set(found(GOOD)) and "target b200" not in found(GOOD)
    assert any("known trap" in text for _, text in found(GOOD)["target h100"])


@pytest.mark.parametrize(
    ("facts", "target", "check", "state", "said"),
    [
        (replace(GOOD, system="Windows AMD64"), None, "system", CheckState.BLOCKER, "Linux"),
        (replace(GOOD, gpus=(replace(H100, driver="550.54"),)), None, "driver", CheckState.BLOCKER, "580"),
        (replace(GOOD, versions={**EVERYTHING, "torch": "2.13.0+cpu"}), None, "cuda", CheckState.NOTE, "CPUs alone"),
        (replace(GOOD, versions={**EVERYTHING, "torch": "2.13.0+cpu"}), "h100", "cuda", CheckState.BLOCKER, "index-"),
        (replace(GOOD, versions={**EVERYTHING, "nvidia-cuda-runtime": "13.0"}), None, "cuda", CheckState.OK, "13.0"),
        (replace(GOOD, memory_bytes=2 << 30), None, "memory", CheckState.NOTE, "10 GiB"),
        (replace(GOOD, disk_bytes=2 << 30), None, "disk", CheckState.NOTE, "41 GiB"),
        (replace(GOOD, gpus=()), None, "gpu", CheckState.NOTE, "none"),
        (replace(GOOD, gpus=(replace(H100, mig=True),)), None, "gpu", CheckState.NOTE, "MIG"),
        (replace(GOOD, gpus=(replace(H100, free_bytes=9 << 30),)), None, "target h100", CheckState.NOTE, "9 of 80 GiB"),
        (replace(GOOD, versions={}), "rtx-pro-6000", "target rtx-pro-6000", CheckState.BLOCKER, ".[rtx]"),
        (replace(GOOD, versions={}), "h100", "target h100", CheckState.BLOCKER, ".[compile]"),
        (replace(GOOD, gpus=(), versions={}), "b200", "target b200", CheckState.NOTE, ".[tensorrt]"),
        (replace(GOOD, versions={}), None, "compiler", CheckState.NOTE, "diffusers"),
        (replace(GOOD, versions={**EVERYTHING, "torch": "2.9.0"}), None, "compiler", CheckState.NOTE, "2.9.0 (2"),
        (replace(GOOD, environment={"CUDA_VISIBLE_DEVICES": ""}), None, "environment", CheckState.NOTE, "unset it"),
        (replace(GOOD, environment={"TRITON_INTERPRET": "1"}), None, "environment", CheckState.NOTE, "interpreted"),
        (replace(GOOD, compiler=None), None, "environment", CheckState.NOTE, "g++"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(facts: Facts, target: str | None, check: str, state: CheckState, said: str) -> None:
    rows = found(facts, target)[check]
    assert any(s is state and said in text for s, text in rows), rows


def test_the_doctor_ends_as_its_findings_say(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    import cosmos_export.doctor as doctor

    monkeypatch.setattr(doctor, "facts", lambda folder: GOOD)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["blockers"] == 0
    monkeypatch.setattr(doctor, "facts", lambda folder: replace(GOOD, versions={}))
    result = CliRunner().invoke(app, ["doctor", "--target", "cpu"], env={"COLUMNS": "200"})
    assert result.exit_code == 1 and "✗ target cpu: onnxruntime: onnxruntime not installed" in result.output
    result = CliRunner().invoke(app, ["doctor", "--folder", "/nowhere"])
    assert result.exit_code == 2 and "error[CX810]" in result.stderr
