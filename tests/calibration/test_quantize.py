"""Quantized checkpoints: the published layout, read by our reader, and by the published model's own code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cosmos_export.calibration import write_quantized as quantizing
from cosmos_export.calibration.formats import layout_of
from cosmos_export.calibration.table import ScaleTable, write_scale_table
from cosmos_export.checkpoint import Checkpoint, checkpoint_identity, open_checkpoint, quantized_linears
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.checkpoint.safetensors_header import TensorEntry, read_header
from cosmos_export.cli import app
from cosmos_export.compiler.quantize_checkpoint import quantize_checkpoint
from cosmos_export.diagnostics import UserError
from cosmos_export.ir.packing import fp8_scale
from cosmos_export.options import QuantizeRequest

WIDE = {"hidden": 128, "intermediate": 256, "layers": 2, "dtype": "bfloat16"}
"""The smallest sizes that INT4 groups of 128 divide."""


def synthetic_table(checkpoint: Checkpoint, *, pre_scales: bool = False) -> ScaleTable:
    linears = [name.removesuffix(".weight") for name, tensor in checkpoint.expected.items() if tensor.linear]
    generator = np.random.default_rng(0)
    pre = {
        linear: generator.uniform(0.95, 1.05, checkpoint.expected[f"{linear}.weight"].shape[1]).astype(np.float32)
        for linear in linears
    }
    return ScaleTable(
        amax={f"{linear}.input_amax": float(np.float32(generator.uniform(1, 50))) for linear in linears},
        pre_scales=pre if pre_scales else {},
        checkpoint=checkpoint_identity(checkpoint),
        lineage={"sources": []},
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    path = write_demo_checkpoint(root / "tiny", shard_size=200_000, **WIDE)
    write_scale_table(synthetic_table(open_checkpoint(path)), root / "scales")
    write_scale_table(synthetic_table(open_checkpoint(path), pre_scales=True), root / "awq")
    return path


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == code
    return caught.value.message


def entries(checkpoint: Path) -> dict[str, TensorEntry]:
    return {
        name: entry
        for file in sorted((checkpoint / "transformer").glob("*.safetensors"))
        for name, entry in read_header(file).tensors.items()
    }


def tensor(entry: TensorEntry) -> torch.Tensor:
    types = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
    return torch.from_numpy(entry.raw().copy()).view(types[entry.dtype]).reshape(entry.shape)


def test_fp8_is_the_published_layout_and_our_reader_takes_it(tmp_path: Path, source: Path) -> None:
    result = quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / "fp8"))
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "fp8")
    assert after.precision == "fp8-modelopt" and after.quantization is not None
    policy = after.quantization.step_policy
    assert policy is not None and (policy.first_steps, policy.last_steps, policy.reasoner) == (3, 3, "a16")
    linears = [name for name, want in before.expected.items() if want.linear]
    assert result.quantized == len(linears) == 2 * 2 * 7
    table = synthetic_table(before)
    for name, entry in after.tensors.items():
        if name in before.tensors and name not in linears:
            assert bytes(entry.raw()) == bytes(before.tensors[name].raw()), name
    for name in linears:
        module = name.removesuffix(".weight")
        assert after.tensors[name].dtype == "F8_E4M3"
        assert after.tensors[f"{module}.weight_scale"].shape == after.tensors[f"{module}.input_scale"].shape == ()
        assert tensor(after.tensors[f"{module}.input_scale"]) == fp8_scale(torch.tensor(table.input_amax(module)))
        scale = tensor(after.tensors[f"{module}.weight_scale"])
        weight = tensor(before.tensors[name]).float()
        assert scale == fp8_scale(weight.abs().max())
        exact = (weight / scale).to(torch.float8_e4m3fn)
        assert torch.equal(tensor(after.tensors[name]).view(torch.uint8), exact.view(torch.uint8))


def test_the_rest_is_a_whole_checkpoint(tmp_path: Path, source: Path) -> None:
    (source / "modelopt_state.pth").write_bytes(b"a pickle")
    try:
        quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / "fp8"))
    finally:
        (source / "modelopt_state.pth").unlink()
    out = tmp_path / "fp8"
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and relative.parts[0] != "transformer" and relative.name != "model.safetensors.index.json":
            assert (out / relative).read_bytes() == path.read_bytes()
            assert (out / relative).stat().st_ino != path.stat().st_ino
    assert not (out / "modelopt_state.pth").exists()
    assert json.loads((out / "hf_quant_config.json").read_text()) == {"quant_method": "modelopt", "quant_algo": "FP8"}
    assert json.loads((out / "calibration_lineage.json").read_text())["sources"] == []
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    query = "layers.0.self_attn.to_q"
    for leaf in ("weight", "weight_scale", "input_scale"):
        assert f"{query}.{leaf}" in read_header(out / index[f"{query}.{leaf}"]).tensors
    assert all((out / file).is_file() for file in index.values())


def test_links_in_place_of_copies(tmp_path: Path, source: Path) -> None:
    quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / "fp8", link=True))
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "fp8" / vae).stat().st_ino == (source / vae).stat().st_ino
    assert open_checkpoint(tmp_path / "fp8").precision == "fp8-modelopt"


@pytest.mark.parametrize(("kind", "limit"), [("fp8", 0.03), ("int4", 0.14), ("nvfp4", 0.11)])
def test_what_is_written_stands_for_the_weight(kind: str, limit: float, tmp_path: Path, source: Path) -> None:
    quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / kind, format=kind))
    written, before = entries(tmp_path / kind), open_checkpoint(source)
    for name, want in before.expected.items():
        if want.linear:
            module = name.removesuffix("weight")
            parts = {k.removeprefix(module): tensor(e) for k, e in written.items() if k.startswith(module)}
            weight = tensor(before.tensors[name]).float()
            error = float((layout_of(kind).decode(parts) - weight).norm() / weight.norm())
            assert 0.005 < error < limit, name
    config = json.loads((tmp_path / kind / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == {"fp8": "FP8", "int4": "W4A16_AWQ", "nvfp4": "NVFP4"}[kind]
    assert ("runtime" in config) == (kind == "fp8")


def test_pre_scales_go_into_int4(tmp_path: Path, source: Path) -> None:
    quantize_checkpoint(QuantizeRequest(source, source.parent / "awq", tmp_path / "int4", format="int4"))
    written, before = entries(tmp_path / "int4"), open_checkpoint(source)
    table = synthetic_table(before, pre_scales=True)
    linear = "layers.1.mlp_moe_gen.down_proj"
    parts = {k.removeprefix(f"{linear}."): tensor(e) for k, e in written.items() if k.startswith(f"{linear}.")}
    pre = torch.from_numpy(table.pre_scales[linear])
    assert torch.equal(parts["pre_quant_scale"], pre.bfloat16())
    weight = tensor(before.tensors[f"{linear}.weight"]).float()
    back = layout_of("int4").decode(parts) * pre
    assert float((back - weight).norm() / weight.norm()) < 0.14


def test_one_tower(tmp_path: Path, source: Path) -> None:
    result = quantize_checkpoint(
        QuantizeRequest(source, source.parent / "scales", tmp_path / "fp8", towers=("generator",))
    )
    found = open_checkpoint(tmp_path / "fp8")
    assert result.quantized == 2 * 7
    assert found.tensors["layers.0.self_attn.to_q.weight"].dtype == "BF16"
    assert found.tensors["layers.0.self_attn.add_q_proj.weight"].dtype == "F8_E4M3"
    assert found.quantization is not None and "layers.0.self_attn.to_q" in found.quantization.ignored


def test_modelopt_rounding_is_another_file_with_the_same_scales(tmp_path: Path, source: Path) -> None:
    for rounding in ("exact", "modelopt"):
        quantize_checkpoint(
            QuantizeRequest(source, source.parent / "scales", tmp_path / rounding, fp8_rounding=rounding)
        )
        config = json.loads((tmp_path / rounding / "transformer" / "config.json").read_text())
        assert config["quantization_config"]["producer"]["fp8_rounding"] == rounding
    exact, twice = (entries(tmp_path / name) for name in ("exact", "modelopt"))
    scales = {name for name in exact if name.endswith("_scale")}
    assert all(bytes(exact[name].raw()) == bytes(twice[name].raw()) for name in scales)
    different = [name for name in exact if bytes(exact[name].raw()) != bytes(twice[name].raw())]
    assert len(different) > 20 and all(name.endswith(".weight") for name in different)


def test_diffusers_reads_the_policy_and_the_weights(tmp_path: Path, source: Path) -> None:
    """diffusers' parser of the policy; and its model, with the weights as they stand, near the one before."""
    from diffusers import Cosmos3OmniTransformer
    from diffusers.pipelines.cosmos.mixed_precision import Cosmos3MixedPrecisionConfig

    quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / "fp8"))
    raw = json.loads((tmp_path / "fp8" / "transformer" / "config.json").read_text())
    parsed = Cosmos3MixedPrecisionConfig.resolve(
        mixed_precision_format="fp8", quantization_config=raw["quantization_config"]
    )
    assert (parsed.first_steps, parsed.last_steps, parsed.reasoner_policy) == (3, 3, "high_precision")
    model = Cosmos3OmniTransformer.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = open_checkpoint(tmp_path / "fp8")
    state: dict[str, Any] = {}
    for name in found.expected:
        value = tensor(found.tensors[name])
        if value.dtype == torch.float8_e4m3fn:
            value = (value.float() * tensor(found.tensors[f"{name.removesuffix('weight')}weight_scale"])).bfloat16()
        state[name] = value
    model.load_state_dict(state)
    for name, value in model.state_dict().items():
        error = (value.float() - before[name].float()).norm() / before[name].float().norm()
        assert error < (0.03 if found.expected[name].linear else 1e-6)


