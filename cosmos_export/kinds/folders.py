"""The kind of a folder, by the names in it."""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path

from cosmos_export import files
from cosmos_export.kinds.contents import Thing

_ENTRIES = 4096
"""Entries of a folder that are looked at."""
_TRAINED = (
    "export it with NVIDIA's framework: `python -m cosmos_framework.scripts.export_model --checkpoint-path {path} "
    "--config-file RUN/config.yaml -o MODEL`, then `python -m cosmos_framework.scripts.convert_model_to_diffusers "
    "--checkpoint-path MODEL -o CHECKPOINT`"
)
_PUBLISHED = "give a checkpoint in the published layout, with model_index.json and transformer/"


@dataclass(frozen=True)
class _Folder:
    """A kind of folder: there is a match of every pattern of one of ``marks``, which has spaces between patterns."""

    what: str
    marks: tuple[str, ...]
    hint: str


_FOLDERS: tuple[_Folder, ...] = (
    _Folder(
        "a bundle, which is what a checkpoint compiles to",
        ("manifest.json graphs/", "manifest.json onnx/", "manifest.json engines/", "manifest.json !transformer/"),
        "`cosmos-export bundle show {path}` reads it, `cosmos-export run {path}` runs it",
    ),
    _Folder(
        "a checkpoint",
        ("transformer/ model_index.json", "transformer/ modular_model_index.json", "transformer/ scheduler/"),
        "build it first: `cosmos-export build {path} -o NAME.bundle`",
    ),
    _Folder(
        "a scale table of `calibrate`",
        ("scales.safetensors lineage.json",),
        "it is for --calibration, beside the checkpoint that it is of",
    ),
    _Folder("a LeRobot data set", ("meta/info.json",), "it is for `cosmos-export calibrate CHECKPOINT --data {path}`"),
    _Folder(
        "a sharded checkpoint of DeepSpeed",
        (
            "zero_to_fp32.py",
            "latest global_step*/",
            "zero/ latest_universal",
            "global_step*/*model_states.pt",
            "*mp_rank_*_model_states.pt",
        ),
        "put it together: `python {path}/zero_to_fp32.py {path} OUT --safe_serialization`, then save the pipeline with "
        "save_pretrained of diffusers",
    ),
    _Folder(
        "a checkpoint of accelerate with FSDP shards",
        ("pytorch_model_fsdp_*/", "pytorch_model_fsdp*.bin"),
        "put it together: `accelerate merge-weights {path}/pytorch_model_fsdp_0 OUT`, load OUT into the transformer, "
        "then save_pretrained of diffusers' pipeline",
    ),
    _Folder(
        "a checkpoint of Megatron",
        ("latest_checkpointed_iteration.txt", "iter_*/mp_rank_*", "mp_rank_*/model_optim_rng.pt"),
        _PUBLISHED,
    ),
    _Folder(
        "a distributed checkpoint (DCP) of a training run",
        (
            ".metadata",
            "*.distcp",
            "model/.metadata",
            "model/*.distcp",
            "*/model/*.distcp",
            "*/*.distcp",
            "checkpoints/iter_*/",
            "checkpoints/latest_checkpoint.txt",
            "latest_checkpoint.txt",
            "iter_*/model/",
        ),
        _TRAINED,
    ),
    _Folder(
        "a training checkpoint of accelerate, with the states of optimizer and random numbers",
        (
            "optimizer*.bin",
            "optimizer*.pt",
            "random_states_*.pkl",
            "scheduler.bin",
            "trainer_state.json",
            "training_args.bin",
            "rng_state*.pth",
            "checkpoint-*/",
        ),
        "load the trained model in its training script and save the pipeline with save_pretrained of diffusers",
    ),
    _Folder(
        "an adapter without its model",
        ("adapter_config.json", "adapter_model.*", "*lora*.safetensors", "*LoRA*.safetensors"),
        "give the checkpoint that it was trained on, and it beside: "
        "`cosmos-export build CHECKPOINT --adapter {path} -o NAME.bundle`",
    ),
    _Folder(
        "a checkpoint whose transformer has another name",
        (
            "transformer_ema/ scheduler/",
            "transformer_ema/ model_index.json",
            "unet/ scheduler/",
            "dit/ model_index.json",
        ),
        "its transformer must be in transformer/: rename the folder that you want to build",
    ),
    _Folder(
        "a checkpoint that is split for several GPUs",
        ("model-rank-*-part-*.safetensors", "rank*.safetensors config.json", "mp_rank_*/", "rank*.engine"),
        _PUBLISHED,
    ),
    _Folder("a folder of MLX or NumPy weights", ("*.npz",), _PUBLISHED),
    _Folder(
        "a data set of Hugging Face",
        ("dataset_infos.json", "dataset_info.json", "data/*.parquet", "*.parquet", "*.arrow"),
        "robot data is read as LeRobot writes it, with meta/info.json",
    ),
    _Folder(
        "a checkpoint of Lightning or of plain PyTorch",
        ("*.ckpt !config.json", "*.pt !config.json", "*.pth !config.json"),
        _PUBLISHED + "; pickled files are never opened",
    ),
    _Folder("a folder of GGUF files", ("*.gguf",), "GGUF is not read: " + _PUBLISHED),
    _Folder(
        "a folder of TensorRT engines", ("*.engine", "*.plan", "*.trt"), "engines are parts of a bundle: " + _PUBLISHED
    ),
    _Folder("a folder of ONNX models", ("*.onnx",), _PUBLISHED),
    _Folder(
        "one component of a checkpoint",
        ("config.json diffusion_pytorch_model*", "scheduler_config.json"),
        "give its parent, {parent}",
    ),
    _Folder(
        "a model of transformers",
        ("config.json model*.safetensors*", "config.json pytorch_model*.bin*", "config.json generation_config.json"),
        "the reasoner is a part of a checkpoint: " + _PUBLISHED,
    ),
    _Folder(
        "a download that did not finish",
        (
            ".cache/huggingface/download/*.incomplete",
            "*.incomplete",
            "*.part",
            "*.crdownload",
            "*.aria2",
            "._____temp/",
        ),
        "run the same `hf download` again: it goes on where it stopped",
    ),
    _Folder(
        "a Hugging Face cache of several models",
        ("models--*/",),
        "name one of them: OWNER/NAME, as in `cosmos-export inspect nvidia/Cosmos3-Nano`",
    ),
    _Folder("a checkout of source code", ("pyproject.toml", "setup.py", ".git/ *.py"), _PUBLISHED),
)


