"""Every configuration of a checkpoint is checked before a library sees it: types, ranges, and what must agree."""

from __future__ import annotations

import errno
import inspect
import json
import os
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoint import (
    DISTILLED,
    KARRAS,
    SOUND_TOKENIZER,
    STEM,
    TINY,
    VAE,
    quantized_specs,
    weight_file,
    write_checkpoint,
    write_json,
    write_sparse,
)

from cosmos_export.checkpoint import codec_configs as codecs
from cosmos_export.checkpoint import open_checkpoint, scheduler_config
from cosmos_export.checkpoint.config_fields import REQUIRED, Fields
from cosmos_export.checkpoint.published import PUBLISHED
from cosmos_export.checkpoint.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS
from cosmos_export.checkpoint.safetensors_writer import TensorHeader, encode_header
from cosmos_export.checkpoint.strict_json import MAX_JSON_VALUES
from cosmos_export.diagnostics import UserError
from cosmos_export.sampling import CheckpointSampling, resolve_schedule

WRONG: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e9, 10**9, 10**5, 10**400, "2", "", "x" * 5000, [], [[]], [1], ["a"],
    [None], [10**9] * 4, [1.0] * 4, [True] * 4, [[1]] * 4, {}, {"type": "vae"}, {"type": 3},
]  # fmt: skip


def checkpoint(root: Path, **files: Mapping[str, Any]) -> Path:
    """A checkpoint of headers with both codecs; ``files`` by component replace what its configuration says."""
    write_checkpoint(root, scheduler=files.get("scheduler", KARRAS))
    for folder, config in (("vae", VAE), ("sound_tokenizer", SOUND_TOKENIZER)):
        write_sparse(root / folder / f"{STEM}.safetensors", [TensorHeader("w", "F32", (8,))])
        write_json(root / folder / "config.json", files.get(folder, config))
    return root


