"""Opening a checkpoint: what is accepted, how every tensor is accounted for, and what each wrong input says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_checkpoint import (
    DISTILLED,
    KARRAS,
    QUANTIZATION,
    STEM,
    STEP_POLICY,
    TINY,
    TINY_EDGE,
    VAE,
    quantized_specs,
    transformer_specs,
    weight_file,
    write_checkpoint,
    write_json,
    write_sparse,
)

from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.published import EDGE, NANO, SUPER
from cosmos_export.checkpoint.safetensors_writer import TensorHeader
from cosmos_export.diagnostics import UserError

INDEX = f"{STEM}.safetensors.index.json"


def refuses(path: Path, code: str, *words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint
    return caught.value


def test_single_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    assert checkpoint.geometry == TINY
    assert list(checkpoint.tensors) == list(checkpoint.expected)
    assert checkpoint.variant == "custom"
    assert checkpoint.precision == "bf16"
    assert checkpoint.unused == ()
    assert checkpoint.tensors["norm.weight"].array().shape == (64,)
    names = [str(path.relative_to(tmp_path)) for path in checkpoint.files()]
    assert names == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        f"transformer/{STEM}.safetensors",
    ]


def test_shards_and_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards=3))
    assert len({entry.file for entry in checkpoint.tensors.values()}) == 3
    assert sum(path.name.endswith(".safetensors") for path in checkpoint.files()) == 3
    assert tmp_path / "transformer" / INDEX in checkpoint.files()


def test_the_geometry_builds_the_model_that_the_files_hold(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, TINY_EDGE))
    assert checkpoint.geometry == TINY_EDGE
    assert checkpoint.geometry.family == "edge"
    assert checkpoint.geometry.config["hidden_act"] == "relu2"


def test_hugging_face_cache_of_links(tmp_path: Path) -> None:
    """``snapshots/revision/file`` → ``../../blobs/hash``, one level deeper in component folders."""
    plain = write_checkpoint(tmp_path / "plain", shards=2)
    repository = tmp_path / "hub" / "models--nvidia--Cosmos3-Nano"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for index, file in enumerate(sorted(path for path in plain.rglob("*") if path.is_file())):
        shutil.move(file, repository / "blobs" / f"{index:040x}")
        link = snapshot / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        depth = len(file.relative_to(plain).parts)
        link.symlink_to(Path("../" * (depth + 1)) / "blobs" / f"{index:040x}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.origin.repository == "nvidia/Cosmos3-Nano"
    assert checkpoint.origin.revision == "0123abcd"
    assert all(path.is_relative_to(snapshot) for path in checkpoint.files())
    assert "snapshots" in refuses(repository, "CX105", "is a Hugging Face cache folder").hint
    (repository / "blobs" / f"{0:040x}").unlink()
    assert "download is incomplete" in refuses(snapshot, "CX102", "is a symbolic link to a file that is not").hint


def test_fp8_revision(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, specs=quantized_specs(TINY), config={"quantization_config": QUANTIZATION})
    (root / "transformer" / "modelopt_state.pth").write_bytes(b"\x80\x04cos\nsystem\n")
    with opened_paths() as opened:
        checkpoint = open_checkpoint(root)
    assert not any("modelopt_state" in path for path in opened)
    assert any(path.endswith("scheduler_config.json") for path in opened)
    assert checkpoint.precision == "fp8-modelopt"
    assert checkpoint.quantization is not None and checkpoint.quantization.step_policy is not None
    assert checkpoint.quantization.step_policy.first_steps == 3
    weight = checkpoint.tensors["layers.1.mlp_moe_gen.down_proj.weight"]
    assert (weight.dtype, weight.shape) == ("F8_E4M3", (64, 96))
    assert checkpoint.tensors["layers.1.mlp_moe_gen.down_proj.input_scale"].shape == ()
    assert checkpoint.tensors["proj_in.weight"].name == "vae2llm.weight"
    assert checkpoint.tensors["norm.weight"].name == "model.norm.weight"
    linears = sum(tensor.linear for tensor in checkpoint.expected.values())
    assert len(checkpoint.tensors) == len(checkpoint.expected) + 2 * linears
    assert len(checkpoint.unused) == 3 * linears
    assert {reason for _, reason in checkpoint.unused} == {"calibration leftover; the scales hold the same number"}
    assert [(path.name, why) for path, why in checkpoint.ignored_files] == [
        ("modelopt_state.pth", "may hold pickled objects; never opened")
    ]
    assert root / "transformer" / "modelopt_state.pth" not in checkpoint.files()


_listeners: list[list[str]] = []


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for paths in _listeners:
            paths.append(str(arguments[0]))


@contextmanager
def opened_paths() -> Iterator[list[str]]:
    """Every path the interpreter opens inside the block. An audit hook stays for good, so there is one."""
    if not hasattr(sys, "_cosmos_export_audit"):
        sys.addaudithook(_note_opened)
        sys._cosmos_export_audit = True  # type: ignore[attr-defined]
    _listeners.append([])
    try:
        yield _listeners[-1]
    finally:
        _listeners.pop()


def test_a_second_name_for_the_same_bytes_is_unused_and_for_others_an_error(tmp_path: Path) -> None:
    copy = TensorHeader("vae2llm.weight", "BF16", (64, 16))
    root = write_checkpoint(tmp_path, edit=lambda specs: [*specs, copy])
    checkpoint = open_checkpoint(root)
    assert checkpoint.tensors["proj_in.weight"].name == "proj_in.weight"
    assert checkpoint.unused == (("vae2llm.weight", "identical copy of proj_in.weight"),)
    with weight_file(root).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    refuses(root, "CX114", "proj_in.weight and vae2llm.weight are the same tensor under two names")


def test_heads_that_are_turned_off(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, replace(TINY, sound_gen=False, sound_dim=None), specs=transformer_specs(TINY))
    checkpoint = open_checkpoint(root)
    assert len(checkpoint.unused) == 5
    assert all("sound_gen is false" in reason for _, reason in checkpoint.unused)


def test_precision(tmp_path: Path) -> None:
    def wide_time(specs: list[TensorHeader]) -> list[TensorHeader]:
        return [replace(spec, dtype="F32") if spec.name.startswith("time_embedder") else spec for spec in specs]

    def wide_norms(specs: list[TensorHeader]) -> list[TensorHeader]:
        return [replace(spec, dtype="F32") if "norm" in spec.name else spec for spec in specs]

    assert open_checkpoint(write_checkpoint(tmp_path / "a", edit=wide_time)).precision == "bf16"
    assert open_checkpoint(write_checkpoint(tmp_path / "b", edit=wide_norms)).precision == "mixed"
    single = write_checkpoint(tmp_path / "c", specs=transformer_specs(TINY, "F32"))
    assert open_checkpoint(single).precision == "fp32"


def test_strays_beside_the_weights_are_listed(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, shards=2)
    write_sparse(root / "transformer" / f"{STEM}.safetensors", [])
    (root / "transformer" / f"{STEM}.bin").write_bytes(b"")
    ignored = {path.name: why for path, why in open_checkpoint(root).ignored_files}
    assert ignored == {
        f"{STEM}.safetensors": "not named by the index",
        f"{STEM}.bin": "may hold pickled objects; never opened",
    }


# Variants


def test_variant_by_contents_and_by_name(tmp_path: Path) -> None:
    def variant(folder: str, *edits: Callable[[Path], object], **options: Any) -> str:
        root = tmp_path / folder
        write_checkpoint(root, **options)
        for edit in edits:
            edit(root)
        return open_checkpoint(root).variant

    def policy(root: Path) -> None:
        write_json(root / "checkpoint.json", {"policy": {"domain_name": "droid_lerobot", "raw_action_dim": 8}})

    def distilled(root: Path) -> None:
        t_list = DISTILLED["fixed_step_sampler_config"]["t_list"]  # type: ignore[index]
        write_json(root / "modular_model_index.json", {"is_distilled": True, "distilled_sigmas": t_list})

    assert variant("a/b", geometry=NANO) == "nano"
    assert variant("a/Cosmos3-Super", geometry=NANO) == "nano"
    assert variant("a/c", policy, geometry=NANO) == "nano-policy-droid"
    assert variant("a/d", geometry=EDGE) == "edge"
    assert variant("b/Cosmos3-Super-Text2Image", geometry=SUPER) == "super-text2image"
    assert variant("a/cosmos3-super-text2image-4step", distilled, geometry=SUPER, scheduler=DISTILLED) == (
        "super-text2image-4step"
    )
    assert variant("b/Cosmos3-Super-Text2Image-4Step", geometry=SUPER) == "super"
    assert variant("a/e", distilled, geometry=SUPER, scheduler=DISTILLED) == "super-4step"
    assert variant("a/f", geometry=replace(SUPER, base_fps=16)) == "super-image2video"
    assert variant("a/g") == "custom"


def test_policy_and_sigmas_are_exposed(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, scheduler=DISTILLED)
    write_json(root / "checkpoint.json", {"policy": {"domain_name": "droid_lerobot"}})
    checkpoint = open_checkpoint(root)
    assert checkpoint.distilled_sigmas == (1.0, 0.9375, 0.8333333333333334, 0.625)
    assert checkpoint.policy == {"domain_name": "droid_lerobot"}
    assert root / "checkpoint.json" in checkpoint.files()


def test_schedules_must_agree(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, scheduler=DISTILLED)
    index = {"is_distilled": True, "distilled_sigmas": [1.0, 0.5]}
    write_json(root / "modular_model_index.json", index)
    refuses(root, "CX103", "two schedules for one distilled model")
    write_json(root / "modular_model_index.json", index | {"distilled_sigmas": [0.5, 0.9]})
    refuses(root, "CX103", "not numbers falling")
    write_json(root / "scheduler" / "scheduler_config.json", KARRAS)
    write_json(root / "modular_model_index.json", {"is_distilled": True})
    refuses(root, "CX103", "no file gives the distilled sigmas")


# What is not a checkpoint


def test_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hf download nvidia/Cosmos3-Nano" in refuses(Path("nvidia/Cosmos3-Nano"), "CX105", "does not exist").hint
    refuses(tmp_path / "none", "CX105", "does not exist")
    file = tmp_path / "file"
    file.write_text("x")
    refuses(file, "CX105", "is not a directory")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "CX105", "is an empty folder")
    root = write_checkpoint(tmp_path / "real")
    assert str(root) in refuses(root / "transformer", "CX105", "is one component of a checkpoint").hint


def test_what_the_system_refuses_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions, which root does not notice, and names that no file system has."""
    refuses(tmp_path / ("long" * 100), "CX105", "cannot read ", "File name too long")

    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    root = write_checkpoint(tmp_path / "x")
    monkeypatch.setattr(Path, "iterdir", denied)
    assert "permissions" in refuses(root, "CX105", "x: Permission denied").hint


