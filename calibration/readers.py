"""Readers of sources by what a path is: lists of prompts, objects, captions, actions, pictures, clips, folders."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosmos_export import files, kinds
from cosmos_export.calibration.entries import PROMPT_KEYS, bad_entry, entry_item, medium_item, model_actions
from cosmos_export.calibration.items import CLIPS, IMAGES, Item, Options, SourceContent
from cosmos_export.calibration.lerobot import read_lerobot
from cosmos_export.checkpoint.strict_json import parse_document, parse_object
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.runtime.prompts import Prompt, read_prompt, text_prompt
from cosmos_export.runtime.request_file import FRAMES_KEYS


def reader(path: Path) -> Callable[[Path, Options], SourceContent]:
    """The reader of ``path``; CX340 for a name that is no source."""
    if path.is_dir():
        if (path / "meta" / "info.json").exists():
            return read_lerobot
        return _read_folder
    suffix = path.suffix.lower()
    if suffix in (*IMAGES, *CLIPS):
        return _read_medium
    if suffix not in _READERS:
        known = ", ".join((*_READERS, *CLIPS, *IMAGES))
        raise UserError(
            "CX340", f"{path}: a name that ends in {shown(suffix)} is no source", f"known: {known}, folders"
        )
    return _READERS[suffix]


def _read_text(path: Path, options: Options) -> SourceContent:
    """Items of a text file, one prompt per line."""
    lines = _decoded(path).splitlines()
    items = [
        Item(f"{path.name}:{number}", text_prompt(line.strip())) for number, line in enumerate(lines, 1) if line.strip()
    ]
    return SourceContent("prompts", tuple(items), (path,))


def _read_lines(path: Path, options: Options) -> SourceContent:
    """Items of a `.jsonl` file, one object per line."""
    items = []
    for number, line in enumerate(_decoded(path).splitlines(), 1):
        if line.strip():
            name = f"{path.name}:{number}"
            items.append(entry_item(name, _object(path, number, line), path.parent))
    return SourceContent("jsonl", tuple(items), (path,))


def _read_json(path: Path, options: Options) -> SourceContent:
    """A caption, an object or a list of objects as in ``.jsonl``, or actions."""
    rows = document = _json(path)
    if isinstance(document, dict) and not PROMPT_KEYS & document.keys():
        rows = document.get("actions")
    if isinstance(rows, list) and rows and isinstance(rows[0], list):
        file = model_actions(path)
        item = Item(path.name, Prompt(""), actions=file.values, embodiment=file.embodiment)
        return SourceContent("actions", (item,), (path,))
    if isinstance(document, list):
        entries = [_checked(path, number, entry) for number, entry in enumerate(document, 1)]
        items = tuple(entry_item(f"{path.name}:{n}", entry, path.parent) for n, entry in enumerate(entries, 1))
        return SourceContent("json", items, (path,))
    entry = _checked(path, 1, document)
    if PROMPT_KEYS & entry.keys():
        return SourceContent("json", (entry_item(path.name, entry, path.parent),), (path,))
    return SourceContent("caption", (Item(path.name, read_prompt(str(path))),), (path,))


def _json(path: Path) -> Any:
    text = _decoded(path)
    try:
        return parse_document(text.encode(), finite=False)
    except ValueError as error:
        raise UserError("CX340", f"{path} is not JSON: {error}") from error


def _read_latents(path: Path, options: Options) -> SourceContent:
    """Latents as `cosmos-export run --save-latents` writes them."""
    return SourceContent("latents", (Item(path.name, Prompt(""), latents=path),), ())


def _read_medium(path: Path, options: Options) -> SourceContent:
    return SourceContent("media", (medium_item(path),), ())


def _read_table(path: Path, options: Options) -> SourceContent:
    """One object a row, whose keys are in the first row."""
    text = _decoded(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError("CX340", f"{path} is not a table of text: {error}", "quote cells that have commas") from error
    items = []
    for number, row in enumerate(rows, 2):
        cells = {key.strip().lower(): value for key, value in row.items() if key and value}
        for key in _NUMBERS & cells.keys():
            cells[key] = _number(path, number, key, cells[key])
        items.append(entry_item(f"{path.name}:{number}", cells, path.parent))
    return SourceContent("table", tuple(items), (path,))


_NUMBERS = {"fps", *FRAMES_KEYS}


def _number(path: Path, line: int, key: str, text: str) -> Any:
    """The cell of a table that has a number: a whole one where it is written as such."""
    try:
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise UserError("CX340", f"{path}, line {line}: {key} = {shown(text)} is not a number") from None


def _read_captions(path: Path, files_there: list[Path], options: Options) -> SourceContent:
    """A folder of texts and captions without pictures: each file as it is read by itself."""
    items: list[Item] = []
    used: list[Path] = []
    for file in files_there:
        if file.suffix.lower() in _TEXTS:
            found = _READERS[file.suffix.lower()](file, options)
            items += found.items
            used += found.files
    left = [file.name for file in files_there if file.suffix.lower() not in _TEXTS and not file.name.startswith(".")]
    notes = (f"{len(left)} files of {path.name} are not read: {', '.join(left[:4])}",) if left else ()
    return SourceContent("captions", tuple(items), tuple(used), notes)


def _read_folder(path: Path, options: Options) -> SourceContent:
    """Pictures and clips, each with the text or caption beside it that has its name; or texts and captions alone."""
    items: list[Item] = []
    beside_them: list[Path] = []
    notes: list[str] = []
    present = sorted(path.rglob("*"))
    if not any(file.suffix.lower() in (*IMAGES, *CLIPS) for file in present):
        return _read_captions(path, [file for file in present if file.is_file()], options)
    texts = {(p.with_suffix(""), p.suffix.lower()): p for p in present if p.suffix.lower() in _BESIDE}
    for medium in (p for p in present if p.suffix.lower() in (*IMAGES, *CLIPS)):
        item = medium_item(medium)
        beside = [found for suffix in _BESIDE if (found := texts.get((medium.with_suffix(""), suffix))) is not None]
        if beside:
            item = _told(item, beside[0])
            beside_them.append(beside[0])
            notes += [f"{other.name} is not read: {beside[0].name} is beside {medium.name} too" for other in beside[1:]]
        items.append(item)
    return SourceContent("media", tuple(items), tuple(beside_them), tuple(notes))


_TEXTS = (".txt", ".json", ".jsonl", ".csv", ".tsv")
"""Endings of what is read in a folder without pictures."""
_BESIDE = (".txt", ".json")
"""Endings of what is beside a picture or a clip; the first comes first."""


def _told(item: Item, beside: Path) -> Item:
    """``item``, a picture or a clip, with what the file beside it says: text, a caption, or an object with a prompt."""
    if beside.suffix.lower() == ".txt":
        return replace(item, prompt=text_prompt(_decoded(beside).strip()))
    document = _json(beside)
    if not isinstance(document, dict) or not PROMPT_KEYS & document.keys():
        return replace(item, prompt=read_prompt(str(beside)))
    said = entry_item(item.name, document, beside.parent)
    if said.image not in (None, item.image) or (said.clip is not None and said.clip != item.clip):
        bad_entry(str(beside), f"it names another picture or clip than {item.name}")
    return replace(said, image=item.image, clip=item.clip)


_READERS: Mapping[str, Callable[[Path, Options], SourceContent]] = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".json": _read_json,
    ".safetensors": _read_latents,
}


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return parse_object(line.encode())
    except ValueError as error:
        raise UserError("CX340", f"{path}, line {number}: {error}", "one JSON object a line") from error


def _checked(path: Path, number: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError("CX340", f"{path}: entry {number} is {type(entry).__name__}, not an object")
    return entry


def _decoded(path: Path) -> str:
    try:
        data = files.read_bytes(path)
    except OSError as error:
        raise UserError("CX340", f"cannot read {path}: {files.reason(error)}") from error
    kind = kinds.of_bytes(data[: kinds.HEAD_BYTES], path)
    if kind is not None and kind.placeholder:
        raise UserError("CX340", f"{path} is {kind.what}", kind.hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if kind is not None:
            raise UserError("CX340", f"{path} is not UTF-8 text: it is {kind.what}", kind.hint) from error
        raise UserError("CX340", f"{path} is not UTF-8 text") from error