@pytest.mark.parametrize("kind", ["fp8", "int4", "nvfp4"])
def test_modelopt_reads_what_is_written(kind: str, tmp_path: Path, source: Path) -> None:
    """Its own tensor classes give back what our bytes stand for. Of INT4 as exported it has a writer and no reader: of
    what our bytes stand for it makes the same bytes."""
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt 0.47 (extra modelopt)")
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    def theirs(shape: tuple[int, ...], parts: dict[str, torch.Tensor]) -> torch.Tensor:
        weight, scale = parts["weight"], parts["weight_scale"]
        if kind == "fp8":
            return FP8QTensor(shape, torch.float32, weight).dequantize(scale=scale)
        return NVFP4QTensor(shape, torch.float32, weight).dequantize(
            scale=scale, double_scale=parts["weight_scale_2"], block_sizes={-1: 16}
        )

    quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / kind, format=kind))
    written, seen = entries(tmp_path / kind), 0
    for name, want in open_checkpoint(source).expected.items():
        if not want.linear:
            continue
        module = name.removesuffix("weight")
        parts = {k.removeprefix(module): tensor(e) for k, e in written.items() if k.startswith(module)}
        ours = layout_of(kind).decode(parts)
        if kind == "int4":
            assert torch.equal(pack_int4_in_uint8(ours, parts["weight_scale"], 128), parts["weight"]), name
        else:
            assert torch.equal(theirs(tuple(want.shape), parts), ours), name
        seen += 1
    assert seen == 28


