"""The numbers of a plan against others' arithmetic, and against what the compiler itself makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.codecs import CODECS, codec_tensors
from cosmos_export.checkpoint.published import NANO, SUPER
from cosmos_export.compiler.memory import parse_size
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.plan import PlanRequest, estimate, from_checkpoint, parse_workload, precision, published_subject
from cosmos_export.plan.latency import Habits, latency
from cosmos_export.plan.precision import linear_parameters
from cosmos_export.plan.sizes import builder_bytes, cache_bytes
from cosmos_export.plan.work import codec_work, generator_pass, layer_linear, reasoner_pass
from cosmos_export.precision.recipe import load_recipe
from cosmos_export.sampling import Overrides, resolve_schedule
from cosmos_export.targets import load_target, target_names
from cosmos_export.targets.backends import backend_of

T2V_720P = parse_workload("t2v-720p-189f", (512, 512))


def plan(
    like: str, target: str = "rtx-pro-6000", workload: str = "t2v-480p-189f", recipe: str = "bf16", **options: object
):  # type: ignore[no-untyped-def]
    targets = tuple(load_target(name) for name in target.split(","))
    options["recipe"] = load_recipe(recipe)
    return estimate(published_subject(like), PlanRequest(targets, (parse_workload(workload),), **options))  # type: ignore[arg-type]


# -- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("like", "linear", "attention"), [("nano", 613e12, 1164e12), ("super", 2756e12, 4137e12)])
def test_a_pass_at_720p(like: str, linear: float, attention: float) -> None:
    """Published arithmetic of 189 frames at 720p with 512 prompt tokens."""
    assert T2V_720P.rows == 44_160
    work = generator_pass(published_subject(like).geometry, T2V_720P.rows, 512)
    assert work.linear == pytest.approx(linear, rel=2e-3)
    assert work.attention == pytest.approx(attention, rel=2e-3)


def test_a_pass_of_the_edge() -> None:
    work = generator_pass(published_subject("edge").geometry, 18_720, 512)
    assert (work.linear, work.attention) == (pytest.approx(52.8e12, rel=2e-3), pytest.approx(82.6e12, rel=2e-3))


def test_work_of_a_layer_is_twice_its_parameters() -> None:
    assert layer_linear(NANO) == 385_875_968
    for geometry in (NANO, SUPER, published_subject("edge").geometry):
        assert layer_linear(geometry) == 2 * sum(linear_parameters(geometry).values())


def test_the_reasoner_s_last_layer_is_keys_and_values() -> None:
    one, two = (reasoner_pass(replace(NANO, num_hidden_layers=n), 100) for n in (1, 2))
    assert one.attention == 0
    assert one.linear == 100 * 2 * 2 * 4096 * 1024
    assert two.linear - one.linear == 100 * layer_linear(NANO)


def test_the_codecs_at_every_size() -> None:
    subject = published_subject("nano")
    for workload, decode in (("t2v-256p-189f", 214e12), ("t2v-480p-189f", 1391e12), ("t2v-720p-121f", 2057e12)):
        assert codec_work(subject, "vae-decoder", parse_workload(workload)) == pytest.approx(decode, rel=5e-3)
    assert codec_work(subject, "sound-decoder", parse_workload("t2v-720p-189f+sound")) == pytest.approx(5.6e12)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("like", "each"), [("nano", 147_456), ("super", 262_144), ("edge", 114_688)])
def test_keys_and_values(like: str, each: int) -> None:
    subject = published_subject(like)
    assert cache_bytes(subject, T2V_720P, guided=False) == 512 * each
    assert cache_bytes(subject, T2V_720P, guided=True) == 1024 * each


@pytest.mark.parametrize(
    ("like", "bf16", "fp8", "nvfp4"), [("nano", 13.90, 6.95, 3.91), ("super", 62.42, 31.21, 17.55)]
)
def test_weights_of_the_generator(like: str, bf16: float, fp8: float, nvfp4: float) -> None:
    """Against the published sizes, in GB; those of NVFP4 are of the tower's linears."""

    def weights(**options: object) -> float:
        (part,) = [p for p in plan(like, **options).components if p.name == "generator"]
        return part.weight_bytes / 1e9

    assert weights() == pytest.approx(bf16, rel=2e-3)
    assert weights(recipe="fp8") == pytest.approx(fp8, rel=2e-3)
    assert weights(recipe="bf16", settings=("gen=nvfp4",)) == pytest.approx(nvfp4, rel=2e-3)


