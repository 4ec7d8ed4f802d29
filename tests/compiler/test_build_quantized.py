"""Builds from FP8 checkpoints: their bytes, scales and step policy, whatever a published file has besides."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import build_harness as harness
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cosmos_export.compiler.options as build_options
import cosmos_export.compiler.published as published
from cosmos_export.bundle import BundleFiles, read_bundle
from cosmos_export.calibration.table import ScaleTable, read_scale_table, write_scale_table
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.strict_json import read_object
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.precision import activation_ranges
from cosmos_export.compiler.quantize_checkpoint import quantize_checkpoint
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.parity import Parity
from cosmos_export.ir import packing
from cosmos_export.ir.serialize import read_graph
from cosmos_export.options import QuantizeRequest
from cosmos_export.plan import published_subject
from cosmos_export.runtime import Generator, LoadedBundle, load_bundle
from cosmos_export.runtime.request import Request
from cosmos_export.sampling import Schedule
from cosmos_export.targets.inductor.sessions import TorchExecutor
from cosmos_export.targets.inductor.specialise import CompileSettings

pytestmark = pytest.mark.xdist_group("quantized")
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYERS = 3


@pytest.fixture(autouse=True)
def _quick(captured_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "Parity", partial(Parity, cases=CASES[1:2]))


@pytest.fixture(scope="session")
def table(shared: Path, edge: Path) -> Path:
    """A range for every linear of the checkpoint, also those that generation does not read."""
    seen = read_scale_table(harness.scale_table(edge, shared / "edge-scales"))

    def make() -> None:
        expected = open_checkpoint(edge).expected
        whole = {f"{n.removesuffix('.weight')}.input_amax": 20.0 for n, t in expected.items() if t.linear}
        write_scale_table(ScaleTable(whole | seen.amax, {}, seen.checkpoint, {"sources": []}), path)

    path = shared / "edge-all-scales"
    return harness.once(path, make)


@pytest.fixture(scope="session")
def fp8(shared: Path, edge: Path, table: Path) -> Path:
    path = shared / "edge-fp8"

    def make() -> None:
        quantize_checkpoint(QuantizeRequest(edge, table, path))

    return harness.once(path, make)


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint whose tensors and ``quantization_config`` were changed."""
    harness.copy_checkpoint(source, target)
    folder = target / "transformer"
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    return target


def stated(checkpoint: Path, **options: Any) -> Mapping[str, str]:
    """Place → scheme, as a build of 8 steps would do it."""
    request = harness.transformer_only(checkpoint, Path("x"), target="cpu", **{"steps": 8, **options})
    return resolve(request).precision.table()


def weight_files(bundle: Path) -> dict[str, str]:
    return {f.path: f.sha256 for f in read_bundle(bundle).files if f.path.endswith(".weights")}


def test_every_body_of_a_host_loop_is_requested_of_tensorrt(tmp_path: Path, fp8: Path) -> None:
    build(harness.transformer_only(fp8, tmp_path / "x", target="b200", quality="report", steps=8))
    requests = json.loads((tmp_path / "x/engines/requests.json").read_text())["engines"]
    loop = read_bundle(tmp_path / "x").loop
    assert loop is not None and set(loop.bodies) == {"generator", "generator_2"}
    assert {request["graph"] for request in requests} >= {"reasoner", "generator", "generator_2"}


def test_gates_see_the_outputs_that_there_are(tmp_path: Path, fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "Parity", partial(Parity, cases=CASES[-1:]))
    build(harness.transformer_only(
        fp8, tmp_path / "x", target="cpu", quality="report", steps=8, outputs=("action_velocity",),
        profiles=("256p,frames=1:2:3,action_len=4:8:16",), modalities=None,
    ))  # fmt: skip
    seen = json.loads((tmp_path / "x/report/quantization.json").read_text())["measured_on"]
    assert any(seen.endswith(case.name) for case in CASES if "action_velocity" in case.outputs)


