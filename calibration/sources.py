"""What people have to calibrate on, as items: prompts, captions, pictures, clips, robot data, recorded latents.

A source is a path and options, ``PATH[,key=value…]``; what it is follows from the path. Reading a source looks into its
text files only; pictures and clips are opened when the requests are made of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from cosmos_export import files
from cosmos_export.checkpoint.strict_json import parse_document, parse_object, shown
from cosmos_export.diagnostics import UserError
from cosmos_export.runtime.embodiments import ActionFile, Actions, Embodiment, embodiment, read_actions
from cosmos_export.runtime.generate_options import MAX_FPS, MIN_FPS
from cosmos_export.runtime.prompts import Prompt, read_prompt, text_prompt
from cosmos_export.runtime.read_media import MAX_FILE_BYTES
from cosmos_export.sampling import MODES, Mode
from cosmos_export.stamps import Inputs, unchanged

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
ORIGINS = ("real", "synthetic")
_OPTIONS = (
    "licence", "origin", "prompt", "negative", "mode", "embodiment", "video", "fps", "frames", "limit", "camera",
    "cameras", "actions",
)  # fmt: skip
_OPTION = re.compile(rf",({'|'.join(_OPTIONS)})=")


@dataclass(frozen=True)
class ClipPart:
    """Frames of a file from ``skip`` on, at most ``count``; ``fps`` is what the data set says of them."""

    path: Path
    skip: int = 0
    count: int | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Item:
    """One thing to calibrate on. What it has decides which modes it can stand for."""

    name: str
    prompt: Prompt
    negative: Prompt | None = None
    mode: Mode | None = None
    image: Path | None = None
    clip: ClipPart | None = None
    actions: Actions | None = None
    """In the units of the model."""
    embodiment: str | None = None
    latents: Path | None = None
    fps: float | None = None
    frames: int | None = None
    beside: tuple[Path, ...] = ()
    """Further files it was made of."""


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
    inputs: Inputs = field(default_factory=lambda: Inputs("the data", ()))
    """The same files as they were when they were hashed."""


@dataclass(frozen=True)
class Options:
    """What follows the path of a source."""

    licence: str | None = None
    origin: str | None = None
    prompt: str | None = None
    negative: str | None = None
    mode: Mode | None = None
    embodiment: str | None = None
    video: Path | None = None
    fps: float | None = None
    frames: int | None = None
    limit: int | None = None
    camera: str | None = None
    actions: tuple[str, ...] | None = None
    """Columns of a data set that make an action, in order."""
    policy: Embodiment | None = None
    """That of the checkpoint; no key says it."""


@dataclass(frozen=True)
class SourceContent:
    """What a reader makes of a source."""

    kind: str
    items: tuple[Item, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def read_source(text: str, policy: Embodiment | None = None) -> Source:
    """The source that ``text`` names, for a checkpoint that is a ``policy`` of that embodiment, or for any.

    CX340: no such thing, or nothing in it; CX341: an option; CX6xx: its files.
    """
    path, options = parse_source(text)
    options = replace(options, policy=policy)
    if not path.exists():
        hint = f"options of --data: {', '.join(_OPTIONS)}" if "," in path.name else "is it the right path?"
        raise UserError("CX340", f"{path} does not exist", hint)
    with unchanged("its reading", Inputs("the data", (path,) if path.is_file() else ())):
        found = _reader(path)(path, options)
    items = found.items[: options.limit]
    if not items:
        raise UserError(
            "CX340", f"{path} holds nothing to calibrate on ({found.kind})", "name each caption (.json) by itself"
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
        inputs,
    )


def parse_source(text: str) -> tuple[Path, Options]:
    """``PATH[,key=value…]``; CX341 for an unknown or unusable option. A comma in the path stays one."""
    path, *pairs = _OPTION.split(text)
    values: dict[str, Any] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if key in values:
            _bad_option(key, value, "given twice")
        values[key] = _CONVERT[key](key, value) if key in _CONVERT else value
    if (cameras := values.pop("cameras", None)) is not None:
        if "camera" in values:
            _bad_option("cameras", cameras, "camera= is given too")
        values["camera"] = _one_camera("cameras", cameras)
    return Path(path), Options(**values)


def _files(item: Item) -> Iterator[Path]:
    yield from item.beside
    if item.image is not None:
        yield item.image
    if item.clip is not None:
        yield item.clip.path
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


# -- options ----------------------------------------------------------------------------------------------------------


def _bad_option(key: str, value: str, why: str) -> NoReturn:
    raise UserError("CX341", f"{key}={shown(value)}: {why}", f"options of --data: {', '.join(_OPTIONS)}")


def _choice(allowed: tuple[str, ...]) -> Callable[[str, str], str]:
    def convert(key: str, value: str) -> str:
        if value not in allowed:
            _bad_option(key, value, f"known: {', '.join(allowed)}")
        return value

    return convert


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or not 0 < int(value) < 1_000_000:
        _bad_option(key, value, "not a whole number above 0")
    return int(value)


def _rate(key: str, value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not MIN_FPS <= rate <= MAX_FPS:
        _bad_option(key, value, f"not a rate, {MIN_FPS} to {MAX_FPS:.0f} frames per second")
    return rate


def _robot(key: str, value: str) -> str:
    return embodiment(value, None).name


def _one_camera(key: str, value: str) -> str:
    """The camera that is named: a picture made of several cannot be composed yet."""
    if "," in value:
        _bad_option(key, value, "the model is shown one camera; several are not composed into one picture yet")
    return value


def _columns(key: str, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    if not all(names) or len(set(names)) != len(names):
        _bad_option(key, value, "not a list of different columns, as in actions=joint_position,gripper_position")
    return names


_CONVERT: Mapping[str, Callable[[str, str], Any]] = {
    "actions": _columns,
    "camera": _one_camera,
    "origin": _choice(ORIGINS),
    "mode": _choice(MODES),
    "embodiment": _robot,
    "video": lambda _, value: Path(value),
    "fps": _rate,
    "frames": _whole,
    "limit": _whole,
}


# -- readers ----------------------------------------------------------------------------------------------------------


def _reader(path: Path) -> Callable[[Path, Options], SourceContent]:
    if path.is_dir():
        if (path / "meta" / "info.json").exists():
            from cosmos_export.calibration.lerobot import read_lerobot

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
    """One prompt a line."""
    lines = _decoded(path).splitlines()
    items = [
        Item(f"{path.name}:{number}", text_prompt(line.strip())) for number, line in enumerate(lines, 1) if line.strip()
    ]
    return SourceContent("prompts", tuple(items), (path,))


def _read_lines(path: Path, options: Options) -> SourceContent:
    """One object a line."""
    items = []
    for number, line in enumerate(_decoded(path).splitlines(), 1):
        if line.strip():
            name = f"{path.name}:{number}"
            items.append(_item(name, _object(path, number, line), path.parent))
    return SourceContent("jsonl", tuple(items), (path,))


def _read_json(path: Path, options: Options) -> SourceContent:
    """A caption, an object or a list of objects as in ``.jsonl``, or actions."""
    rows = document = _json(path)
    if isinstance(document, dict) and not _PROMPT_KEYS & document.keys():
        rows = document.get("actions")
    if isinstance(rows, list) and rows and isinstance(rows[0], list):
        file = _model_actions(path)
        item = Item(path.name, Prompt(""), actions=file.values, embodiment=file.embodiment)
        return SourceContent("actions", (item,), (path,))
    if isinstance(document, list):
        entries = [_checked(path, number, entry) for number, entry in enumerate(document, 1)]
        items = tuple(_item(f"{path.name}:{n}", entry, path.parent) for n, entry in enumerate(entries, 1))
        return SourceContent("json", items, (path,))
    entry = _checked(path, 1, document)
    if _PROMPT_KEYS & entry.keys():
        return SourceContent("json", (_item(path.name, entry, path.parent),), (path,))
    return SourceContent("caption", (Item(path.name, read_prompt(str(path))),), (path,))


def _json(path: Path) -> Any:
    text = _decoded(path)
    try:
        return parse_document(text.encode(), finite=False)
    except ValueError as error:
        raise UserError("CX340", f"{path} is not JSON: {error}") from error


def _model_actions(path: Path) -> ActionFile:
    """Actions in the model's units: a file that says it has those of the data is refused (CX611)."""
    file = read_actions(path)
    if file.units == "raw":
        raise UserError(
            "CX611",
            f"actions in {path}: they are in the units of the data",
            "calibrate with the data set itself, or with what `run` writes without --action-stats",
        )
    return file