def test_missing_files(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path)
    (root / "transformer" / "config.json").unlink()
    refuses(root, "CX102", "config.json is missing")
    root = write_checkpoint(tmp_path)
    weight_file(root).unlink()
    refuses(root, "CX110", f"neither {STEM}.safetensors nor its index")
    (root / "transformer" / "model.bin").write_bytes(b"")
    assert "convert" in refuses(root, "CX110", "model.bin may be pickled").hint
    write_sparse(root / "transformer" / f"{STEM}.fp16.safetensors", [])
    refuses(root, "CX110", f"it has {STEM}.fp16.safetensors")


def test_missing_component(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path)
    write_json(root / "model_index.json", {"vae": ["diffusers", "AutoencoderKLWan"]})
    refuses(root, "CX102", "has no vae/ folder", "'AutoencoderKLWan'")
    root = write_checkpoint(tmp_path)
    shutil.rmtree(root / "scheduler")
    write_json(root / "model_index.json", {})
    refuses(root, "CX102", "no scheduler/ folder")


def test_bad_json(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path)
    config = root / "transformer" / "config.json"
    for text, words in (
        ("{", "not valid JSON"),
        ("[1]", "the top level is list"),
        ('{"hidden_size": 64, "hidden_size": 128}', "duplicate key 'hidden_size'"),
        ('{"rope_theta": Infinity}', "'Infinity' is not a finite number"),
        ('{"rope_theta": 1e999}', "'1e999' is not a finite number"),
    ):
        config.write_text(text)
        refuses(root, "CX101", "config.json", words)