def test_engines_compute_in_fp8_on_the_bytes_of_the_checkpoint(tmp_path: Path, fp8: Path) -> None:
    request = harness.transformer_only(fp8, tmp_path / "x", target="rtx-pro-6000", quality="report", steps=8)
    result = build(request)
    types = {e.graph: dict(e.graphs[0].gemm_types()) for e in result.engines if e.graphs[0].gemms}
    assert types == {
        "reasoner": {"fp8-weight": 9},
        "generator": {"bf16": 2, "fp8-weight": 12},
        "generator_2": {"bf16": 2, "fp8": 12},
    }
    assert all(engine.check.passed for engine in result.engines)
    # The oracle: diffusers' model with what the bytes and scales stand for.
    assert {m.stage for m in result.parity} >= {"capture", "merge_linears", "bfloat16"}
    assert all(m.passed for m in result.parity)
    manifest = read_bundle(tmp_path / "x")
    assert manifest.recipe == "checkpoint" and manifest.precision is not None
    assert manifest.precision.rounding == "as stored" and manifest.precision.calibration is None
    assert manifest.loop is not None
    assert manifest.loop.bodies == ("generator",) * 3 + ("generator_2",) * 2 + ("generator",) * 3
    stored = load_file(fp8 / "transformer" / WEIGHTS)
    written = (tmp_path / "x/onnx/generator.weights").read_bytes()
    for layer in range(LAYERS):
        names = [f"layers.{layer}.self_attn.add_{one}_proj" for one in "qkv"]
        data = b"".join(stored[f"{name}.weight"].view(torch.uint8).numpy().tobytes() for name in names)
        assert data in written
        scales = [np.full(len(stored[f"{n}.weight"]), stored[f"{n}.weight_scale"].item(), np.float32) for n in names]
        assert np.concatenate(scales).tobytes() in written
        down = stored[f"layers.{layer}.mlp_moe_gen.down_proj.weight"]
        assert down.view(torch.uint8).numpy().tobytes() in written


def test_input_scales_are_those_of_the_checkpoint(fp8: Path) -> None:
    job = resolve(harness.transformer_only(fp8, Path("x"), target="cpu"))
    found = activation_ranges(job.checkpoint, job.scales).amax
    stored = load_file(fp8 / "transformer" / WEIGHTS)
    scales = {name: value for name, value in stored.items() if name.endswith(".input_scale")}
    assert len(scales) == len(found)
    for name, scale in scales.items():
        amax = torch.tensor(found[name.replace("input_scale", "input_amax")], dtype=torch.float64)
        assert packing.fp8_scale(amax) == scale.reshape(())


def test_the_policy_is_followed(tmp_path: Path, fp8: Path) -> None:
    every = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    wide, narrow = "fp8-w8a16", "fp8"
    steps = {"@0:3": wide, "@3:5": narrow, "@5:8": wide}
    found = stated(fp8)
    assert found == {f"und.{k}": wide for k in every} | {f"gen.{k}{s}": how for k in every for s, how in steps.items()}

    def policy(**changed: Any) -> Path:
        def edit(_: Any, config: dict[str, Any]) -> None:
            config["runtime"]["diffusion_step_policy"] |= changed

        return edited(fp8, tmp_path / str(len(list(tmp_path.iterdir()))), edit)

    native = stated(policy(reasoner="native", first_steps={"count": 0, "mode": "a16"}))
    assert {native[f"und.{k}"] for k in every} == {narrow}
    assert (native["gen.mlp.down@0:5"], native["gen.mlp.down@5:8"]) == (narrow, wide)
    # Four steps: the second and the third count as first and as last.
    assert stated(fp8, steps=4)["gen.mlp.down"] == wide
    overlapping = stated(policy(overlap="native"), steps=4)
    assert [overlapping[f"gen.mlp.down@{s}"] for s in ("0:1", "1:3", "3:4")] == [wide, narrow, wide]

    def no_policy(_: Any, config: dict[str, Any]) -> None:
        del config["runtime"]

    plain = stated(edited(fp8, tmp_path / "none", no_policy))
    assert plain == {f"{tower}.{k}": narrow for tower in ("und", "gen") for k in every}