def of_folder(path: Path) -> Thing | None:
    """The kind of the folder ``path`` by the names in it; None where it is not known, or cannot be read."""
    try:
        return _of_folder(path)
    except OSError:
        return None


def _of_folder(path: Path) -> Thing | None:
    snapshot = snapshot_of(path)
    if snapshot is not None:
        return Thing("a Hugging Face cache folder", f"give {snapshot}")
    with os.scandir(path) as entries:
        if next(entries, None) is None:
            return Thing("an empty folder", _PUBLISHED)
    for folder in _FOLDERS:
        if any(all(_there(path, pattern) for pattern in mark.split()) for mark in folder.marks):
            hint = folder.hint.format(path=shlex.quote(str(path)), parent=path.absolute().parent)
            below = _checkpoint_below(path)
            return Thing(folder.what, f"{hint}; or give {below}, which is a checkpoint" if below else hint)
    below = _checkpoint_below(path)
    if below is not None:
        return Thing("the folder above a checkpoint", f"give {below}")
    return None


def snapshot_of(path: Path) -> Path | None:
    """The snapshot that the folder ``models--OWNER--NAME`` of a Hugging Face cache means: that of ``refs/main``, or of
    another reference, before any other. None where ``path`` is no such folder."""
    snapshots = path / "snapshots"
    there = sorted(child.name for child in snapshots.glob("*/") if child.is_dir()) if snapshots.is_dir() else []
    if not there:
        return None
    references = sorted((path / "refs").rglob("*"), key=lambda ref: (ref.name != "main", str(ref)))
    for reference in references:
        try:
            commit = files.read_bytes(reference, 256).decode("ascii", "replace").strip()
        except OSError:
            continue
        if commit in there:
            return snapshots / commit
    return snapshots / there[-1]


def _there(root: Path, pattern: str) -> bool:
    if pattern.startswith("!"):
        return not _there(root, pattern[1:])
    matches = root.glob(pattern)
    folders = pattern.endswith("/")
    for _, match in zip(range(_ENTRIES), matches, strict=False):
        try:
            if not folders or stat.S_ISDIR(match.stat().st_mode):
                return True
        except OSError:
            continue
    return False


def _checkpoint_below(root: Path) -> Path | None:
    """A checkpoint one or two folders below ``root``."""
    for pattern in ("*/transformer/config.json", "*/*/transformer/config.json"):
        found = next(iter(root.glob(pattern)), None)
        if found is not None:
            return found.parent.parent
    return None
