"""Adapters are added to the weights as PEFT and diffusers add them, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_checkpoint import QUANTIZATION, TINY, quantized_specs, write_checkpoint, write_json
from safetensors.numpy import save_file

from cosmos_export.checkpoint import expected_tensors, folded, open_checkpoint
from cosmos_export.checkpoint.folded import fold, left_out
from cosmos_export.checkpoint.read_adapter import read_adapter
from cosmos_export.checkpoint.reader import Checkpoint
from cosmos_export.diagnostics import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)
TARGETS = ("layers.0.self_attn.to_q", "layers.1.self_attn.add_q_proj", "layers.1.mlp_moe_gen.down_proj", "proj_in")
SHAPES = {name: tensor.shape for name, tensor in expected_tensors(TINY).items()}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights, whose transformer diffusers loads."""
    root = write_checkpoint(tmp_path_factory.mktemp("folded") / "c")
    chance = np.random.default_rng(0)
    weights = {name: chance.normal(0, 0.1, shape).astype(BF16) for name, shape in SHAPES.items()}
    save_file(weights, root / "transformer/diffusion_pytorch_model.safetensors")
    return root


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Checkpoint:
    return open_checkpoint(root)


def factors(rank: int, seed: int = 1, targets: tuple[str, ...] = TARGETS) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [rank, in] and B [out, rank] of each target."""
    chance = np.random.default_rng(seed)
    found = {}
    for name in targets:
        out, inner = SHAPES[f"{name}.weight"]
        a, b = chance.normal(0, 0.3, (rank, inner)), chance.normal(0, 0.3, (out, rank))
        found[name] = a.astype(np.float32), b.astype(np.float32)
    return found


def tensors(rank: int, prefix: str, down: str, up: str, **more: Any) -> Arrays:
    found: Arrays = {}
    for name, (a, b) in factors(rank, **more).items():
        found |= {f"{prefix}{name}.{down}": a, f"{prefix}{name}.{up}": b}
    return found


def peft(folder: Path, rank: int = 4, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        tensors(rank, "base_model.model.", "lora_A.weight", "lora_B.weight"), folder / "adapter_model.safetensors"
    )
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": TARGETS, **config},
    )
    return folder


def underscored(arrays: Arrays) -> Arrays:
    """Names as kohya writes them, with an alpha of each module."""
    found: Arrays = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".lora_")
        found[f"lora_unet_{module.replace('.', '_')}.lora_{leaf}"] = array
        found[f"lora_unet_{module.replace('.', '_')}.alpha"] = np.asarray(2.0, np.float32)
    return found


def of_diffusers(path: Path, **metadata: Any) -> Path:
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in metadata.items()})}
    save_file(tensors(4, "transformer.", "lora_A.weight", "lora_B.weight"), path, header if metadata else None)
    return path


# How each layout is written, and the factor of B · A.
LAYOUTS: dict[str, tuple[Callable[[Path], Path], float]] = {
    "peft": (lambda p: peft(p), 2.0),
    "peft-rank": (lambda p: peft(p, 2), 4.0),
    "peft-stabilised": (lambda p: peft(p, use_rslora=True), 4.0),
    "peft-alpha": (lambda p: peft(p, lora_alpha=1, alpha_pattern=dict.fromkeys(TARGETS, 12)), 3.0),
    "peft-rank-pattern": (lambda p: peft(p, 4, r=16, rank_pattern={f"^{name}": 4 for name in TARGETS}), 2.0),
    "diffusers": (lambda p: of_diffusers(p.with_suffix(".safetensors")), 1.0),
    "diffusers-metadata": (
        lambda p: of_diffusers(p.with_suffix(".safetensors"), r=4, lora_alpha=2, target_modules=TARGETS),
        0.5,
    ),
}


def write(path: Path, arrays: Arrays) -> Path:
    save_file(arrays, path)
    return path


MORE: dict[str, tuple[Callable[[Path], Path], float]] = {
    "diffusers-old": (lambda p: write(p, tensors(4, "transformer.", "lora.down.weight", "lora.up.weight")), 1.0),
    "kohya": (lambda p: write(p, underscored(tensors(4, "", "lora_down.weight", "lora_up.weight"))), 0.5),
    "comfyui": (lambda p: write(p, tensors(4, "diffusion_model.", "lora_A.weight", "lora_B.weight")), 1.0),
    "named": (
        lambda p: write(p, tensors(4, "base_model.model.", "lora_A.default.weight", "lora_B.default.weight")),
        1.0,
    ),
    "bare": (lambda p: write(p, tensors(4, "", "lora_A.weight", "lora_B.weight")), 1.0),
    "compiled": (lambda p: write(p, tensors(4, "transformer._orig_mod.", "lora_A.weight", "lora_B.weight")), 1.0),
}


def beyond_rounding(found: Checkpoint, base: Checkpoint, expected: Arrays, factor: float, rank: int = 4) -> float:
    """Largest difference to ``expected`` in parts of what rounding allows: half of the last place of bfloat16, and
    16 roundings of float32 of the terms that are added. Tensors that are not expected to change are the same."""
    worst = 0.0
    for name, entry in base.tensors.items():
        if name not in expected:
            assert found.tensors[name] == entry
            continue
        a, b = factors(rank)[name.removesuffix(".weight")]
        terms = np.abs(entry.array().astype(np.float64)) + abs(factor) * (np.abs(b).astype(np.float64) @ np.abs(a))
        value = found.tensors[name].array().astype(np.float64)
        half = 2.0 ** np.floor(np.log2(np.maximum(np.abs(value), 1e-30))) * 2.0**-8
        worst = max(worst, float(np.max(np.abs(value - expected[name]) / (half + terms * 2.0**-20))))
    return worst


@pytest.mark.parametrize("name", [*LAYOUTS, *MORE])
def test_every_layout_is_the_same_sum(
    tmp_path: Path, checkpoint: Checkpoint, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded, "BLOCK_BYTES", 4 * 64 * 7)  # blocks of a few rows, and one that is not whole
    make, factor = {**LAYOUTS, **MORE}[name]
    path = make(tmp_path / ("a" if name in LAYOUTS else "a.safetensors"))
    found = fold(checkpoint, [read_adapter(f"{path}:0.5", checkpoint)], tmp_path / "out")
    rank = 2 if name == "peft-rank" else 4
    expected = {
        f"{target}.weight": checkpoint.tensors[f"{target}.weight"].array().astype(np.float64)
        + 0.5 * factor * (b.astype(np.float64) @ a.astype(np.float64))
        for target, (a, b) in factors(rank).items()
    }
    assert beyond_rounding(found, checkpoint, expected, 0.5 * factor, rank) <= 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_are_those_of_diffusers(tmp_path: Path, root: Path, checkpoint: Checkpoint, name: str) -> None:
    pytest.importorskip("peft", reason="diffusers adds adapters by PEFT, which is not installed")
    import torch
    from diffusers import Cosmos3OmniTransformer

    path = LAYOUTS[name][0](tmp_path / "a")
    model = Cosmos3OmniTransformer.from_pretrained(root / "transformer", torch_dtype=torch.float32)
    if path.is_dir():
        from peft import PeftModel

        merged = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
        scale = 1.0
    else:
        model.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="transformer", local_files_only=True)
        model.fuse_lora(lora_scale=0.7)
        model.unload_lora()
        merged, scale = model, 0.7
    state = {key: value.double().numpy() for key, value in merged.state_dict().items()}
    found = fold(checkpoint, [read_adapter(f"{path}:{scale}", checkpoint)], tmp_path / "out")
    expected = {f"{target}.weight": state[f"{target}.weight"] for target in TARGETS}
    rank = 2 if name == "peft-rank" else 4
    assert beyond_rounding(found, checkpoint, expected, scale * LAYOUTS[name][1], rank) <= 1
    untouched = [key for key in state if key not in expected]
    assert all(np.array_equal(state[key], checkpoint.tensors[key].array().astype(np.float64)) for key in untouched)


def test_several_adapters_add_up(tmp_path: Path, checkpoint: Checkpoint) -> None:
    first = write(tmp_path / "a.safetensors", tensors(4, "transformer.", "lora_A.weight", "lora_B.weight"))
    other = write(
        tmp_path / "b.safetensors",
        tensors(2, "transformer.", "lora_A.weight", "lora_B.weight", seed=5, targets=TARGETS[:1]),
    )
    adapters = [read_adapter(str(first), checkpoint), read_adapter(f"{other}:-2", checkpoint)]
    found = fold(checkpoint, adapters, tmp_path / "out")
    (a, b), (c, d) = factors(4)[TARGETS[0]], factors(2, 5)[TARGETS[0]]
    name = f"{TARGETS[0]}.weight"
    expected = checkpoint.tensors[name].array().astype(np.float64) + b @ a - 2.0 * (d.astype(np.float64) @ c)
    value = found.tensors[name].array().astype(np.float64)
    np.testing.assert_allclose(value, expected, rtol=2**-8)
    lineage = [json.loads(text) for text in found.folded]
    assert [(one["name"], one["scale"], one["ranks"], one["weights"]) for one in lineage] == [
        ("a.safetensors", 1.0, [4], 4), ("b.safetensors", -2.0, [2], 1)
    ]  # fmt: skip
    assert all(len(one["sha256"]) == 64 for one in lineage)


def test_the_folded_weights_go_with_the_checkpoint(tmp_path: Path, checkpoint: Checkpoint) -> None:
    import gc

    path = LAYOUTS["peft"][0](tmp_path / "a")
    found = fold(checkpoint, [read_adapter(str(path), checkpoint)], tmp_path / "out")
    (place,) = {found.tensors[f"{target}.weight"].file for target in TARGETS}
    assert place.is_file() and place.parent.parent == tmp_path
    del found
    gc.collect()
    assert not place.parent.exists()
    assert fold(checkpoint, [], tmp_path / "out") is checkpoint


def test_an_adapter_beside_the_weights_is_named_once_it_is_used(tmp_path: Path, root: Path) -> None:
    import shutil

    own = tmp_path / "c"
    shutil.copytree(root, own)
    peft(own / "lora")
    opened = open_checkpoint(own)
    assert len(opened.adapters) == 2
    adapter = read_adapter(str(own / "lora"), opened)
    assert left_out(opened, [adapter]) == () and left_out(opened, []) == opened.adapters


def config(**fields: Any) -> Callable[[Path], Path]:
    return lambda p: peft(p / "a", **fields)


def renamed(edit: Callable[[Arrays], Arrays]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return write(folder / "a.safetensors", edit(tensors(4, "transformer.", "lora_A.weight", "lora_B.weight")))

    return make


def added(name: str, shape: tuple[int, ...] = (4, 4)) -> Callable[[Path], Path]:
    return renamed(lambda arrays: {**arrays, name: np.zeros(shape, np.float32)})


def broken(arrays: Arrays) -> Arrays:
    next(iter(arrays.values()))[0, 0] = np.nan
    return arrays


Q = "transformer.layers.0.self_attn.to_q"
REFUSED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "dora": (config(use_dora=True), "CX128", "DoRA"),
    "dora-magnitude": (added(f"{Q}.lora_magnitude_vector"), "CX128", "DoRA"),
    "dora-scale": (added(f"{Q}.dora_scale"), "CX128", "DoRA"),
    "loha": (added(f"{Q}.hada_w1_a"), "CX128", "LoHa"),
    "lokr": (added(f"{Q}.lokr_w1"), "CX128", "LoKr"),
    "lokr-peft": (config(peft_type="LOKR"), "CX128", "LOKR"),
    "oft": (added(f"{Q}.oft_blocks"), "CX128", "OFT"),
    "ia3": (config(peft_type="IA3"), "CX128", "IA3"),
    "embedding": (added("base_model.model.embed_tokens.lora_embedding_A"), "CX128", "embedding"),
    "bias": (config(bias="all"), "CX128", "biases"),
    "lora-bias": (added(f"{Q}.lora_B.bias", (4,)), "CX128", "biases"),
    "modules": (config(modules_to_save=["proj_out"]), "CX128", "whole weights"),
    "difference": (added(f"{Q}.diff"), "CX128", "whole weights"),
    "pissa": (config(init_lora_weights="pissa_niter_16"), "CX128", "base weights"),
    "transposed": (config(fan_in_fan_out=True), "CX128", "transposed"),
    "invoked": (config(alora_invocation_tokens=[1]), "CX128", "aLoRA"),
    "expression": (config(rank_pattern={"layers\\.[0-9]+\\.mlp": 4}), "CX128", "expression"),
    "text-encoder": (added("text_encoder.layers.0.q.lora_A.weight"), "CX128", "text encoder"),
    "other-model": (added("transformer.blocks.0.attn1.to_q.lora_A.weight"), "CX128", "does not have"),
    "other-width": (renamed(lambda a: {k: np.zeros((4, 8), np.float32) for k in a}), "CX128", "the adapter has A"),
    "half": (renamed(lambda a: dict(list(a.items())[1:])), "CX127", "one half"),
    "nothing": (renamed(lambda a: {"epoch": np.zeros(1, np.float32)}), "CX127", "no part of a LoRA"),
    "nan": (renamed(broken), "CX127", "NaN"),
    "rank": (config(r=16), "CX127", "its configuration says 16"),
    "missing": (lambda p: p / "gone", "CX127", "does not exist"),
    "empty": (lambda p: p, "CX127", "no .safetensors file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_a_sum_is_refused(tmp_path: Path, checkpoint: Checkpoint, name: str) -> None:
    make, code, message = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises(UserError) as caught:
        read_adapter(str(path), checkpoint)
    assert caught.value.code == code and message in caught.value.message, caught.value
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.bin", b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "torch.save"),
        ("a.ckpt", b"\x80\x02}", "a pickle"),
        ("a.gguf", b"GGUF\3", "a GGUF file"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ("a.safetensors", b"<!DOCTYPE html>", "an HTML page"),
    ],
)
def test_files_that_are_no_adapter_are_named(
    tmp_path: Path, checkpoint: Checkpoint, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_adapter(str(tmp_path / name), checkpoint)
    assert message in caught.value.message and caught.value.hint


def test_a_quantized_checkpoint_takes_no_adapter(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "c", specs=quantized_specs(TINY), config={"quantization_config": QUANTIZATION})
    with pytest.raises(UserError) as caught:
        read_adapter(str(peft(tmp_path / "a")), open_checkpoint(root))
    assert caught.value.code == "CX128" and "quantized" in caught.value.message and "BF16" in caught.value.hint


def test_a_sum_that_is_not_finite_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    adapter = read_adapter(f"{peft(tmp_path / 'a')}:3e38", checkpoint)
    with pytest.raises(UserError) as caught:
        fold(checkpoint, [adapter], tmp_path / "out")
    assert caught.value.code == "CX128" and "smaller scale" in caught.value.hint


@pytest.mark.parametrize("scale", ["inf", "nan"])
def test_a_scale_is_finite(checkpoint: Checkpoint, scale: str) -> None:
    with pytest.raises(UserError) as caught:
        read_adapter(f"a.safetensors:{scale}", checkpoint)
    assert caught.value.code == "CX127"