def test_a_loop_on_the_device_computes_both_branches() -> None:
    host, device = (
        {p.name: p.activation_bytes for p in plan("nano", loop=loop).components} for loop in ("host", "device")
    )
    assert 2 * host["generator"] < device["generator"] < 2.4 * host["generator"]
    assert device["reasoner"] == host["reasoner"]


def test_engines_of_a_loop_that_changes_its_precision_have_their_own_weights() -> None:
    """Seven: the run of steps with 8-bit activations, and each of the six with 16-bit ones. A host's loop has two."""
    disk = {r: plan("nano", loop="device", recipe=r).builds["rtx-pro-6000"].disk_bytes for r in ("bf16", "fp8")}
    host = plan("nano", loop="host", recipe="fp8").builds["rtx-pro-6000"].disk_bytes
    assert disk["fp8"] - host == pytest.approx(5 * 6.96e9, rel=0.01)
    assert disk["bf16"] == plan("nano").builds["rtx-pro-6000"].disk_bytes


@pytest.mark.parametrize("target", [name for name in target_names() if backend_of(load_target(name)).engines is None])
def test_a_bundle_of_a_backend_without_engines_has_none(target: str) -> None:
    builds = plan("nano", target=f"rtx-pro-6000,{target}").builds
    assert builds[target].disk_bytes < 0.6 * builds["rtx-pro-6000"].disk_bytes
    assert builds[target].peak_anonymous_bytes < 2 << 30
    assert builds[target].largest == ""


def test_the_memory_of_a_target_is_its_own_whatever_others_are_planned() -> None:
    """Seven engines have the generator's weights in TensorRT-RTX; with inductor all graphs read one copy."""
    options = {"loop": "device", "recipe": "fp8"}
    alone, rtx = (plan("nano", target=target, **options).fits[0] for target in ("h200", "rtx-pro-6000"))
    both = {fit.target: fit for fit in plan("nano", target="rtx-pro-6000,h200", **options).fits}
    assert both == {"h200": alone, "rtx-pro-6000": rtx}
    assert rtx.resident_bytes - alone.resident_bytes == pytest.approx(6 * 6.96e9, rel=0.01)