def test_a_module_of_modelopt_takes_the_tensors(tmp_path: Path, source: Path) -> None:
    """A linear that ModelOpt has quantized and compressed computes with our weight and scale in place of its own, up to
    its own rounding of the scale to bfloat16 (0.4 %)."""
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt 0.47 (extra modelopt)")
    import modelopt.torch.quantization as mtq

    quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / "fp8"))
    linear, written = "layers.0.mlp_moe_gen.up_proj", entries(tmp_path / "fp8")
    parts = {k.removeprefix(f"{linear}."): tensor(e) for k, e in written.items() if k.startswith(f"{linear}.")}
    inputs = torch.linspace(-9, 9, 4 * parts["weight"].shape[1]).reshape(4, -1).bfloat16()
    own = torch.nn.Linear(*reversed(parts["weight"].shape), bias=False, dtype=torch.bfloat16)
    model: Any = mtq.quantize(torch.nn.Sequential(own), mtq.FP8_DEFAULT_CFG, lambda m: m(inputs))
    mtq.compress(model)
    state = model.state_dict()
    assert state["0.weight"].dtype == parts["weight"].dtype and state["0.weight"].shape == parts["weight"].shape
    model.load_state_dict(
        {**state, "0.weight": parts["weight"], "0.weight_quantizer._scale": parts["weight_scale"]}, strict=True
    )
    model[0].input_quantizer.disable()
    expected = inputs.float() @ layout_of("fp8").decode(parts).T
    assert float((model(inputs).float() - expected).norm() / expected.norm()) < 0.006


