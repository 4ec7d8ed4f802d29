"""What is brought in the place of a checkpoint, or of a file in it, is named, and the command that helps with it."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_checkpoint import STEM, write_checkpoint, write_json
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cosmos_export import kinds
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.safetensors_writer import TensorHeader
from cosmos_export.cli import app
from cosmos_export.diagnostics import CosmosExportError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 4970000000\n" % (b"a" * 64)
HTML = b"<!DOCTYPE html>\n<html class=''><head><title>Access denied</title></head></html>"
FILES: dict[str, tuple[bytes, str, str]] = {
    "lfs": (LFS, "a Git LFS pointer of a file of 4,970.0 MB", "git lfs pull"),
    "xet": (b"# xet version 0\nfilesize = 12\nhash = 'ab'\n", "a Xet pointer", "hf download"),
    "annex": (b"/annex/objects/SHA256E-s12--ab.bin\n", "a git-annex pointer", "git annex get"),
    "dvc": (b"outs:\n- md5: 0123\n  path: x\n", "a DVC pointer", "dvc pull"),
    "html": (HTML, "an HTML page", "hf auth login"),
    "html-lower": (b"\n  <html><body>Sign in</body></html>", "an HTML page", "hf auth login"),
    "s3": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML error message", "hf auth login"),
    "json-error": (b'{"error":"Repository not found"}', "a JSON error message", "hf auth login"),
    "hub-text": (b"Access to model nvidia/Cosmos3-Nano is restricted. You must log in", "error message", "hf auth"),
    "entry": (b"Entry not found", "an error message of a server", "hf auth login"),
    "link": (b"../../blobs/0123abcd", "the text of a symbolic link", "cp -rL"),
    "empty": (b"", "an empty file", "download the file itself"),
    "zeros": (bytes(5000), "zeros from its first byte on", "download the file itself"),
    "crypt": (b"\0GITCRYPT\0abc", "encrypted by git-crypt", "git-crypt unlock"),
    "apple": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "an AppleDouble file", "find"),
}
CONTAINERS: dict[str, tuple[bytes, str]] = {
    "gguf": (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
    "pickle": (pickle.dumps({"a": 1}, 2), "a pickle"),
    "gzip": (b"\x1f\x8b\x08\0abc", "compressed with gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd000", "compressed with zstd"),
    "xz": (b"\xfd7zXZ\0abc", "compressed with xz"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n00", "an HDF5 file"),
    "npy": (b"\x93NUMPY\x01\0v\0{'descr': '<f4'}", "a NumPy array"),
    "parquet": (b"PAR1\x15\x04", "a Parquet file"),
    "png": (b"\x89PNG\r\n\x1a\n000", "a PNG picture"),
    "mp4": (b"\0\0\0\x20ftypisom000", "an MP4 clip"),
    "pdf": (b"%PDF-1.7\n000000", "a PDF document"),
    "engine": (b"ftrt\0\0\0\0aaaa", "a TensorRT engine"),
    "onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x05", "an ONNX model"),
}


def refused(call: Callable[[], object]) -> CosmosExportError:
    with pytest.raises(CosmosExportError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [f"transformer/{STEM}.safetensors", "text_tokenizer/tokenizer.json"])
def test_what_is_in_the_place_of_a_file_is_named_where_it_is(tmp_path: Path, name: str, place: str) -> None:
    data, what, hint = FILES[name]
    root = write_checkpoint(tmp_path / "c")
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).write_bytes(data)
    error = refused(lambda: open_checkpoint(root))
    assert what in error.message and Path(place).name in error.message
    assert hint in error.hint and "damaged" not in error.hint
    assert error.code == ("CX134" if place.endswith("json") else "CX112")


@pytest.mark.parametrize("name", CONTAINERS)
def test_other_formats_are_named(tmp_path: Path, name: str) -> None:
    data, what = CONTAINERS[name]
    root = write_checkpoint(tmp_path / "c")
    (root / f"transformer/{STEM}.safetensors").write_bytes(data)
    error = refused(lambda: open_checkpoint(root))
    assert error.code == "CX112" and what in error.message and error.hint
    alone = tmp_path / "alone"
    alone.write_bytes(data)
    assert what in refused(lambda: open_checkpoint(alone)).message


def test_files_of_torch_and_numpy_are_told_apart(tmp_path: Path) -> None:
    for inner, what in (("archive/data.pkl", "torch.save"), ("a.npy", ".npz"), ("readme.txt", "a ZIP archive")):
        with zipfile.ZipFile(tmp_path / "x", "w") as archive:
            archive.writestr(inner, b"")
        kind = kinds.of_file(tmp_path / "x")
        assert kind is not None and what in kind.what


ORDINARY = (
    b'{"error_margin": 1}', b"Not found in nature, a blue rose grows on a rock.\nA second prompt.", b"A robot waves.",
    b"Forbidden city at dawn, seen from a drone.", b'{"a": 1}', b"BM is a car maker", b"<think>a</think>",
    b'{"message": "a friendly wave", "detail": "slow"}', b"0", b"[]", b"../assets/cup.png is on the table",
)  # fmt: skip


@pytest.mark.parametrize("data", ORDINARY)
def test_ordinary_text_is_nothing_else(data: bytes) -> None:
    assert kinds.of_bytes(data, Path("x")) is None


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark", "sed -i"),
        ("\ufeff{}".encode("utf-16-le"), "UTF-16", "iconv"),
        (LFS, "Git LFS pointer", "git lfs pull"),
        (HTML, "HTML page", "hf auth login"),
        (b"", "an empty file", "download"),
        (b"\x1f\x8b\x08", "gzip", "gunzip"),
    ],
)
@pytest.mark.parametrize("place", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_configurations_too(tmp_path: Path, data: bytes, what: str, hint: str, place: str) -> None:
    root = write_checkpoint(tmp_path / "c")
    (root / place).write_bytes(data)
    error = refused(lambda: open_checkpoint(root))
    assert what in error.message and hint in error.hint and Path(place).name in error.message


def test_the_download_is_named_as_exactly_as_the_place_tells(tmp_path: Path) -> None:
    clone = tmp_path / "my clone"
    (clone / ".git").mkdir(parents=True)
    assert kinds.fetch(clone / "transformer/a.safetensors") == f"`git -C '{clone}' lfs pull`"
    cached = tmp_path / "models--nvidia--Cosmos3-Nano/snapshots/0ab1/transformer/a.safetensors"
    wanted = "hf download nvidia/Cosmos3-Nano transformer/a.safetensors --revision 0ab1"
    assert wanted in kinds.fetch(cached)
    local = tmp_path / "nano"
    (local / ".cache/huggingface").mkdir(parents=True)
    assert f"vae/a.safetensors --local-dir {local}" in kinds.fetch(local / "vae/a.safetensors")


PREFIXES = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "net_ema.": "EMA",
    "transformer.": "whole pipeline",
    "module._orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "model.diffusion_model.": "ComfyUI",
    "my_own.": "named with `my_own.`",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_with_something_before_them(tmp_path: Path, prefix: str) -> None:
    def edit(specs: list[TensorHeader]) -> list[TensorHeader]:
        return [TensorHeader(prefix + spec.name, spec.dtype, spec.shape) for spec in specs]

    error = refused(lambda: open_checkpoint(write_checkpoint(tmp_path / "c", edit=edit)))
    assert PREFIXES[prefix] in error.message
    assert "k.replace(" in error.hint and "incomplete" not in error.hint


def test_names_with_something_among_them(tmp_path: Path) -> None:
    def edit(specs: list[TensorHeader]) -> list[TensorHeader]:
        names = [s.name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.") for s in specs]
        return [TensorHeader(name, s.dtype, s.shape) for name, s in zip(names, specs, strict=True)]

    error = refused(lambda: open_checkpoint(write_checkpoint(tmp_path / "c", edit=edit)))
    assert "activation checkpointing" in error.message and error.code == "CX120"


def test_averaged_weights_beside_the_trained_ones(tmp_path: Path) -> None:
    def edit(specs: list[TensorHeader]) -> list[TensorHeader]:
        return [TensorHeader(before + s.name, s.dtype, s.shape) for s in specs for before in ("net.", "net_ema.")]

    error = refused(lambda: open_checkpoint(write_checkpoint(tmp_path / "c", edit=edit)))
    assert error.code == "CX121" and "EMA" in error.message and "not both" in error.hint


LAYOUTS = {
    "qweight": "AWQ or GPTQ",
    "absmax": "bitsandbytes",
    "scale_weight": "ComfyUI",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "block-wise FP8",
    "wscales": "SVDQuant",
    "weight_scale_2": "NVFP4",
    "pre_quant_scale": "ModelOpt",
    "W_q": "HQQ",
    "qdata": "torchao",
    "exp_avg": "optimizer",
}


@pytest.mark.parametrize("leaf", LAYOUTS)
def test_quantized_layouts_are_named(tmp_path: Path, leaf: str) -> None:
    def edit(specs: list[TensorHeader]) -> list[TensorHeader]:
        linears = [s.name.removesuffix(".weight") for s in specs if s.name.endswith("_proj.weight")]
        return [*specs, *(TensorHeader(f"{name}.{leaf}", "F32", (1,)) for name in linears)]

    error = refused(lambda: open_checkpoint(write_checkpoint(tmp_path / "c", edit=edit)))
    assert LAYOUTS[leaf] in error.message and leaf in error.message
    assert "incomplete" not in error.hint


def touch(*names: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")

    return make


FOLDERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "bundle": (touch("manifest.json", "graphs/a.json"), "a bundle", "cosmos-export run"),
    "dcp": (
        touch("model/.metadata", "model/__0_0.distcp"),
        "distributed checkpoint (DCP)",
        "convert_model_to_diffusers",
    ),
    "dcp-run": (touch("checkpoints/iter_000001000/model/.metadata"), "distributed checkpoint (DCP)", "export_model"),
    "fsdp": (touch("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"), "FSDP", "accelerate merge-weights"),
    "accelerate": (touch("optimizer.bin", "random_states_0.pkl", "model.safetensors"), "accelerate", "save_pretrained"),
    "trainer": (
        touch("checkpoint-500/optimizer.pt", "checkpoint-500/model.safetensors"),
        "training",
        "save_pretrained",
    ),
    "deepspeed": (touch("zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt"), "DeepSpeed", "zero_to_fp32.py"),
    "megatron": (touch("latest_checkpointed_iteration.txt", "iter_0000100/x"), "Megatron", "model_index.json"),
    "adapter": (touch("adapter_config.json", "adapter_model.safetensors"), "adapter without its model", "--adapter"),
    "lora": (touch("pytorch_lora_weights.safetensors"), "adapter without its model", "--adapter"),
    "component": (touch("config.json", f"{STEM}.safetensors"), "one component", "give its parent"),
    "reasoner": (touch("config.json", "model-00001-of-00004.safetensors"), "a model of transformers", "reasoner"),
    "gguf": (touch("cosmos3-nano-q4.gguf"), "GGUF", "published layout"),
    "onnx": (touch("model.onnx"), "ONNX", "published layout"),
    "engines": (touch("a.engine"), "TensorRT engines", "published layout"),
    "ckpt": (touch("last.ckpt"), "plain PyTorch", "never opened"),
    "lerobot": (touch("meta/info.json", "data/a.parquet"), "a LeRobot data set", "--data"),
    "scales": (touch("scales.safetensors", "lineage.json"), "a scale table", "--calibration"),
    "unfinished": (touch(".cache/huggingface/download/a.incomplete"), "did not finish", "hf download"),
    "cache": (touch("models--nvidia--Cosmos3-Nano/refs/main"), "several models", "OWNER/NAME"),
    "empty": (lambda root: root.mkdir(exist_ok=True), "an empty folder", "published layout"),
    "ema": (touch("transformer_ema/config.json", "scheduler/x"), "another name", "transformer/"),
    "vllm": (touch("model-rank-0-part-0.safetensors", "config.json"), "several GPUs", "published layout"),
    "deepspeed-latest": (touch("latest", "global_step5/x"), "DeepSpeed", "zero_to_fp32.py"),
    "mlx": (touch("weights.npz"), "MLX", "published layout"),
    "dataset": (touch("dataset_infos.json", "train.parquet"), "a data set of Hugging Face", "meta/info.json"),
    "modelscope": (touch("._____temp/x"), "did not finish", "hf download"),
    "source": (touch("pyproject.toml", "README.md"), "source code", "published layout"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_no_checkpoint_are_named(tmp_path: Path, name: str) -> None:
    make, what, hint = FOLDERS[name]
    root = tmp_path / "thing"
    root.mkdir()
    make(root)
    error = refused(lambda: open_checkpoint(root))
    assert error.code == "CX105" and what in error.message and str(root) in error.message
    assert hint in error.hint


def test_a_checkpoint_below_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run/export")
    assert str(tmp_path / "run/export") in refused(lambda: open_checkpoint(tmp_path / "run")).hint
    touch("optimizer.bin")(tmp_path / "run")
    assert str(tmp_path / "run/export") in refused(lambda: open_checkpoint(tmp_path / "run")).hint


def test_the_snapshot_of_main_comes_first(tmp_path: Path) -> None:
    cache = tmp_path / "models--nvidia--Cosmos3-Nano"
    for revision in ("aaa", "fff"):
        write_checkpoint(cache / "snapshots" / revision)
    touch("refs/fp8", "refs/main")(cache)
    (cache / "refs/fp8").write_text("fff")
    (cache / "refs/main").write_text("aaa")
    error = refused(lambda: open_checkpoint(cache))
    assert "a Hugging Face cache folder" in error.message and error.hint == f"give {cache}/snapshots/aaa"


@pytest.mark.parametrize("name", ["WanPipeline", "Cosmos2VideoToWorldPipeline", "FluxPipeline", "LTXPipeline", 7])
def test_a_pipeline_of_another_class(tmp_path: Path, name: object) -> None:
    root = write_checkpoint(tmp_path / "c")
    write_json(root / "model_index.json", {**json.loads((root / "model_index.json").read_text()), "_class_name": name})
    error = refused(lambda: open_checkpoint(root))
    assert error.code == "CX104" and str(name) in error.message and "Cosmos3OmniPipeline" in error.hint


def test_shards_without_their_index(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "c", shards=3)
    (root / f"transformer/{STEM}.safetensors.index.json").unlink()
    error = refused(lambda: open_checkpoint(root))
    assert error.code == "CX110" and "3 of 3 shards" in error.message
    assert f"transformer/{STEM}.safetensors.index.json" in error.hint


def test_pickled_weights_alone(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "c")
    (root / f"transformer/{STEM}.safetensors").rename(root / f"transformer/{STEM}.bin")
    error = refused(lambda: open_checkpoint(root))
    assert "never opened" in error.message and "use_safetensors=False" in error.hint


@pytest.mark.parametrize("verb", ["run", "bench", "serve", "show", "verify"])
def test_a_checkpoint_is_no_bundle(tmp_path: Path, verb: str) -> None:
    root = write_checkpoint(tmp_path / "c")
    more = {"run": ["-p", "A cup.", "-o", str(tmp_path / "a.mp4")], "serve": ["--no-limits"]}.get(verb, [])
    words = ["bundle", verb] if verb in ("show", "verify") else [verb]
    text = " ".join(CliRunner().invoke(app, [*words, str(root), *more]).output.split())
    assert "a checkpoint" in text and "cosmos-export build" in text


@pytest.mark.parametrize("verb", ["build", "inspect", "calibrate", "plan"])
def test_a_bundle_is_no_checkpoint(tmp_path: Path, verb: str) -> None:
    root = tmp_path / "b.bundle"
    touch("manifest.json", "graphs/a.json")(root)
    (tmp_path / "p.txt").write_text("A cup.")
    given = {
        "build": ["-o", "x"],
        "calibrate": ["-o", "x", "--data", str(tmp_path / "p.txt")],
    }
    text = " ".join(CliRunner().invoke(app, [verb, str(root), *given.get(verb, [])]).output.split())
    assert "CX105" in text and "a bundle" in text and "cosmos-export run" in text


def test_a_tensor_file_is_recognised(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.bin")
    kind = kinds.of_file(tmp_path / "a.bin")
    assert kind is not None and kind.what == kinds.SAFETENSORS