def test_a_checkpoint_and_its_published_size_plan_the_same(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from cosmos_export.checkpoint.demo import write_demo_checkpoint

    checkpoint = open_checkpoint(write_demo_checkpoint(tmp_path / "nano", like="nano", sparse=True))
    found, published = from_checkpoint(checkpoint), published_subject("nano")
    assert found.codecs == published.codecs
    assert found.input_bytes == published.input_bytes
    assert {k: v for k, v in found.weight_norm.items() if v} == published.weight_norm
    assert found.geometry == published.geometry
    request = PlanRequest((load_target("rtx-pro-6000"),), (parse_workload("t2v-480p-189f"),))
    assert estimate(found, request).components == estimate(published, request).components
    for name in CODECS:
        assert sum(e.elements for e in codec_tensors(checkpoint, name).values()) == published.codecs[name]


BUILDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "builds.json"


ROWS = json.loads(BUILDS.read_text())["rows"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['layers']}-{row['recipe']}")
def test_sizes_and_memory_are_those_of_the_builds_that_were_measured(row: dict[str, Any]) -> None:
    """Engines within 3 %, memory of large builders and of the build within 15 %, activations in bf16 within 10 %, and
    the time between the fast and the slow one."""
    geometry = published_subject(row["model"]).geometry
    subject = replace(published_subject(row["model"]), geometry=replace(geometry, num_hidden_layers=row["layers"]))
    if not row["components"]:
        subject = replace(subject, codecs={})
    chains = row.get("chains", {})
    budget = row["memory_budget"] if chains else None
    request = PlanRequest(
        (load_target(row["target"]),), (parse_workload(row["workload"]),), recipe=load_recipe(row["recipe"]),
        memory_budget=None if budget is None else parse_size(budget),
    )  # fmt: skip
    found = estimate(subject, request)
    built = {engine["graph"]: engine for engine in row["engines"]}
    parts = {part.name: part for part in found.components}
    assert {"reasoner", "conditioning", "generator"} <= built.keys() | chains.keys()
    for name, part in parts.items():
        bodies = [body for body in (name, f"{name}_2") if body in built or body in chains]
        forms = [[built[piece] for piece in chains.get(body, (body,))] for body in bodies]
        if not forms:
            continue
        assert [len(form) for form in part.forms] == [len(form) for form in forms], name
        for planned, made in zip(part.forms, forms, strict=True):
            assert planned == pytest.approx([piece["size_bytes"] for piece in made], rel=0.03), name
        memory = max(piece.get("peak_anonymous_bytes") or 0 for form in forms for piece in form)
        if memory > 2e9:
            assert builder_bytes(part) == pytest.approx(memory, rel=0.15), name
        if not part.cut and part.activation_bytes and part.scheme == "bf16":
            assert part.activation_bytes == pytest.approx(forms[0][0]["activation_bytes"], rel=0.10), name
    host = found.builds[row["target"]]
    assert host.seconds[0] < row["seconds"] < host.seconds[1]
    whole = parts.keys() <= built.keys() | chains.keys()
    if row["peak_anonymous_bytes"]:
        # A build without a budget finds one in what is free; its own plan knew it.
        peak = host.peak_anonymous_bytes if budget else row["planned"]["peak anonymous memory"]["planned"]
        assert peak == pytest.approx(row["peak_anonymous_bytes"], rel=0.15)
    if whole and row["bundle_bytes"]:
        assert host.disk_bytes == pytest.approx(row["bundle_bytes"], rel=0.03)


# -- what fits --------------------------------------------------------------------------------------------------------


def test_super_fits_one_card_in_phases() -> None:
    (fit,) = plan("super").fits
    assert fit.verdict == "fits in phases"
    assert fit.phased_bytes < 96e9 < fit.resident_bytes
    assert any("drop the reasoner" in line for line in fit.advice)
    # In FP8 there are two engines with the generator's weights, one for the steps with 16-bit activations.
    assert [line.split(":")[0] for line in fit.advice[1:]] == ["--recipe memory"]
    (fp8,) = plan("super", recipe="fp8").fits
    assert fp8.verdict == "fits in phases"
    weights = {part.name: part.engine_bytes for part in plan("super", recipe="fp8").components}
    assert fp8.resident_bytes > 2 * weights["generator"] + weights["reasoner"]
    assert weights["generator"] < fp8.phased_bytes < 1.2 * weights["generator"]
    (on_h200,) = plan("super", target="h200", recipe="fp8").fits
    assert on_h200.resident_bytes < fp8.resident_bytes - 0.99 * weights["generator"]


def test_what_does_not_fit_says_what_would() -> None:
    found = plan("super", target="l40s", workload="t2v-720p-189f")
    (fit,) = found.fits
    assert (fit.verdict, found.something_fits) == ("does not fit", False)
    assert any(line.startswith("--recipe fp8") for line in fit.advice)
    found = plan("nano", target="l40s", workload="t2v-720p-189f")
    assert found.something_fits


def test_fewer_frames_are_advised_where_they_help() -> None:
    target = replace(load_target("l40s"), memory_bytes=17_000_000_000)
    request = PlanRequest((target,), (parse_workload("t2v-720p-189f"),))
    (fit,) = estimate(published_subject("nano"), request).fits
    (line,) = [line for line in fit.advice if "frames" in line]
    frames = int(line.split()[2])
    shorter = PlanRequest((target,), (parse_workload(f"t2v-720p-{frames}f"),))
    (fit,) = estimate(published_subject("nano"), shorter).fits
    assert fit.verdict == "fits in phases"
    longer = PlanRequest((target,), (parse_workload(f"t2v-720p-{frames + 4}f"),))
    (fit,) = estimate(published_subject("nano"), longer).fits
    assert fit.verdict == "does not fit"


def test_a_target_without_the_kernels_is_left_out_and_says_why() -> None:
    found = plan("nano", target="rtx-pro-6000,h100", recipe="fp4")
    assert [(fit.target, fit.verdict) for fit in found.fits] == [("rtx-pro-6000", "fits"), ("h100", "not run")]
    assert "no FP4 tensor cores" in found.fits[1].advice[0]
    with pytest.raises(UnsupportedError, match="CX352"):
        plan("nano", target="h100", recipe="fp4")


# -- time -------------------------------------------------------------------------------------------------------------


def test_time_follows_what_is_done() -> None:
    subject, target = published_subject("nano"), load_target("h100")
    workload = parse_workload("t2v-720p-189f")

    def seconds(recipe: str = "bf16", habits: Habits | None = None, **asked: object) -> float:
        schedule = resolve_schedule(subject.sampling, "t2v", Overrides(**asked))  # type: ignore[arg-type]
        chosen = precision(load_recipe(recipe), (), target, subject.geometry, schedule.steps)
        found = latency(subject, workload, schedule, chosen, target, habits)
        assert found is not None
        return found.total_s - found.codec_s

    whole = seconds()
    assert seconds(guidance=1.0) == pytest.approx(whole / 2, rel=0.01)
    assert seconds(steps=70) == pytest.approx(2 * whole, rel=0.01)
    assert seconds("fp8") < 0.9 * whole
    assert seconds(habits=Habits(reasoner_every_pass=True)) > whole
    assert seconds(habits=Habits(computed_steps=0.5)) == pytest.approx(whole / 2, rel=0.01)
    assert seconds("fp8", Habits(emulates_fp8=True)) == pytest.approx(whole, rel=1e-6)


def test_no_time_without_a_rate() -> None:
    (fit,) = plan("edge", target="dgx-spark").fits
    assert (fit.latency, fit.no_latency) == (None, "no published rate for bf16")


# -- workloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mode", "rows"),
    [
        ("t2v-480p-189f", "t2v", 18_720), ("t2i-720p", "t2i", 920), ("i2v-256p-121f", "i2v", 1_860),
        ("policy-droid", "policy", 9 * 340 + 33), ("t2v-720p-189f+sound", "t2v", 44_160 + 197),
        ("inverse-dynamics-480p-61f,action_len=60", "inverse-dynamics", 6_300),
        ("t2v-frames=24,height=30,width=52", "t2v", 9_360),
        # A robot's own chunk, 16, and rate; 640 × 480 pixels stay on a canvas of 4:3.
        ("policy-umi-640x480", "policy", 5 * 15 * 20 + 16), ("policy-umi-640x480,und_len=1:200:400", "policy", 1516),
    ],
)  # fmt: skip
def test_workloads(text: str, mode: str, rows: int) -> None:
    workload = parse_workload(text)
    assert (workload.mode, workload.rows) == (mode, rows)


