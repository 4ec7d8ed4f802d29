"""Adapters beside or inside a checkpoint are never left out without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_checkpoint import write_checkpoint, write_json
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.safetensors_writer import TensorHeader
from cosmos_export.cli import app
from cosmos_export.compiler.options import resolve
from cosmos_export.compiler.request_record import checkpoint_notes
from cosmos_export.diagnostics import UserError
from cosmos_export.options import BuildOptions

PEFT = "base_model.model.layers.0.self_attn.to_q.lora_A.weight"
KOHYA = "lora_unet_layers_0_self_attn_to_q.lora_down.weight"


def refused(code: str, call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


def weights(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros((4, 8), np.float32) for name in names}, path)


PLACES: dict[str, Callable[[Path], object]] = {
    "pytorch_lora_weights.safetensors": lambda path: weights(path, PEFT),
    "adapter_config.json": lambda path: write_json(path, {"peft_type": "LORA"}),
    "transformer/adapter_model.safetensors": lambda path: weights(path, PEFT),
    "transformer/adapter_model.bin": lambda path: path.write_bytes(b"a pickle"),
    "transformer/default/adapter_config.json": lambda path: write_json(path, {}),
    "lora/towel_LoRA_v2.safetensors": lambda path: weights(path, "x"),
    "transformer/style.safetensors": lambda path: weights(path, KOHYA),
    "other/extra.safetensors": lambda path: weights(path, "decoder.hada_w1_a"),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_is_found_where_it_is(tmp_path: Path, place: str) -> None:
    root = write_checkpoint(tmp_path / "c")
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    PLACES[place](root / place)
    assert [path.relative_to(root).as_posix() for path in open_checkpoint(root).adapters] == [place]
    text = " ".join(CliRunner().invoke(app, ["inspect", str(root)]).output.split())
    assert f"adapters, not merged and not read: {place}" in text
    options: dict[str, Any] = {"checkpoint": root, "output": tmp_path / "x", "components": ("none",)}
    error = refused("CX125", lambda: resolve(BuildOptions(**options)))
    assert place in error.message and "--adapter " in error.hint and "--ignore-adapters" in error.hint
    found = resolve(BuildOptions(**options, ignore_adapters=True))
    assert f"adapters that are not in this bundle: {place}" in checkpoint_notes(found.checkpoint)


def test_files_of_the_model_are_no_adapters(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "exploration", shards=3)
    weights(root / "transformer/other.safetensors", "proj_in.weight")
    (root / "transformer/broken.safetensors").write_bytes(b"no header")
    (root / ".cache").mkdir()
    write_json(root / ".cache/adapter_config.json", {})
    (root / "lora.md").write_text("about LoRA")
    assert open_checkpoint(root).adapters == ()


@pytest.mark.parametrize("verb", ["calibrate", "quantize"])
def test_other_verbs_refuse_them_too(tmp_path: Path, verb: str) -> None:
    from cosmos_export.calibration.table import ScaleTable, write_scale_table

    root = write_checkpoint(tmp_path / "c")
    PLACES["pytorch_lora_weights.safetensors"](root / "pytorch_lora_weights.safetensors")
    (tmp_path / "a.txt").write_text("A cup.")
    write_scale_table(ScaleTable({"layers.0.self_attn.to_q.input_amax": 1.0}, {}, "0" * 64), tmp_path / "s")
    given = {"calibrate": ["--data", str(tmp_path / "a.txt")], "quantize": ["--calibration", str(tmp_path / "s")]}
    command = [verb, str(root), *given[verb], "-o", str(tmp_path / "x")]
    assert "CX125" in CliRunner().invoke(app, command).output
    assert "CX125" not in CliRunner().invoke(app, [*command, "--ignore-adapters"]).output


@pytest.mark.parametrize("wrapped", [True, False])
def test_layers_with_an_adapter_around_them_get_that_hint(tmp_path: Path, wrapped: bool) -> None:
    def edit(specs: list[TensorHeader]) -> list[TensorHeader]:
        first = next(spec for spec in specs if spec.name.endswith("to_q.weight"))
        module = first.name.removesuffix(".weight")
        added = [TensorHeader(f"{module}.lora_{half}.default.weight", "BF16", (4, 8)) for half in "AB"]
        if not wrapped:
            return [*specs, *added]
        return [
            *(s for s in specs if s is not first),
            TensorHeader(f"{module}.base_layer.weight", "BF16", first.shape),
            *added,
        ]

    root = write_checkpoint(tmp_path / "c", edit=edit)
    error = refused("CX120" if wrapped else "CX121", lambda: open_checkpoint(root))
    assert "an adapter is not merged" in error.hint and "fuse_lora" in error.hint


def test_a_folder_that_is_only_an_adapter(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "c")
    (weights_file,) = (root / "transformer").glob("*.safetensors")
    weights_file.rename(root / "transformer/adapter_model.safetensors")
    error = refused("CX110", lambda: open_checkpoint(root))
    assert "adapter_model.safetensors is an adapter" in error.message and "fuse_lora" in error.hint
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    error = refused("CX105", lambda: open_checkpoint(tmp_path))
    assert "adapter without its model" in error.message and "--adapter" in error.hint