def refusal(root: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        open_checkpoint(root)
    assert caught.value.hint
    return caught.value


def test_the_published_values_are_accepted_and_defaults_filled_in(tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint(tmp_path))
    assert opened.codec_configs["vae"] == VAE
    assert opened.codec_configs["sound_tokenizer"]["enc_n_fft"] == 64


@pytest.mark.parametrize(
    ("folder", "change", "code", "words"),
    [
        ("vae", {"num_res_blocks": 10**5}, "CX103", "num_res_blocks = 100000; allowed: a whole number from 1 to 16"),
        ("vae", {"base_dim": "8"}, "CX103", "base_dim = '8'"),
        ("vae", {"base_dim": True}, "CX103", "base_dim = True"),
        ("vae", {"dim_mult": [1, 2, 4]}, "CX103", "a list of 4 to 4 values"),
        ("vae", {"base_dim": 16_000, "dim_mult": [1, 1, 1, 64]}, "CX103", "1,024,000 channels; allowed: 131,072"),
        ("vae", {"latents_mean": [0.0]}, "CX103", "latents_mean has 1 values, and there are 4 latent channels"),
        ("vae", {"latents_std": [1, 0, 1, 1]}, "CX103", "latents_std"),
        ("vae", {"latents_mean": ...}, "CX103", "latents_mean is missing"),
        ("vae", {"is_residual": ...}, "CX104", "is_residual is missing; this compiler knows True"),
        ("vae", {"patch_size": 4}, "CX104", "patch_size = 4, which is not supported; this compiler knows 2"),
        ("vae", {"patch_size": 2.0}, "CX104", "patch_size = 2.0"),
        ("vae", {"scale_factor_temporal": 8}, "CX104", "scale_factor_temporal = 8"),
        ("vae", {"temperal_downsample": [0, 1, 1]}, "CX104", "temperal_downsample"),
        ("vae", {"_class_name": ["os", "system"]}, "CX104", "_class_name"),
        ("vae", {"_use_default_values": ["z_dim"]}, "CX104", "_use_default_values"),
        ("vae", {"quantization_config": {"quant_method": "bitsandbytes"}}, "CX104", "quantization_config"),
        ("sound_tokenizer", {"dec_type": "other"}, "CX104", "dec_type = 'other'"),
        ("sound_tokenizer", {"bottleneck": {"type": "l1"}}, "CX103", "bottleneck"),
        ("sound_tokenizer", {"dec_strides": [2, 4, 5, 6]}, "CX103", "dec_strides has 4 values and dec_c_mults has 5"),
        ("sound_tokenizer", {"dec_strides": [64] * 5}, "CX103", "allowed: 1,000,000 samples per latent"),
        ("sound_tokenizer", {"hop_size": 960}, "CX103", "hop_size is 960, and the product of dec_strides is 1,920"),
        ("sound_tokenizer", {"enc_strides": [4, 5, 5]}, "CX103", "the encoder has 1,600 samples per latent"),
        ("sound_tokenizer", {"enc_latent_dim": 8}, "CX103", "not twice vocoder_input_dim = 16"),
        ("scheduler", {"sigma_max": [200.0]}, "CX103", "sigma_max = [200.0]"),
        ("scheduler", {"num_train_timesteps": 10**9}, "CX103", "num_train_timesteps"),
        ("scheduler", {"solver_order": 2.0}, "CX103", "solver_order = 2.0"),
        ("scheduler", {"use_karras_sigmas": "true"}, "CX103", "use_karras_sigmas = 'true'"),
        ("scheduler", {"beta_schedule": "cubic"}, "CX104", "beta_schedule = 'cubic'"),
        ("scheduler", {"_class_name": ["UniPCMultistepScheduler"]}, "CX104", "scheduler"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(
    tmp_path: Path, folder: str, change: dict[str, Any], code: str, words: str
) -> None:
    base = {"vae": VAE, "sound_tokenizer": SOUND_TOKENIZER, "scheduler": KARRAS}[folder]
    changed = {key: value for key, value in {**base, **change}.items() if value is not ...}
    error = refusal(checkpoint(tmp_path, **{folder: changed}))
    assert error.code == code
    assert words in error.message
    assert folder in error.message


def test_a_codec_without_a_configuration_is_an_incomplete_download(tmp_path: Path) -> None:
    root = checkpoint(tmp_path)
    (root / "vae/config.json").unlink()
    assert refusal(root).code == "CX102"


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("model_index.json", {"use_native_flow_schedule": "no"}, "use_native_flow_schedule = 'no'"),
        ("model_index.json", {"default_use_system_prompt": 1}, "default_use_system_prompt = 1"),
        ("modular_model_index.json", {"is_distilled": "yes"}, "is_distilled = 'yes'"),
        ("checkpoint.json", {"policy": {"domain_name": 3}}, "domain_name = 3 is no str"),
        ("config.json", {"text_config": {"max_position_embeddings": -1}}, "max_position_embeddings = -1"),
        ("config.json", {"text_config": {"max_position_embeddings": 10**30}}, "max_position_embeddings"),
    ],
)
def test_files_beside_the_components_are_checked_too(
    tmp_path: Path, file: str, value: dict[str, Any], words: str
) -> None:
    root = checkpoint(tmp_path)
    old = json.loads((root / file).read_text()) if (root / file).exists() else {}
    write_json(root / file, old | value)
    error = refusal(root)
    assert error.code == "CX103"
    assert words in error.message


@pytest.mark.parametrize("size", [3, 4, 512])
def test_patches_that_are_not_captured_are_refused_at_once(tmp_path: Path, size: int) -> None:
    wide = {"latent_patch_size": size, "patch_latent_dim": TINY.latent_channel * size**2}
    error = refusal(write_checkpoint(tmp_path, config=wide))
    assert error.code == "CX104"
    assert f"latent_patch_size = {size} is not supported; this compiler knows 1 or 2" in error.message


# Tables against the libraries: every value that a table accepts, the class takes.


def _vae(config: Mapping[str, Any]) -> None:
    from cosmos_export.capture.codec import empty_video_autoencoder

    empty_video_autoencoder(config)


def _sound(config: Mapping[str, Any]) -> None:
    import torch
    from diffusers import Cosmos3AVAEAudioTokenizer

    with torch.device("meta"):
        Cosmos3AVAEAudioTokenizer.from_config(dict(config))


def _scheduler(config: Mapping[str, Any]) -> None:
    import diffusers

    fixed = (1.0, 0.5) if config["_class_name"].startswith("FlowMatch") else None
    try:
        resolve_schedule(CheckpointSampling(config, distilled_sigmas=fixed), "t2v")
    except UserError as error:  # the values that are compiled are looked at with the request
        assert error.code in ("CX461", "CX462")
        return
    getattr(diffusers, config["_class_name"]).from_config(dict(config))


TABLES: list[tuple[str, Fields, dict[str, Any], Callable[[Mapping[str, Any]], None]]] = [
    ("vae", codecs.VAE, VAE, _vae),
    ("sound_tokenizer", codecs.SOUND_TOKENIZER, SOUND_TOKENIZER, _sound),
    ("scheduler", scheduler_config.SCHEDULERS["UniPCMultistepScheduler"], KARRAS, _scheduler),
    ("scheduler", scheduler_config.SCHEDULERS["FlowMatchEulerDiscreteScheduler"], DISTILLED, _scheduler),
]
IDS = ["vae", "sound", "unipc", "euler"]


@pytest.mark.parametrize("case", TABLES, ids=IDS)
def test_tables_have_the_fields_and_defaults_of_the_classes(case: Any) -> None:
    import diffusers

    _, fields, base, _ = case
    signature = inspect.signature(getattr(diffusers, base["_class_name"]).__init__)
    stated = {name: value.default for name, value in signature.parameters.items() if name != "self"}
    own = {name: kind.default for name, kind in fields.items() if not name.startswith("_")}
    own.pop("quantization_config", None)
    assert own.keys() == stated.keys()
    assert {name: value for name, value in own.items() if value is not REQUIRED} == {
        name: stated[name] for name in own if own[name] is not REQUIRED
    }


@pytest.mark.parametrize("case", TABLES, ids=IDS)
def test_no_value_that_is_accepted_ends_in_an_error_of_the_library(tmp_path: Path, case: Any) -> None:
    """Whatever the component's own reader accepts is opened as a checkpoint, and one value of each field it refuses."""
    folder, fields, base, build = case
    root = checkpoint(tmp_path)
    path = root / folder / ("scheduler_config.json" if folder == "scheduler" else "config.json")

    def read_alone() -> Mapping[str, Any]:
        if folder == "scheduler":
            return scheduler_config.read_scheduler(root / folder)
        return codecs.read_codec_configs({folder: root / folder})[folder]

    def opened() -> Mapping[str, Any]:
        found = open_checkpoint(root)
        return found.scheduler if folder == "scheduler" else found.codec_configs[folder]

    def refusal_of(read: Callable[[], Mapping[str, Any]]) -> UserError | None:
        try:
            read()
        except UserError as error:
            assert error.code in ("CX101", "CX103", "CX104"), (name, value)
            return error
        return None

    accepted: dict[str, Any] = {}
    refused = 0
    for name in fields:
        by_field = 0
        for value in WRONG:
            write_json(path, base | {name: value})
            error = refusal_of(read_alone)
            if error is None or not by_field:  # the whole checkpoint takes longer, and refuses in the same place
                whole = refusal_of(opened)
                assert error is None or (whole is not None and whole.message == error.message)
                error = whole
            if error is not None:
                refused, by_field = refused + 1, by_field + 1
            elif repr(value) != repr(base.get(name)):
                accepted[name] = opened()
    for config in accepted.values():
        build(config)
    assert accepted and refused > 10 * len(fields)


# Sizes


def test_the_largest_published_header_is_far_below_the_limits() -> None:
    specs = quantized_specs(PUBLISHED["super"])
    header = encode_header(specs)
    values = sum(header.count(character) for character in (b",", b"[", b"{"))
    assert 4 * len(header) < MAX_HEADER_BYTES
    assert 4 * len(specs) < MAX_TENSORS
    assert 4 * values < MAX_JSON_VALUES


def _many_values(root: Path) -> None:
    write_json(root / "vae/config.json", VAE | {"x": [[]] * 600_000})


def _many_bytes(root: Path) -> None:
    (root / "scheduler/scheduler_config.json").write_text(json.dumps(KARRAS) + " " * (16 << 20))


def _long_header(root: Path) -> None:
    weight_file(root).write_bytes((9 << 20).to_bytes(8, "little") + b"{" + b"[]," * (3 << 20))


def _full_header(root: Path) -> None:
    text = b'{"x":[' + b"[]," * 1_100_000 + b"[]]}"
    weight_file(root).write_bytes(len(text).to_bytes(8, "little") + text)


def _many_tensors(root: Path) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(i): entry for i in range(MAX_TENSORS + 1)}).encode()
    weight_file(root).write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (_many_values, "CX101", "allowed: 1,000,000"),
        (_many_bytes, "CX101", "allowed: 16,777,216"),
        (_long_header, "CX112", "more than the 8,388,608 allowed"),
        (_full_header, "CX112", "allowed: 1,000,000"),
        (_many_tensors, "CX112", "it has 50,001 tensors; allowed: 50,000"),
    ],
)
def test_what_would_fill_the_memory_is_refused_before_it_is_parsed(
    tmp_path: Path, damage: Callable[[Path], None], code: str, words: str
) -> None:
    root = checkpoint(tmp_path)
    damage(root)
    tracemalloc.start()
    error = refusal(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (error.code, words in error.message) == (code, True), error
    assert peak < 128 << 20


# Files that are none


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("put", [_pipe, _zeros, _loop, _directory])
def test_no_file_of_a_checkpoint_is_waited_for(tmp_path: Path, put: Callable[[Path], None]) -> None:
    root = checkpoint(tmp_path)
    write_json(root / "config.json", {})
    write_json(root / "text_tokenizer/special_tokens_map.json", {})
    found = sorted(path for path in root.rglob("*") if path.is_file())
    assert len(found) == 10
    for path in found:
        kept = path.read_bytes()
        path.unlink()
        put(path)
        optional = put is _directory and path.name == "special_tokens_map.json"
        if optional:
            open_checkpoint(root)
        else:
            assert refusal(root).code in ("CX101", "CX102", "CX110", "CX117"), path
        path.rmdir() if put is _directory else path.unlink()
        path.write_bytes(kept)
    open_checkpoint(root)


def test_a_name_that_no_disk_takes_and_a_closed_directory_are_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkpoint(tmp_path)
    long = "é" * 200 + ".safetensors"  # 411 bytes, fewer characters than a name may have bytes
    write_json(root / "transformer" / f"{STEM}.safetensors.index.json", {"weight_map": {"x": long}})
    assert refusal(root).code == "CX117"
    (root / "transformer" / f"{STEM}.safetensors.index.json").unlink()

    def closed(folder: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "is_dir", closed)
    error = refusal(root)
    assert error.code == "CX105"
    assert error.message.endswith(": Permission denied")
