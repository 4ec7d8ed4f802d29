"""Objects of a ``.jsonl`` or ``.json`` file as items: the keys of this project, and those of NVIDIA's framework."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from cosmos_export.calibration.items import IMAGES, ClipPart, Item
from cosmos_export.calibration.source_options import rate, whole_number
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.embodiments import embodiment
from cosmos_export.runtime import request_file
from cosmos_export.runtime.embodiments import ActionFile, read_actions
from cosmos_export.runtime.prompts import Prompt, text_prompt

PROMPT_KEYS = set(request_file.PROMPT_KEYS)


def entry_item(name: str, entry: Mapping[str, Any], folder: Path) -> Item:
    """An object of a ``.jsonl`` file or of the framework's ``inputs/omni``. Keys that say nothing here are let be."""
    prompt = next((entry[key] for key in request_file.PROMPT_KEYS if entry.get(key) is not None), None)
    if isinstance(prompt, dict):
        prompt = json.dumps(prompt)
    if not isinstance(prompt, str):
        what = f"prompt = {shown(prompt)} is not text" if prompt is not None else f"no prompt; keys: {shown([*entry])}"
        bad_entry(name, what, f"keys with a prompt: {', '.join(request_file.PROMPT_KEYS)}")
    item = Item(_entry_name(name, entry), text_prompt(prompt))
    for key in request_file.NEGATIVE_KEYS:
        if negative := _said(name, entry, key, str):
            item = replace(item, negative=text_prompt(negative, "negative prompt"))
    for key in request_file.MEDIA_KEYS:
        if value := _said(name, entry, key, str):
            path = folder / value
            if not path.is_file():
                bad_entry(name, f"{key} = {shown(value)} is not a file beside it")
            medium = medium_item(path)
            item = replace(item, image=medium.image, clip=medium.clip)
    if action := _said(name, entry, "action_path", str):
        path = folder / action
        file = model_actions(path)
        item = replace(item, actions=file.values, embodiment=file.embodiment, beside=(path,))
    if domain := _said(name, entry, "domain_name", str):
        item = replace(item, embodiment=_same_robot(name, item.embodiment, domain))
    for key in request_file.MODE_KEYS:
        if mode := _said(name, entry, key, str):
            if (known := request_file.mode_named(mode)) is None:
                bad_entry(name, f"{key} = {shown(mode)}", f"known: {request_file.known_modes()}")
            item = replace(item, mode=known)
    if (fps := _said(name, entry, "fps", int, float)) is not None:
        item = replace(item, fps=rate("fps", str(fps)))
    for key in request_file.FRAMES_KEYS:
        if (frames := _said(name, entry, key, int)) is not None:
            item = replace(item, frames=whole_number("frames", str(frames)))
    return item


def _said(name: str, entry: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """Value of ``entry`` under ``key``, of one of ``kinds``; None where there is none. CX340 for anything else."""
    value = entry.get(key)
    if value is not None and type(value) not in kinds:
        bad_entry(name, f"{key} = {shown(value)} is no {'text' if str in kinds else 'number'}")
    return value


def _same_robot(name: str, found: str | None, said: str) -> str:
    """The embodiment that is ``said`` of an item, whose file of actions may say its own; CX611 where they differ."""
    robot = embodiment(said, None)
    if found is not None and embodiment(found, None).domain != robot.domain:
        raise UserError("CX611", f"{name}: its actions are of `{found}`, not of `{said}`", "correct one of them")
    return robot.name


def _entry_name(name: str, entry: Mapping[str, Any]) -> str:
    """``name``, and what the entry calls itself."""
    own = entry.get("name")
    return f"{name} ({own[:60]})" if isinstance(own, str) and own.isprintable() else name


def medium_item(path: Path) -> Item:
    """The picture or the clip that is in the file ``path``, by its ending."""
    if path.suffix.lower() in IMAGES:
        return Item(path.name, Prompt(""), image=path)
    return Item(path.name, Prompt(""), clip=ClipPart(path))


def model_actions(path: Path) -> ActionFile:
    """Actions in the model's units: a file that says it has those of the data is refused (CX611)."""
    file = read_actions(path)
    if file.units == "raw":
        raise UserError(
            "CX611",
            f"actions in {path}: they are in the units of the data",
            "calibrate with the data set itself, or with what `run` writes without --action-stats",
        )
    return file


def bad_entry(name: str, what: str, hint: str = "") -> NoReturn:
    """CX340 for the entry ``name`` of a file."""
    raise UserError("CX340", f"{name}: {what}", hint)
