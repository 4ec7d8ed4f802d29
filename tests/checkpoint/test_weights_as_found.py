"""Weights as people have them: other types are converted and it is said, broken values are found, quantized layouts are
read or refused for the reason that they have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from fake_checkpoint import QUANTIZATION, TINY, quantized_specs, weight_file, write_checkpoint
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cosmos_export.checkpoint import expected_tensors, open_checkpoint
from cosmos_export.checkpoint.converted import conversion_notes, conversions, converted
from cosmos_export.checkpoint.finite import require_finite
from cosmos_export.checkpoint.safetensors_writer import TensorHeader
from cosmos_export.cli import app
from cosmos_export.diagnostics import UserError

SHAPES = {name: tensor.shape for name, tensor in expected_tensors(TINY).items()}
BF16 = np.dtype(ml_dtypes.bfloat16)


def weights(dtype: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Random weights; of ``dtype`` the type of the last part of a name that fits, else of ""."""
    chance = np.random.default_rng(0)

    def kind(name: str) -> Any:
        return next((value for key, value in dtype.items() if key and key in name), dtype[""])

    return {name: chance.normal(0, 0.3, shape).astype(kind(name)) for name, shape in SHAPES.items()}


def written(root: Path, dtype: Mapping[str, Any]) -> Path:
    write_checkpoint(root)
    save_file(weights(dtype), weight_file(root))
    return root


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "fp16": ({"": np.float16}, "F16 and are converted to BF16"),
    "fp16-time-fp32": ({"": np.float16, "time_embedder": np.float32}, "F16 and are converted to BF16"),
    "bf16-norms-fp32": ({"": BF16, "norm": np.float32}, "F32 and are converted to BF16"),
    "bf16-norms-fp16": ({"": BF16, "norm": np.float16}, "F16 and are converted to BF16"),
    "bf16-heads-fp32": ({"": BF16, "proj_in": np.float32, "proj_out": np.float32}, "F32 and are converted to BF16"),
    "fp32-norms-bf16": ({"": np.float32, "norm": BF16}, "F32 and are converted to BF16"),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_types_are_converted_and_said(tmp_path: Path, name: str) -> None:
    dtype, said = KINDS[name]
    found = open_checkpoint(written(tmp_path / "c", dtype))
    made = converted(found, tmp_path / "out")
    assert (made.dtype, made.precision) == ("bf16", "bf16")
    assert conversions(made) == {} and made.notes == conversion_notes(found)
    assert said in " ".join(made.notes)
    for key, array in weights(dtype).items():
        as_float = torch.from_numpy(array.astype(np.float32))
        wide = "time_embedder" in key and (name.startswith("fp16") or dtype[""] is np.float32)
        expected = as_float if wide else as_float.to(torch.bfloat16).float()
        np.testing.assert_array_equal(made.tensors[key].array().astype(np.float32), expected.numpy())
    text = " ".join(CliRunner().invoke(app, ["inspect", str(tmp_path / "c")]).output.split())
    assert "`build` converts: " in text and said in text


@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_what_builds_take_is_left_alone(tmp_path: Path, dtype: Any) -> None:
    found = open_checkpoint(written(tmp_path / "c", {"": dtype}))
    assert converted(found, tmp_path / "out") is found and conversion_notes(found) == ()
    mixed = open_checkpoint(written(tmp_path / "m", {"": BF16, "time_embedder": np.float32}))
    assert converted(mixed, tmp_path / "out") is mixed


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_values_are_found_in_the_weights(tmp_path: Path, dtype: Any, value: float) -> None:
    root = written(tmp_path / "c", {"": dtype})
    require_finite(open_checkpoint(root))
    arrays = weights({"": dtype})
    arrays["layers.1.mlp.down_proj.weight"][3, 4] = value
    save_file(arrays, weight_file(root))
    with pytest.raises(UserError) as caught:
        require_finite(open_checkpoint(root))
    assert caught.value.code == "CX133"
    assert "layers.1.mlp.down_proj.weight (1 of" in caught.value.message and "broken" in caught.value.hint


def fp8(root: Path, **edits: Any) -> Path:
    return write_checkpoint(root, specs=quantized_specs(TINY), config={"quantization_config": QUANTIZATION}, **edits)


def test_broken_values_of_fp8_too(tmp_path: Path) -> None:
    root = fp8(tmp_path / "c")
    entry = open_checkpoint(root).tensors["layers.0.self_attn.to_q.weight"]
    require_finite(open_checkpoint(root))
    with weight_file(root).open("r+b") as file:
        file.seek(entry.offset + 5)
        file.write(b"\xff\x7e")
    with pytest.raises(UserError, match=r"to_q.weight \(1 of"):
        require_finite(open_checkpoint(root))


@pytest.mark.parametrize("scales", [("weight_scale",), ("weight_scale", "input_scale")])
def test_a_quantized_language_head_is_read(tmp_path: Path, scales: tuple[str, ...]) -> None:
    def edit(specs: list[TensorHeader]) -> list[TensorHeader]:
        found = [s if s.name != "lm_head.weight" else TensorHeader(s.name, "F8_E4M3", s.shape) for s in specs]
        return [*found, *(TensorHeader(f"lm_head.{scale}", "F32", ()) for scale in scales)]

    found = open_checkpoint(fp8(tmp_path / "c", edit=edit))
    assert found.tensors["lm_head.weight"].dtype == "F8_E4M3" and found.precision == "fp8-modelopt"
    assert "lm_head.weight_scale" in found.tensors


def test_a_language_head_without_its_scale_is_not(tmp_path: Path) -> None:
    def edit(specs: list[TensorHeader]) -> list[TensorHeader]:
        return [s if s.name != "lm_head.weight" else TensorHeader(s.name, "F8_E4M3", s.shape) for s in specs]

    with pytest.raises(UserError, match=r"lm_head.weight is FP8 but has no weight_scale"):
        open_checkpoint(fp8(tmp_path / "c", edit=edit))


OWN = {"producer": {"name": "cosmos-export", "version": "0.1.0"}}
LAYOUTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "to NVFP4 by ModelOpt", "--recipe fp4"),
    "nvfp4-own": ({"quant_method": "modelopt", "quant_algo": "NVFP4", **OWN}, "cosmos-export quantize", "--recipe fp4"),
    "int4-own": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", **OWN}, "to INT4 (AWQ)", "--recipe int4"),
    "mixed": ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "several formats", "modelopt-auto"),
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "block-wise FP8", "BF16"),
    "fp8-pb": ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "block-wise FP8", "BF16"),
    "awq": ({"quant_method": "awq", "bits": 4}, "AWQ", "BF16"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "GPTQ", "BF16"),
    "bnb": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "BF16"),
    "torchao": ({"quant_method": "torchao"}, "torchao", "BF16"),
    "quanto": ({"quant_method": "quanto"}, "optimum-quanto", "BF16"),
    "compressed": ({"quant_method": "compressed-tensors"}, "compressed-tensors", "BF16"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "FBGEMM", "BF16"),
    "gguf": ({"quant_method": "gguf"}, "llama.cpp", "BF16"),
    "unknown": ({"quant_method": "new-thing"}, "'new-thing'", "BF16"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_are_refused_for_their_reason(tmp_path: Path, name: str) -> None:
    config, said, hint = LAYOUTS[name]
    root = write_checkpoint(tmp_path / "c", config={"quantization_config": config})
    with pytest.raises(UserError) as caught:
        open_checkpoint(root)
    assert caught.value.code == "CX124" and said in caught.value.message
    assert hint in caught.value.hint and "published revision" not in caught.value.hint
