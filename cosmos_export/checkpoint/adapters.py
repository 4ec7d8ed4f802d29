"""LoRA and other adapters in a checkpoint's folder: they are no part of what is read, so they are found and said.

A bundle that was built without the adapter beside its weights is the base model, and nothing in its results says so.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.diagnostics import UserError

CONFIG = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_DEPTH = 4
"""Folders below the checkpoint that are looked into."""
_KEY = re.compile(r"\blora_|lora[AB]\b|\.lora\.|_lora\.|\bbase_layer\.|\bhada_w|\blokr_w|\bdora_scale\b|\boft_diag\b")
"""Parts of the names of an adapter's tensors, in the layouts of PEFT, diffusers, kohya and LyCORIS."""
MERGE_HINT = (
    "merge the adapter first, with diffusers: load_lora_adapter, fuse_lora and unload_lora of the pipeline's "
    "transformer, then save_pretrained of the pipeline"
)
_SHOWN = 4


def find_adapters(root: Path, used: Collection[Path]) -> tuple[Path, ...]:
    """Files of adapters anywhere in ``root``, sorted; ``used`` are the files that the model is read from."""
    return tuple(path for path in _files(root) if path not in used and _is_adapter(path))


def is_adapter_key(name: str) -> bool:
    """Whether a tensor is an adapter's, or that of a layer which an adapter has been put around."""
    return _KEY.search(name) is not None


def is_adapter_name(name: str) -> bool:
    """Whether a file is called as those of an adapter are."""
    name = name.lower()
    return name == CONFIG or (name.endswith(_WEIGHTS) and (name.startswith("adapter") or "lora" in name))


def require_no_adapters(root: Path, adapters: Collection[Path], ignore: bool) -> None:
    """CX125 where the folder ``root`` has ``adapters``, unless they are to be ignored."""
    if not adapters or ignore:
        return
    names = [str(path.relative_to(root)) for path in adapters]
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise UserError(
        "CX125",
        f"{root} has an adapter, which is not part of the weights that are read: {', '.join(names[:_SHOWN])}{rest}",
        f"`--adapter {shlex.quote(str(_whole(adapters)))}` adds it to the weights (`PATH:0.8` with a factor), "
        "`--ignore-adapters` takes the weights without it",
    )


def _whole(adapters: Collection[Path]) -> Path:
    """The path for `--adapter` among ``adapters``: the first file of weights, or the folder of an adapter without."""
    found = sorted(adapters)
    weights = [path for path in found if path.suffix.lower() == ".safetensors"]
    return weights[0] if weights else found[0].parent


def _files(root: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(root, followlinks=False):
        deep = len(Path(directory).relative_to(root).parts) >= _DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _is_adapter(path: Path) -> bool:
    return is_adapter_name(path.name) or (path.suffix.lower() == ".safetensors" and _has_adapter_keys(path))


def _has_adapter_keys(path: Path) -> bool:
    try:
        return any(map(is_adapter_key, read_header(path).tensors))
    except UserError:
        return False  # nothing reads it, damaged or not
