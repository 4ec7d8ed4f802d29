"""The weight files of one component: one file, or several and an index that must agree with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cosmos_export import kinds
from cosmos_export.checkpoint.adapters import MERGE_HINT, is_adapter_name
from cosmos_export.checkpoint.safetensors_header import Header, TensorEntry, read_header
from cosmos_export.checkpoint.strict_json import read_object, require_file
from cosmos_export.diagnostics import UserError, shown

INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d+-of-(?P<all>\d+)\.safetensors")
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".npy", ".npz")


@dataclass(frozen=True)
class Shards:
    """The tensors of a component and the files they came from."""

    headers: tuple[Header, ...]
    ignored: tuple[tuple[Path, str], ...]
    """Files beside them that are not read, with the reason."""

    def tensors(self) -> Iterable[TensorEntry]:
        for header in self.headers:
            yield from header.tensors.values()


def read_shards(folder: Path, stem: str) -> Shards:
    """``folder/stem.safetensors``, or the shards that ``folder/stem.safetensors.index.json`` names."""
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors{INDEX_SUFFIX}"
    if _present(index):
        headers = _read_indexed(folder, index)
    elif _present(single):
        headers = (read_header(single),)
    else:
        _no_weights(folder, stem)
    return Shards(headers, tuple(_ignored(folder, {header.file for header in headers})))


def _read_indexed(folder: Path, index: Path) -> tuple[Header, ...]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("CX117", f"{index} has no weight_map", "download the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _plain_name(file):
            raise UserError(
                "CX117",
                f"{index} sends {shown(name)} to {shown(file)}, which is not the name of a file beside it",
                "a shard must be in the folder of its index",
            )
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if not path.exists():
            count = sum(value == file for value in weight_map.values())
            raise UserError(
                "CX110",
                f"{index.name} names {file}, which is not in {folder} ({count} tensors)",
                "the download is incomplete: run it again",
            )
        require_file(path)
    headers = tuple(read_header(folder / file) for file in sorted(set(weight_map.values())))
    _check_index(index, weight_map, headers)
    return headers


def _check_index(index: Path, weight_map: dict[str, str], headers: tuple[Header, ...]) -> None:
    found: dict[str, str] = {}
    for header in headers:
        for name in header.tensors:
            if name in found:
                raise UserError(
                    "CX114",
                    f"{name} is in {found[name]} and again in {header.file.name}",
                    "shards of two downloads are mixed: download the folder again",
                )
            found[name] = header.file.name
    for name, file in weight_map.items():
        if found.get(name) != file:
            where = f"it is in {found[name]}" if name in found else "no shard has it"
            _disagree(f"{index} says {shown(name)} is in {file}, but {where}")
    for name, file in found.items():
        if name not in weight_map:
            _disagree(f"{file} holds {shown(name)}, which {index} does not list")


def _present(path: Path) -> bool:
    """There, or a link that should lead somewhere: a dangling one is an error to report, not an absent file."""
    return path.exists() or path.is_symlink()


def _plain_name(file: str) -> bool:
    return (
        file.endswith(".safetensors")
        and file.isprintable()
        and len(file.encode()) <= 255
        and not any(character in file for character in "/\\:")
        and not file.startswith(".")
    )


def _ignored(folder: Path, used: set[Path]) -> Iterable[tuple[Path, str]]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" and path not in used:
            yield path, "not named by the index" if len(used) > 1 else "not the checkpoint's weight file"
        elif path.suffix in PICKLES:
            yield path, "may hold pickled objects; never opened"


def _no_weights(folder: Path, stem: str) -> NoReturn:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = [found for name in others if (found := _SHARD.fullmatch(name))]
    known = kinds.of_folder(folder)
    if any(is_adapter_name(name) for name in (*others, *pickles)):
        detail, hint = f"; {', '.join((*others, *pickles)[:4])} is an adapter", MERGE_HINT
    elif shards:
        index = f"{shards[0]['stem']}.safetensors{INDEX_SUFFIX}"
        detail = f"; it has {len(shards)} of {int(shards[0]['all'])} shards, {shards[0][0]} …, without {index}"
        hint = f"download the index too: `hf download OWNER/NAME {folder.name}/{index} --local-dir {folder.parent}`"
        if shards[0]["stem"] != stem:
            hint = f"the shards and their index must be named {stem}-00001-of-… and {stem}.safetensors{INDEX_SUFFIX}"
    elif others:
        detail, hint = f"; it has {', '.join(others[:4])}", f"the weights must be named {stem}.safetensors"
    elif pickles:
        detail = f"; {', '.join(pickles[:4])} may be pickled and is never opened"
        hint = (
            "convert them to safetensors in a trusted place: load the pipeline with diffusers (use_safetensors=False), "
            "then save_pretrained"
        )
    elif known is not None and known.what not in ("one component of a checkpoint", "an empty folder"):
        detail, hint = f"; it is {known.what}", known.hint
    else:
        detail, hint = "", "the download is incomplete: run it again"
    raise UserError("CX110", f"{folder} has neither {stem}.safetensors nor its index{detail}", hint)


def _disagree(what: str) -> NoReturn:
    raise UserError("CX116", what, "files of two downloads are mixed: download the folder again")