def test_what_a_checkpoint_left_unquantized_stays_so(tmp_path: Path, edge: Path, fp8: Path) -> None:
    original = load_file(edge / "transformer" / WEIGHTS)

    def keep_some(tensors: dict[str, torch.Tensor], _: Any) -> None:
        for module in ("layers.1.mlp_moe_gen.down_proj", "layers.2.self_attn.to_k"):
            tensors[f"{module}.weight"] = original[f"{module}.weight"]

    found = stated(edited(fp8, tmp_path / "x", keep_some))
    assert found["gen.mlp.down[0:1]@3:5"] == found["gen.mlp.down[2:3]@3:5"] == "fp8"
    assert not any(place.startswith("gen.mlp.down[1") for place in found)
    # Query and value of that layer are merged with the key, and widened.
    assert found["und.attention.qkv[0:2]"] == "fp8-w8a16" and "und.attention.qkv" not in found


def test_a_published_file_is_read_as_it_is(tmp_path: Path, fp8: Path) -> None:
    """Leftovers of calibration, names of the training framework, scales in another shard."""

    def as_published(tensors: dict[str, torch.Tensor], _: Any) -> None:
        for name in [n for n in tensors if n.endswith(".input_scale")]:
            module = name.removesuffix(".input_scale")
            tensors[f"{module}.input_quantizer._amax"] = tensors[name] * 448
            tensors[f"{module}.weight_quantizer._scale"] = tensors[f"{module}.weight_scale"].clone()
        for old, new in (("proj_in.weight", "vae2llm.weight"), ("norm.weight", "model.norm.weight")):
            tensors[new] = tensors.pop(old)

    root = edited(fp8, tmp_path / "published", as_published)
    folder = root / "transformer"
    tensors = load_file(folder / WEIGHTS)
    shards: dict[str, dict[str, torch.Tensor]] = {"1": {}, "2": {}}
    for name, tensor in tensors.items():
        shards["2" if name.endswith("_scale") else "1"][name] = tensor
    stem = WEIGHTS.removesuffix(".safetensors")
    names = {key: f"{stem}-0000{key}-of-00002.safetensors" for key in shards}
    for key, part in shards.items():
        save_file(part, folder / names[key])
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {n: names[key] for key, part in shards.items() for n in part}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    options = {"parity": "never", "quality": "report", "steps": 1}
    for source, name in ((fp8, "a"), (root, "b")):
        build(harness.transformer_only(source, tmp_path / name, target="cpu", **options))
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")


def test_other_recipes(tmp_path: Path, fp8: Path) -> None:
    """Unquantized, and in fewer bits: from what the bytes stand for."""
    options = {"parity": "never", "quality": "report", "steps": 1, "target": "cpu"}
    plain = build(harness.transformer_only(fp8, tmp_path / "plain", recipe="bf16", **options))
    assert plain.losses is None and plain.manifest is not None and plain.manifest.precision is None
    stored = load_file(fp8 / "transformer" / WEIGHTS)
    name = "layers.0.mlp_moe_gen.down_proj"
    value = (stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"]).bfloat16()
    assert value.view(torch.uint8).numpy().tobytes() in (tmp_path / "plain/onnx/generator.weights").read_bytes()
    memory = build(harness.transformer_only(fp8, tmp_path / "memory", recipe="memory", **options))
    assert memory.losses is not None and {loss.scheme for loss in memory.losses.linears} == {"int4", "fp8"}
    assert not memory.losses.failed_linears


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"calibration": "scales"}, "CX356", "its scales are in it"),
        ({"recipe": "fp8-attention"}, "CX356", "ranges no checkpoint has"),
        ({"overrides": ("gen.mlp@:3=int4",)}, "CX354", "stored twice"),
    ],
)
def test_requests_that_are_refused(fp8: Path, table: Path, options: dict[str, Any], code: str, words: str) -> None:
    if "calibration" in options:
        options = {"calibration": table}
    with pytest.raises(CosmosExportError) as caught:
        resolve(harness.transformer_only(fp8, Path("x"), **{"target": "cpu", "steps": 8, **options}))
    assert caught.value.code == code and words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("recipe", [None, "memory"])