def test_unknown_scheduler(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, scheduler={"_class_name": "DDPMScheduler"})
    refuses(root, "CX104", "scheduler 'DDPMScheduler' is not supported", "UniPCMultistepScheduler")


# Shards


def edit_index(root: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = root / "transformer" / INDEX
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, shards=3)
    (root / "transformer" / f"{STEM}-00002-of-00003.safetensors").unlink()
    refuses(root, "CX110", f"names {STEM}-00002-of-00003.safetensors, which is not in", "tensors)")


def test_truncated_shard(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, shards=2)
    shard = root / "transformer" / f"{STEM}-00002-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 7)
    refuses(root, "CX111", "00002-of-00002.safetensors is truncated")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, shards=2)
    second = root / "transformer" / f"{STEM}-00002-of-00002.safetensors"
    specs = transformer_specs(TINY)
    write_sparse(second, [*specs[(len(specs) + 1) // 2 :], specs[0]])
    refuses(root, "CX114", f"embed_tokens.weight is in {STEM}-00001-of-00002.safetensors and again in")


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, shards=2)
    edit_index(root, lambda names: names.update({"norm.weight": f"{STEM}-00001-of-00002.safetensors"}))
    refuses(root, "CX116", "says 'norm.weight' is in", "but it is in")
    write_checkpoint(tmp_path, shards=2)
    edit_index(root, lambda names: names.update({"ghost": f"{STEM}-00001-of-00002.safetensors"}))
    refuses(root, "CX116", "says 'ghost' is in", "but no shard has it")
    write_checkpoint(tmp_path, shards=2)
    edit_index(root, lambda names: names.pop("norm.weight"))
    refuses(root, "CX116", "holds 'norm.weight', which", "does not list")


@pytest.mark.parametrize("file", ["../vae/x.safetensors", "/etc/x.safetensors", "x.pth", "a\\b.safetensors", 7, ""])
def test_index_that_leaves_its_folder(tmp_path: Path, file: object) -> None:
    root = write_checkpoint(tmp_path, shards=2)
    edit_index(root, lambda names: names.update({"norm.weight": file}))  # type: ignore[dict-item]
    refuses(root, "CX117", "sends 'norm.weight' to")


@pytest.mark.parametrize("value", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_index_without_a_map(tmp_path: Path, value: object) -> None:
    root = write_checkpoint(tmp_path, shards=2)
    write_json(root / "transformer" / INDEX, value)
    refuses(root, "CX117", "has no weight_map")


def test_damage_in_another_component_is_found_too(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path)
    vae = write_sparse(root / "vae" / f"{STEM}.safetensors", [TensorHeader("w", "F32", (8,))])
    write_json(root / "vae/config.json", VAE)
    assert open_checkpoint(root).component_tensors["vae"]["w"].shape == (8,)
    vae.write_bytes(vae.read_bytes()[:-1])
    refuses(root, "CX111", "vae", "is truncated")


# Tensors


def test_missing_tensors(tmp_path: Path) -> None:
    gone = {"norm_moe_gen.weight", "layers.1.self_attn.to_add_out.weight"}
    root = write_checkpoint(tmp_path, edit=lambda specs: [spec for spec in specs if spec.name not in gone])
    refuses(root, "CX120", "2 tensors of the model missing from transformer/", *gone)


def test_a_layer_too_few_names_five_and_counts_the_rest(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, config={"num_hidden_layers": 3})
    refuses(root, "CX120", "layers.2.input_layernorm.weight", "and 17 more")


def test_unexpected_tensors(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, config={"num_hidden_layers": 1})
    refuses(root, "CX121", "tensors in transformer/ that the model does not have: layers.1.")
    stray = TensorHeader("layers.0.self_attn.to_q.weight_quantizer._pre_quant_scale", "F32", (64,))
    refuses(write_checkpoint(tmp_path, edit=lambda specs: [*specs, stray]), "CX121", "_pre_quant_scale")


def test_wrong_shape(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path, config={"intermediate_size": 128})
    refuses(root, "CX122", "has the shape [96, 64]; the configuration needs [128, 64]")


def test_wrong_type(tmp_path: Path) -> None:
    def change(name: str, dtype: str) -> Callable[[list[TensorHeader]], list[TensorHeader]]:
        return lambda specs: [replace(spec, dtype=dtype) if spec.name == name else spec for spec in specs]

    refuses(write_checkpoint(tmp_path, edit=change("norm.weight", "F8_E4M3")), "CX123", "type F8_E4M3", "BF16")
    linear = "layers.0.mlp.up_proj.weight"
    refuses(write_checkpoint(tmp_path, edit=change(linear, "I8")), "CX123", "type I8", "F8_E4M3")


# FP8


def fp8(root: Path, edit: Callable[[list[TensorHeader]], list[TensorHeader]], **quantization: Any) -> Path:
    config = {"quantization_config": {**QUANTIZATION, **quantization}}
    return write_checkpoint(root, specs=quantized_specs(TINY), edit=edit, config=config)


def test_fp8_without_its_scales(tmp_path: Path) -> None:
    scale = "layers.0.mlp.up_proj.input_scale"

    def without(specs: list[TensorHeader]) -> list[TensorHeader]:
        return [spec for spec in specs if spec.name != scale]

    refuses(fp8(tmp_path, without), "CX124", "layers.0.mlp.up_proj.weight is FP8 but has no input_scale")

    def wide(specs: list[TensorHeader]) -> list[TensorHeader]:
        return [replace(spec, shape=(96,)) if spec.name == scale else spec for spec in specs]

    refuses(fp8(tmp_path, wide), "CX124", f"{scale} is F32 [96]; the published layout has one F32 number")

    def weight_scales_only(specs: list[TensorHeader]) -> list[TensorHeader]:
        return [spec for spec in specs if not spec.name.endswith("input_scale")]

    assert open_checkpoint(fp8(tmp_path, weight_scales_only, weight_only=True)).precision == "fp8-modelopt"


def test_fp8_weights_and_configuration_must_agree(tmp_path: Path) -> None:
    refuses(write_checkpoint(tmp_path, specs=quantized_specs(TINY)), "CX124", "has no quantization_config")
    plain = write_checkpoint(tmp_path, config={"quantization_config": QUANTIZATION})
    refuses(plain, "CX124", "the configuration says FP8, but no weight is")


def policies() -> Iterator[tuple[dict[str, Any], str]]:
    yield STEP_POLICY | {"schema_version": 2}, "schema_version = 2"
    yield STEP_POLICY | {"scope": ["transformer", "vae"]}, "scope = "
    yield STEP_POLICY | {"reasoner": "a8"}, "reasoner = 'a8'"
    yield STEP_POLICY | {"surprise": 1}, "unknown ['surprise']"
    yield {key: value for key, value in STEP_POLICY.items() if key != "overlap"}, "lacks ['overlap']"
    yield STEP_POLICY | {"first_steps": {"count": -1, "mode": "a16"}}, "count = -1"
    yield STEP_POLICY | {"last_steps": {"count": 3, "mode": "a8"}}, "last_steps = "


@pytest.mark.parametrize(("policy", "words"), policies(), ids=lambda value: value if isinstance(value, str) else "")
def test_step_policy_fails_closed(tmp_path: Path, policy: dict[str, Any], words: str) -> None:
    root = fp8(tmp_path, lambda specs: specs, runtime={"diffusion_step_policy": policy})
    refuses(root, "CX124", "diffusion_step_policy", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized with bitsandbytes"),
        ({"quant_algo": "NVFP4"}, "quantized to NVFP4 by ModelOpt"),
        ({"weight_only": 1}, "weight_only = 1"),
        ({"ignore": "lm_head"}, "ignore is not a list"),
        ({"runtime": []}, "runtime = []"),
    ],
)
def test_other_quantizations_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    refuses(fp8(tmp_path, lambda specs: specs, **change), "CX124", words)


def test_without_a_step_policy(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(fp8(tmp_path, lambda specs: specs, runtime=None))
    assert checkpoint.quantization is not None and checkpoint.quantization.step_policy is None


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    from cosmos_export.checkpoint.random_weights import produce
    from cosmos_export.checkpoint.safetensors_writer import write_shards

    root = write_checkpoint(tmp_path)
    write_shards(root / "transformer", STEM, transformer_specs(TINY), produce(7), 1 << 40)
    array = open_checkpoint(root).tensors["proj_in.bias"].array()
    wanted = b"".join(bytes(piece) for piece in produce(7)(TensorHeader("proj_in.bias", "BF16", (64,))))
    assert array.tobytes() == wanted
    assert np.ptp(array.astype(np.float32)) > 0.1