def _read_latents(path: Path, options: Options) -> SourceContent:
    """Latents as `cosmos-export run --save-latents` writes them."""
    return SourceContent("latents", (Item(path.name, Prompt(""), latents=path),), ())


def _read_medium(path: Path, options: Options) -> SourceContent:
    return SourceContent("media", (_medium(path),), ())


def _read_folder(path: Path, options: Options) -> SourceContent:
    """Pictures and clips, each with the text or caption beside it that has its name."""
    items: list[Item] = []
    beside_them: list[Path] = []
    notes: list[str] = []
    present = sorted(path.rglob("*"))
    texts = {(p.with_suffix(""), p.suffix.lower()): p for p in present if p.suffix.lower() in _BESIDE}
    for medium in (p for p in present if p.suffix.lower() in (*IMAGES, *CLIPS)):
        item = _medium(medium)
        beside = [found for suffix in _BESIDE if (found := texts.get((medium.with_suffix(""), suffix))) is not None]
        if beside:
            item = _told(item, beside[0])
            beside_them.append(beside[0])
            notes += [f"{other.name} is not read: {beside[0].name} is beside {medium.name} too" for other in beside[1:]]
        items.append(item)
    return SourceContent("media", tuple(items), tuple(beside_them), tuple(notes))


_BESIDE = (".txt", ".json")
"""Endings of what is beside a picture or a clip; the first comes first."""