def test_through_pytorch(tmp_path: Path, fp8: Path, recipe: str | None) -> None:
    """The graphs of a bundle for Hopper: FP8 products of stored bytes with a scale a row, INT4, all segments of the
    loop; against the same recipe in ONNX Runtime, which computes in fp32 what PyTorch does in bf16."""
    profile = "und_len=1:16:32,frames=1:2:2,height=3:4:4,width=3:4:4,action_len=0"
    options = {"parity": "never", "quality": "report", "steps": 8, "loop": "device", "modalities": ("vision",)}
    request = harness.transformer_only(
        fp8, tmp_path / "x", target="h100", recipe=recipe, profiles=(profile,), **options
    )
    build(request)
    manifest = read_bundle(tmp_path / "x")
    assert manifest.target.backend == "inductor" and manifest.loop is not None and len(manifest.loop.segments) == 3
    scales = {
        len(node.meta["weight"].sources[0].shape)
        for node in read_graph(
            read_object(tmp_path / "x/graphs/denoise_2.json")["graph"], tmp_path / "x/onnx"
        ).weights.values()
        if node.name.endswith("_scale")
    }
    assert 1 in scales or recipe == "memory"  # a scale for each row of merged weights
    values = {name: manifest.options[f"schedule.{name}"] for name in Schedule.__dataclass_fields__}
    tokens = np.arange(12, dtype=np.int64)
    asked = Request("t2v", tokens, tokens[:5], Schedule(**values), 5, 4, 4, 24.0, seed=3)
    backend = TorchExecutor(BundleFiles(tmp_path / "x"), torch.device("cpu"), CompileSettings(compiled=False))
    mine = Generator(LoadedBundle(BundleFiles(tmp_path / "x"), backend)).generate(asked).latents["vision"]
    theirs = Generator(load_bundle(tmp_path / "x", backend="onnxruntime")).generate(asked).latents["vision"]
    cosine = float((mine * theirs).sum() / np.linalg.norm(mine) / np.linalg.norm(theirs))
    assert cosine > 0.99, cosine


def test_scales_of_weights_alone(tmp_path: Path, fp8: Path) -> None:
    def weight_only(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["weight_only"] = True
        for name in [n for n in tensors if n.endswith(".input_scale")]:
            del tensors[name]

    root = edited(fp8, tmp_path / "x", weight_only)
    assert set(stated(root).values()) == {"fp8-w8a16"} and "gen.mlp.down" in stated(root)
    with pytest.raises(CosmosExportError) as caught:
        stated(root, recipe="fp8")
    assert caught.value.code == "CX356" and "scales of weights only" in caught.value.message


def test_the_recipe_of_a_checkpoint_needs_one(edge: Path) -> None:
    with pytest.raises(CosmosExportError) as caught:
        stated(edge, recipe="checkpoint")
    assert caught.value.code == "CX350" and "is bf16" in caught.value.message


def test_a_recipe_that_is_chosen(tmp_path: Path, edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model waits for its launches whatever it computes in, and keeps all its bits; a real one does not."""
    job = resolve(harness.transformer_only(edge, tmp_path / "x", recipe="auto", target="rtx-pro-6000"))
    assert job.precision.recipe == "bf16" and not job.quantized
    monkeypatch.setattr(build_options, "from_checkpoint", lambda _: published_subject("nano"))
    with pytest.raises(CosmosExportError) as caught:
        resolve(harness.transformer_only(edge, tmp_path / "x", recipe="auto", target="rtx-pro-6000"))
    assert caught.value.code == "CX356" and "recipe `fp8`" in caught.value.message


def test_a_recipe_that_the_build_could_not_have_is_not_chosen(
    tmp_path: Path, shared: Path, edge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 is not quantized for these engines; a table that the choice does not need is no mistake of the caller's."""
    wide, scales = harness.checkpoint(shared, "omni", "float32"), harness.scale_table(edge, tmp_path / "scales")
    options: dict[str, Any] = {"recipe": "auto", "target": "rtx-pro-6000", "modalities": ("vision",)}
    job = resolve(harness.transformer_only(edge, tmp_path / "x", calibration=scales, **options))
    assert job.precision.recipe == "bf16" and job.scales is None
    monkeypatch.setattr(build_options, "from_checkpoint", lambda _: published_subject("nano"))
    assert resolve(harness.transformer_only(wide, tmp_path / "x", **options)).precision.recipe == "bf16"
    with pytest.raises(CosmosExportError) as caught:
        resolve(harness.transformer_only(wide, tmp_path / "x", overrides=("gen.mlp=fp8",), **options))
    assert caught.value.code == "CX358"
