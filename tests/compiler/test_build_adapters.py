"""A build with adapters is that of the merged checkpoint, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from build_harness import transformer_only
from safetensors.numpy import load_file, save_file

from cosmos_export.bundle import read_bundle
from cosmos_export.calibration.table import ScaleTable, write_scale_table
from cosmos_export.checkpoint import checkpoint_identity, open_checkpoint
from cosmos_export.checkpoint.folded import fold
from cosmos_export.checkpoint.read_adapter import read_adapter
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.quantize_checkpoint import quantize_checkpoint
from cosmos_export.compiler.request_record import checkpoint_notes
from cosmos_export.diagnostics import UserError
from cosmos_export.options import BuildOptions, QuantizeRequest

TARGET = "layers.0.self_attn.to_q"


@pytest.fixture(scope="module")
def adapter(omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, inner = open_checkpoint(omni).tensors[f"{TARGET}.weight"].shape
    chance = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("adapter") / "style.safetensors"
    save_file(
        {
            f"transformer.{TARGET}.lora_A.weight": chance.normal(0, 0.2, (4, inner)).astype(np.float32),
            f"transformer.{TARGET}.lora_B.weight": chance.normal(0, 0.2, (out, 4)).astype(np.float32),
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def merged(omni: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as somebody would save it who had merged the adapter."""
    root = tmp_path_factory.mktemp("merged") / "c"
    shutil.copytree(omni, root)
    source = open_checkpoint(omni)
    whole = fold(source, [read_adapter(f"{adapter}:0.5", source)], root)
    for file in {entry.file for entry in source.tensors.values()}:
        weights = load_file(root / file.relative_to(omni))
        weights |= {name: whole.tensors[name].array() for name in weights if name in whole.tensors}
        save_file(weights, root / file.relative_to(omni), {"format": "pt"})
    return root


def test_the_identity_is_that_of_the_merged_checkpoint(omni: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    source = open_checkpoint(omni)
    found = fold(source, [read_adapter(f"{adapter}:0.5", source)], tmp_path / "x")
    assert checkpoint_identity(found) == checkpoint_identity(open_checkpoint(merged)) != checkpoint_identity(source)


def test_a_scale_table_is_of_the_sum(omni: Path, adapter: Path, tmp_path: Path) -> None:
    """One that was made without the adapter is of another model."""
    source = open_checkpoint(omni)
    linears = [name.removesuffix(".weight") for name, tensor in source.expected.items() if tensor.linear]
    write_scale_table(
        ScaleTable({f"{name}.input_amax": 1.0 for name in linears}, {}, checkpoint_identity(source)), tmp_path / "s"
    )
    options = BuildOptions(omni, tmp_path / "x", recipe="fp8", calibration=tmp_path / "s", adapters=(str(adapter),),
                           components=("none",), target="rtx-pro-6000")  # fmt: skip
    with pytest.raises(UserError) as caught:
        resolve(options)
    assert caught.value.code == "CX311"


def test_a_job_has_the_sum(omni: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    job = resolve(transformer_only(omni, tmp_path / "x", adapters=(f"{adapter}:0.5",), target="cpu"))
    assert checkpoint_identity(job.checkpoint) == checkpoint_identity(open_checkpoint(merged))
    (note,) = (note for note in checkpoint_notes(job.checkpoint) if "adapter" in note)
    assert "style.safetensors" in note and '"scale": 0.5' in note


def test_an_output_that_exists_is_refused_before_weights_are_written(
    omni: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.setattr("cosmos_export.compiler.options.fold", lambda *_: pytest.fail("weights are written"))
    with pytest.raises(UserError) as caught:
        resolve(transformer_only(omni, tmp_path / "x", adapters=(str(adapter),), target="cpu"))
    assert caught.value.code == "CX701"


@pytest.mark.slow  # two builds
def test_the_bundle_is_that_of_the_merged_checkpoint(omni: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    options = {"target": "cpu", "parity": "always"}
    build(transformer_only(omni, tmp_path / "a", adapters=(f"{adapter}:0.5",), **options))
    build(transformer_only(merged, tmp_path / "b", **options))
    first, second = read_bundle(tmp_path / "a"), read_bundle(tmp_path / "b")
    files = [{r.path: r.sha256 for r in found.files if r.path.startswith("onnx/")} for found in (first, second)]
    assert files[0] == files[1]
    (lineage,) = first.options["adapters"]
    said = json.loads(lineage)
    assert (said["name"], said["scale"], said["ranks"], said["weights"]) == ("style.safetensors", 0.5, [4], 1)
    assert "adapters" not in second.options
    assert all(verdict.verdict == "pass" for verdict in first.evaluation if verdict.metric.startswith("relative L2"))
    assert not list(tmp_path.glob(".*folding*"))


def test_a_quantized_checkpoint_has_the_sum(omni: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    """Byte for byte as that of the merged checkpoint, and without the adapter, whose place is taken."""
    own = tmp_path / "own"
    shutil.copytree(omni, own)
    (own / "lora").mkdir()
    shutil.copyfile(adapter, own / "lora/style.safetensors")
    whole = open_checkpoint(merged)
    linears = [name.removesuffix(".weight") for name, tensor in whole.expected.items() if tensor.linear]
    table = ScaleTable({f"{name}.input_amax": 1.0 for name in linears}, {}, checkpoint_identity(whole))
    write_scale_table(table, tmp_path / "s")
    request = QuantizeRequest(own, tmp_path / "s", tmp_path / "a", adapters=(f"{own / 'lora'}:0.5",))
    quantize_checkpoint(request)
    quantize_checkpoint(QuantizeRequest(merged, tmp_path / "s", tmp_path / "b"))
    files = [
        {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        for root in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0].keys() == files[1].keys() and not [name for name in files[0] if "lora" in name]
    weights = [name for name in files[0] if name.startswith("transformer/")]
    assert weights and all(files[0][name] == files[1][name] for name in weights)