@pytest.mark.parametrize(
    ("text", "code"),
    [("t2x-480p", "CX481"), ("t2v", "CX481"), ("t2v-481p", "CX410"), ("policy-umi", "CX410"), ("", "CX481")],
)
def test_what_is_no_workload(text: str, code: str) -> None:
    with pytest.raises(UserError, match=code):
        parse_workload(text)


def test_a_published_policy() -> None:
    """The size's numbers with the policy's schedule: 4 steps, on Edge guided in the first alone."""
    for like, size, passes in (("nano-policy-droid", "nano", 8), ("edge-policy-droid", "edge", 5)):
        subject, plain = published_subject(like), published_subject(size)
        assert replace(subject, name=plain.name, variant=size, sampling=plain.sampling) == plain
        schedule = resolve_schedule(subject.sampling, "policy")
        assert (schedule.steps, schedule.steps + sum(schedule.guided)) == (4, passes)
    with pytest.raises(UserError, match="nano-policy-droid"):
        published_subject("nano-policy-umi")


def test_prompts_must_fit_the_profile() -> None:
    with pytest.raises(UserError, match="CX481"):
        parse_workload("t2v-480p", (5000, 10))
    with pytest.raises(UserError, match="CX481"):
        parse_workload("t2v-480p", (0, 10))


def test_shapes_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match="no sound is generated"):
        plan("edge", workload="t2v-480p-121f+sound")


def test_keys_and_values_in_fp8_take_half() -> None:
    whole, half = (plan("nano", settings=settings) for settings in ((), ("und.attention.kv=fp8",)))
    assert 2 * half.loads[0].device.cache_bytes == whole.loads[0].device.cache_bytes > 0
