"""Sources of calibration data, as items: prompts, captions, pictures, clips, robot data, recorded latents.

A source is a path and options, ``PATH[,key=value…]``; what it is follows from the path. Reading a source looks into its
text files only; pictures and clips are opened when the requests are made of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cosmos_export import files, kinds
from cosmos_export.bundle.embodiment import Embodiment
from cosmos_export.calibration.items import ClipPart, Item, Options
from cosmos_export.calibration.lerobot import read_lerobot
from cosmos_export.calibration.readers import reader
from cosmos_export.calibration.source_options import OPTIONS, parse_source
from cosmos_export.diagnostics import UserError
from cosmos_export.runtime.embodiments import ActionScale
from cosmos_export.runtime.prompts import read_prompt
from cosmos_export.runtime.read_media import MAX_FILE_BYTES
from cosmos_export.stamps import Inputs, unchanged

_ROBOT_DATA = ("cameras", "actions", "state", "stats", "normalization")


@dataclass(frozen=True)
class Source:
    """Items of one ``--data``, and what the lineage says of it."""

    kind: str
    name: str
    items: tuple[Item, ...]
    digest: str
    """SHA-256 of the files that were used, whatever their place and names."""
    licence: str | None = None
    origin: str | None = None
    notes: tuple[str, ...] = ()
    scale: ActionScale | None = None
    """The statistics that brought its actions to the model's numbers."""
    inputs: Inputs = field(default_factory=lambda: Inputs("the data", ()))
    """The same files as they were when they were hashed."""


def read_source(text: str, policy: Embodiment | None = None) -> Source:
    """The source that ``text`` names, for a checkpoint that is a ``policy`` of that embodiment, or for any.

    CX340: no such thing, or nothing in it; CX341: an option; CX6xx: its files.
    """
    path, options = parse_source(text)
    options = replace(options, policy=policy)
    if not path.exists():
        hint = f"options of --data: {', '.join(OPTIONS)}" if "," in path.name else "is it the right path?"
        raise UserError("CX340", f"{path} does not exist", hint)
    read = reader(path)
    if read is not read_lerobot and (given := [key for key in _ROBOT_DATA if getattr(options, key) is not None]):
        raise UserError("CX341", f"{given[0]}= is for LeRobot data sets, and {path} is none", "leave it out")
    with unchanged("its reading", Inputs("the data", (path,) if path.is_file() else ())):
        found = read(path, options)
    items = found.items[: options.limit]
    if not items:
        kind = kinds.of_folder(path) if path.is_dir() else None
        if kind is not None:
            raise UserError("CX340", f"{path} holds nothing to calibrate on: it is {kind.what}", kind.hint)
        raise UserError(
            "CX340",
            f"{path} holds nothing to calibrate on ({found.kind})",
            "folders of pictures, of clips or of captions (.json, .jsonl, .txt, .csv) are read, and LeRobot data sets",
        )
    items = tuple(_with(item, options) for item in items)
    used = [*found.files, *(path for item in items for path in _files(item))]
    inputs = Inputs("the data", used)
    return Source(
        found.kind,
        path.name,
        items,
        digest_of(used),
        options.licence,
        options.origin,
        found.notes,
        found.scale,
        inputs,
    )


def _files(item: Item) -> Iterator[Path]:
    yield from item.beside
    if item.image is not None:
        yield item.image
    if item.clip is not None:
        yield from (part.path for part in (item.clip, *item.cameras))
    if item.latents is not None:
        yield item.latents


def _with(item: Item, options: Options) -> Item:
    """``item`` and what the options say of all items of the source; what an item says itself comes first."""
    negative = item.negative
    if negative is None and options.negative is not None:
        negative = read_prompt(options.negative, "negative prompt")
    prompt = item.prompt
    if not prompt.text and options.prompt is not None:
        prompt = read_prompt(options.prompt)
    clip = item.clip
    if clip is None and options.video is not None:
        clip = ClipPart(options.video)
    return replace(
        item,
        prompt=prompt,
        negative=negative,
        clip=clip,
        mode=item.mode or options.mode,
        embodiment=item.embodiment or options.embodiment,
        fps=item.fps if item.fps is not None else options.fps,
        frames=item.frames or options.frames,
    )


def digest_of(paths: list[Path]) -> str:
    """SHA-256 of the contents of the files ``paths``; neither their order nor their names matter."""
    digests = sorted(_file_digest(path) for path in set(paths))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with files.opened(path, MAX_FILE_BYTES) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError("CX340", f"cannot read {path}: {files.reason(error)}") from error