def rewritten(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]) -> None:
    """The transformer's tensors as ``change`` distributes them over new shards."""
    from safetensors.torch import save_file

    folder = checkpoint / "transformer"
    tensors = {name: tensor(entry) for name, entry in entries(checkpoint).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    shards, weight_map = change(tensors), {}
    for number, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: value.contiguous().clone() for name, value in shard.items()}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_published_revision_with_all_its_oddities_is_the_same_input(tmp_path: Path, source: Path) -> None:
    """Scales in another shard, leftovers of calibration, and names of the training framework, some twice."""
    quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / "fp8"))
    plain = quantized_linears(open_checkpoint(tmp_path / "fp8"))
    before = {name: bytes(linear.weight.raw()) for name, linear in plain.items()}
    query = "layers.0.self_attn.add_q_proj"

    def odd(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        scales = {name: value for name, value in tensors.items() if name.endswith("_scale")}
        rest = {name: value for name, value in tensors.items() if name not in scales}
        rest["model.vae2llm.weight"] = rest["proj_in.weight"]  # the same tensor under a second name
        rest["llm2vae.bias"] = rest.pop("proj_out.bias")
        rest["model.layers.0.self_attn.q_proj_moe_gen.weight"] = rest.pop(f"{query}.weight")
        for linear, found in plain.items():
            scales[f"{linear}.weight_quantizer._amax"] = torch.tensor(448 * found.weight_scale)
            scales[f"{linear}.weight_quantizer._scale"] = torch.tensor(found.weight_scale)
            scales[f"{linear}.input_quantizer._amax"] = torch.tensor(448 * (found.input_scale or 0))
        return [rest, scales]

    rewritten(tmp_path / "fp8", odd)
    checkpoint = open_checkpoint(tmp_path / "fp8")
    found = quantized_linears(checkpoint)
    assert list(found) == list(plain) and len(found) == 28
    for name, linear in found.items():
        assert bytes(linear.weight.raw()) == before[name]
        assert linear.weight.dtype == "F8_E4M3"
        assert (linear.weight_scale, linear.input_scale) == (plain[name].weight_scale, plain[name].input_scale)
    reasons = dict(checkpoint.unused)
    assert "identical copy" in reasons["model.vae2llm.weight"]
    assert "calibration leftover" in reasons[f"{query}.weight_quantizer._amax"]


@pytest.mark.parametrize("leaf", ["weight_scale", "input_scale"])
def test_scales_that_are_no_scales_are_refused(leaf: str, tmp_path: Path, source: Path) -> None:
    quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / "fp8"))
    name = f"layers.1.mlp.down_proj.{leaf}"

    def without(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [{key: value for key, value in tensors.items() if key != name}]

    for value in (float("nan"), 0.0, -1.0):
        rewritten(tmp_path / "fp8", lambda tensors, value=value: [{**tensors, name: torch.tensor(value)}])  # type: ignore[misc]
        assert name in refused("CX124", lambda: quantized_linears(open_checkpoint(tmp_path / "fp8")))
    rewritten(tmp_path / "fp8", without)
    with pytest.raises(UserError, match=leaf):
        open_checkpoint(tmp_path / "fp8")


def test_a_checkpoint_that_is_not_quantized_has_none(source: Path) -> None:
    assert quantized_linears(open_checkpoint(source)) == {}


def test_bad_requests_are_refused_before_work(tmp_path: Path, source: Path) -> None:
    scales = source.parent / "scales"
    out = tmp_path / "out"
    refused("CX332", lambda: quantize_checkpoint(QuantizeRequest(source, scales, out, format="fp9")))
    refused("CX332", lambda: quantize_checkpoint(QuantizeRequest(source, scales, out, fp8_rounding="up")))
    refused("CX332", lambda: quantize_checkpoint(QuantizeRequest(source, scales, out, towers=("und",))))
    refused("CX330", lambda: quantize_checkpoint(QuantizeRequest(source, scales, out, towers=())))
    refused("CX310", lambda: quantize_checkpoint(QuantizeRequest(source, source, out)))
    refused("CX333", lambda: quantize_checkpoint(QuantizeRequest(source, scales, source)))
    other = write_demo_checkpoint(tmp_path / "other", seed=3, **WIDE)
    refused("CX311", lambda: quantize_checkpoint(QuantizeRequest(other, scales, out)))
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_table_that_lacks_a_linear_is_refused(tmp_path: Path, source: Path) -> None:
    whole = synthetic_table(open_checkpoint(source))
    amax = {key: value for key, value in whole.amax.items() if "layers.1.mlp.up_proj" not in key}
    write_scale_table(ScaleTable(amax, {}, whole.checkpoint), tmp_path / "partial")
    message = refused(
        "CX312", lambda: quantize_checkpoint(QuantizeRequest(source, tmp_path / "partial", tmp_path / "out"))
    )
    assert "layers.1.mlp.up_proj" in message


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosmos_export.calibration.write_quantized.write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(QuantizeRequest(source, source.parent / "scales", tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_nan_in_a_weight_is_found(tmp_path: Path) -> None:
    path = write_demo_checkpoint(tmp_path / "damaged", **WIDE)
    entry = open_checkpoint(path).tensors["layers.1.mlp.up_proj.weight"]
    with entry.file.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"\xff\xff")
    write_scale_table(synthetic_table(open_checkpoint(path)), tmp_path / "scales")
    message = refused(
        "CX331", lambda: quantize_checkpoint(QuantizeRequest(path, tmp_path / "scales", tmp_path / "out"))
    )
    assert "layers.1.mlp.up_proj.weight" in message
    assert not (tmp_path / "out").exists()


def test_the_verb(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "fp8"
    arguments = ["quantize", str(source), "--calibration", str(source.parent / "scales"), "-o", str(out), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["quantized"], document["policy"], document["format"]) == (28, True, "fp8")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and json.loads(again.stdout)["error"]["code"] == "CX333"


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_a_checkpoint_that_changes_while_it_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In place, with the time of before: it is not the one that the table is of any more."""
    path = write_demo_checkpoint(tmp_path / "tiny", **WIDE)
    write_scale_table(synthetic_table(open_checkpoint(path)), tmp_path / "scales")
    file = path / "transformer" / name

    def changed(*given: Any) -> Any:
        status, data = file.stat(), bytearray(file.read_bytes())
        data[-2:] = data[:-3:-1]
        file.write_bytes(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        return quantized_weight(*given)

    quantized_weight = quantizing.quantized_weight
    monkeypatch.setattr(quantizing, "quantized_weight", changed)
    message = refused(
        "CX118", lambda: quantize_checkpoint(QuantizeRequest(path, tmp_path / "scales", tmp_path / "fp8"))
    )
    assert message.startswith("the checkpoint changed during quantization: ") and str(file) in message
    assert not (tmp_path / "fp8").exists()


def test_linked_files_are_not_written_to(tmp_path: Path) -> None:
    """A second quantization of a checkpoint that has files of the first: they are another checkpoint's."""
    path = write_demo_checkpoint(tmp_path / "tiny", **WIDE)
    lineage = path / "calibration_lineage.json"
    lineage.write_text("{}\n")
    write_scale_table(synthetic_table(open_checkpoint(path)), tmp_path / "scales")
    quantize_checkpoint(QuantizeRequest(path, tmp_path / "scales", tmp_path / "fp8", link=True))
    assert lineage.read_text() == "{}\n" and lineage.stat().st_nlink == 1
    assert (tmp_path / "fp8/vae/config.json").stat().st_ino == (path / "vae/config.json").stat().st_ino