def _told(item: Item, beside: Path) -> Item:
    """``item``, a picture or a clip, with what the file beside it says: text, a caption, or an object with a prompt."""
    if beside.suffix.lower() == ".txt":
        return replace(item, prompt=text_prompt(_decoded(beside).strip()))
    document = _json(beside)
    if not isinstance(document, dict) or not _PROMPT_KEYS & document.keys():
        return replace(item, prompt=read_prompt(str(beside)))
    said = _item(item.name, document, beside.parent)
    if said.image not in (None, item.image) or (said.clip is not None and said.clip != item.clip):
        _bad_entry(str(beside), f"it names another picture or clip than {item.name}")
    return replace(said, image=item.image, clip=item.clip)


def _medium(path: Path) -> Item:
    if path.suffix.lower() in IMAGES:
        return Item(path.name, Prompt(""), image=path)
    return Item(path.name, Prompt(""), clip=ClipPart(path))


_READERS: Mapping[str, Callable[[Path, Options], SourceContent]] = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".safetensors": _read_latents,
}


# -- objects ----------------------------------------------------------------------------------------------------------

_PROMPT_KEYS = {"prompt", "caption", "caption_json"}
_MEDIA_KEYS = ("image", "video", "vision_path", "image_path", "video_path")
_MODES: Mapping[str, Mode] = {
    **{mode: mode for mode in MODES},
    "forward_dynamics": "forward-dynamics",
    "inverse_dynamics": "inverse-dynamics",
    "text2image": "t2i",
    "text2video": "t2v",
    "text2world": "t2v",
    "image2video": "i2v",
    "image2world": "i2v",
    "video2video": "v2v",
    "video2world": "v2v",
}
_MODE_KEYS = ("mode", "model_mode")


def _item(name: str, entry: Mapping[str, Any], folder: Path) -> Item:
    """An object of a ``.jsonl`` file or of the framework's ``inputs/omni``. Keys that say nothing here are let be."""
    prompt = next((entry[key] for key in ("prompt", "caption", "caption_json") if entry.get(key) is not None), None)
    if isinstance(prompt, dict):
        prompt = json.dumps(prompt)
    if not isinstance(prompt, str):
        _bad_entry(
            name, f"prompt = {shown(prompt)} is not text", f"keys with a prompt: {', '.join(sorted(_PROMPT_KEYS))}"
        )
    item = Item(entry_name(name, entry), text_prompt(prompt))
    if negative := _said(name, entry, "negative_prompt", str):
        item = replace(item, negative=text_prompt(negative, "negative prompt"))
    for key in _MEDIA_KEYS:
        if value := _said(name, entry, key, str):
            path = folder / value
            if not path.is_file():
                _bad_entry(name, f"{key} = {shown(value)} is not a file beside it")
            medium = _medium(path)
            item = replace(item, image=medium.image, clip=medium.clip)
    if action := _said(name, entry, "action_path", str):
        path = folder / action
        file = _model_actions(path)
        item = replace(item, actions=file.values, embodiment=file.embodiment, beside=(path,))
    if domain := _said(name, entry, "domain_name", str):
        item = replace(item, embodiment=_same_robot(name, item.embodiment, domain))
    for key in _MODE_KEYS:
        if mode := _said(name, entry, key, str):
            if mode not in _MODES:
                _bad_entry(name, f"{key} = {shown(mode)}", f"known: {', '.join(_MODES)}")
            item = replace(item, mode=_MODES[mode])
    if (fps := _said(name, entry, "fps", int, float)) is not None:
        item = replace(item, fps=_rate("fps", str(fps)))
    if (frames := _said(name, entry, "num_frames", int)) is not None:
        item = replace(item, frames=_whole("frames", str(frames)))
    return item


def _said(name: str, entry: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """What ``entry`` says under ``key``, of one of ``kinds``; None where it says nothing. CX340 for anything else."""
    value = entry.get(key)
    if value is not None and type(value) not in kinds:
        _bad_entry(name, f"{key} = {shown(value)} is no {'text' if str in kinds else 'number'}")
    return value


def _same_robot(name: str, found: str | None, said: str) -> str:
    """The embodiment that is ``said`` of an item, whose file of actions may say its own; CX611 where they differ."""
    robot = embodiment(said, None)
    if found is not None and embodiment(found, None).domain != robot.domain:
        raise UserError("CX611", f"{name}: its actions are of `{found}`, not of `{said}`", "correct one of them")
    return robot.name


def entry_name(name: str, entry: Mapping[str, Any]) -> str:
    """``name``, and what the entry calls itself."""
    own = entry.get("name")
    return f"{name} ({own[:60]})" if isinstance(own, str) and own.isprintable() else name


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return parse_object(line.encode())
    except ValueError as error:
        raise UserError("CX340", f"{path}, line {number}: {error}", "one JSON object a line") from error


def _checked(path: Path, number: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError("CX340", f"{path}: entry {number} is {type(entry).__name__}, not an object")
    return entry


def _bad_entry(name: str, what: str, hint: str = "") -> NoReturn:
    raise UserError("CX340", f"{name}: {what}", hint)


def _decoded(path: Path) -> str:
    try:
        return files.read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError("CX340", f"cannot read {path}: {files.reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError("CX340", f"{path} is not UTF-8 text") from error


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
