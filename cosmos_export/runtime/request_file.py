"""Requests in files, as NVIDIA's framework and its cookbooks write them: an object with a prompt and what goes with it.

`run` reads them as its options, and `calibrate` as items of data; the keys are in one place for both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from cosmos_export import files, kinds
from cosmos_export.checkpoint.strict_json import parse_document
from cosmos_export.diagnostics import UserError, shown
from cosmos_export.in_memory import InMemory
from cosmos_export.options import GenerateOptions, Overrides
from cosmos_export.sampling import MODES
from cosmos_export.sampling.action_canvas import ACTION_BINS

MAX_BYTES = 16 * files.MIB
PROMPT_KEYS = ("prompt", "caption", "caption_json", "text", "prompt_en", "positive_prompt")
"""Keys with the prompt of an object; the first that is there is read."""
NEGATIVE_KEYS = ("negative_prompt", "negative", "negative_prompt_en")
MODE_KEYS = ("mode", "model_mode", "inference_type")
MEDIA_KEYS = ("image", "video", "vision_path", "image_path", "video_path", "input_path")
FRAMES_KEYS = ("num_frames", "num_output_frames", "frames", "video_length")
ROBOT_KEYS = ("domain_name", "embodiment")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")

_TEXTS = {**dict.fromkeys(ROBOT_KEYS, "embodiment"), "view_point": "viewpoint", "viewpoint": "viewpoint"}
_COUNTS = {
    **dict.fromkeys(FRAMES_KEYS, "frames"), "seed": "seed", "height": "height", "width": "width",
    "action_chunk_size": "chunk", "chunk": "chunk", "image_size": "tier", "tier": "tier",
}  # fmt: skip
_NUMBERS = {"fps": "fps", "frame_rate": "fps"}
_FLAGS = {"enable_sound": "sound", "sound": "sound", "generate_sound": "sound", "use_system_prompt": "system"}
_STEPS = ("num_steps", "num_inference_steps", "steps")
_SCALES = {
    "guidance": "guidance", "guidance_scale": "guidance", "cfg_scale": "guidance", "shift": "shift",
    "flow_shift": "shift",
}  # fmt: skip
_INTERVAL = "guidance_interval"
_SIZE = ("resolution", "aspect_ratio")
_LABELS = ("name", "id", "comment", "description", "output_path", "save_path")
"""Keys that name a request, and change nothing of it."""
_OTHER = {
    "sound_path": "is conditioned on sound", "audio_path": "is conditioned on sound",
    "control_path": "is a transfer from control clips", "control": "is a transfer from control clips",
    "transfer": "is a transfer from control clips", "hint_keys": "is a transfer from control clips",
    "defaults_file": "takes defaults from another file",
}  # fmt: skip
"""Keys of requests that this version cannot run, and what such a request is."""
_ONLY_REQUESTS = {
    *PROMPT_KEYS, *NEGATIVE_KEYS, *MODE_KEYS, *MEDIA_KEYS, *FRAMES_KEYS, "seed", "num_steps", "num_inference_steps",
    "guidance_scale", "action_path", "domain_name", "view_point", "action_chunk_size", "enable_sound",
}  # fmt: skip
"""Keys that a caption of the official recipe does not have."""


def mode_named(name: str) -> str | None:
    """The mode that ``name`` is, in the words of this project or of the framework; None where it is none."""
    for mode in MODES.values():
        if name in (mode.name, *mode.aliases):
            return mode.name
    return None


def known_modes() -> str:
    """Every name of a mode, with commas between them."""
    return ", ".join(name for mode in MODES.values() for name in (mode.name, *mode.aliases))


def with_request(asked: GenerateOptions) -> tuple[GenerateOptions, tuple[str, ...]]:
    """``asked`` with what the request file says that its prompt names, and notes on what was read of it.

    Options that are given come first. A prompt that is no request file is left as it is. CX600: a file that is one, and
    cannot be read or run as it says.
    """
    if isinstance(asked.prompt, InMemory) or "\n" in asked.prompt:
        return asked, ()
    path = Path(asked.prompt)
    entry = _entry(path) if path.suffix.lower() in (".json", ".jsonl") else None
    if entry is None:
        return asked, ()
    said = _Reader(path, entry)
    given, sampling = said.options()
    if asked.image is not None or asked.video is not None:
        given = {name: value for name, value in given.items() if name not in ("image", "video")}
    defaults = {option.name: option.default for option in fields(GenerateOptions)}
    given = {name: value for name, value in given.items() if getattr(asked, name) == defaults[name] or name == "prompt"}
    sampling = {name: value for name, value in sampling.items() if getattr(asked.sampling, name) is None}
    read = ", ".join([*(name for name in given if name != "prompt"), *sampling])
    notes = [f"{path.name} is a request; read of it, besides the prompt: {read or 'nothing'}"]
    if said.unread:
        notes.append(f"keys of {path.name} that are not read: {', '.join(map(shown, said.unread))}")
    return replace(asked, **given, sampling=replace(asked.sampling, **sampling)), tuple(notes)


def _entry(path: Path) -> dict[str, Any] | None:
    """The one request in the file ``path``; None where it is something else, which its reader judges."""
    try:
        data = files.read_bytes(path, MAX_BYTES)
    except OSError:
        return None
    kind = kinds.of_bytes(data[: kinds.HEAD_BYTES], path)
    if kind is not None and kind.placeholder:
        raise UserError("CX600", f"the prompt file {path} is {kind.what}", kind.hint)
    text = data.removeprefix(b"\xef\xbb\xbf")
    try:
        if path.suffix.lower() == ".jsonl":
            entries = [parse_document(line) for line in text.splitlines() if line.strip()]
        else:
            document = parse_document(text)
            entries = document if isinstance(document, list) else [document]
    except ValueError:
        return None
    if not any(isinstance(entry, dict) and _ONLY_REQUESTS & entry.keys() for entry in entries):
        return None
    if len(entries) != 1:
        raise UserError(
            "CX600",
            f"the prompt file {path} has {len(entries)} requests, and a run makes one",
            "write each into a file of its own and run them one after another; `calibrate --data` reads all of them",
        )
    found: dict[str, Any] = entries[0]
    return found


class _Reader:
    """Keys of one request as fields of `GenerateOptions`."""

    def __init__(self, path: Path, entry: Mapping[str, Any]) -> None:
        self._path, self._entry = path, {key: value for key, value in entry.items() if value is not None}
        known = {*_ONLY_REQUESTS, *_TEXTS, *_COUNTS, *_NUMBERS, *_FLAGS, *_STEPS, *_SCALES, _INTERVAL, *_SIZE, *_LABELS}
        self.unread = tuple(key for key in self._entry if key not in known and key not in _OTHER)

    def options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of `GenerateOptions` and of its `Overrides`."""
        for key, value in self._entry.items():
            if isinstance(value, dict) and {"control_path", "control_weight"} & value.keys():
                self._refuse(f"is a transfer from control clips (`{key}`), which this version cannot do")
            if key in _OTHER and value not in (False, "", [], {}):
                self._refuse(f"{_OTHER[key]} (`{key}`), which this version cannot do", "leave the key out")
        given: dict[str, Any] = {"prompt": InMemory(self._prompt(), f"the prompt of {self._path.name}")}
        if (negative := self._first(NEGATIVE_KEYS)) is not None:
            given["negative"] = InMemory(self._text(*negative), f"the negative prompt of {self._path.name}")
        if (mode := self._first(MODE_KEYS)) is not None:
            name = mode_named(self._text(*mode))
            if name is None:
                self._refuse(f"{mode[0]} = {shown(mode[1])} is not a mode of this version", f"known: {known_modes()}")
            given["mode"] = name
        for key, field in _TEXTS.items():
            self._take(given, field, key, self._text)
        for key, field in _COUNTS.items():
            self._take(given, field, key, self._count)
        for key, field in _NUMBERS.items():
            self._take(given, field, key, self._number)
        for key, field in _FLAGS.items():
            self._take(given, field, key, self._flag)
        given |= self._size("mode" in given and MODES[given["mode"]].acts, given)
        given |= self._media()
        return given, self._sampling()

    def _prompt(self) -> str:
        found = self._first(PROMPT_KEYS)
        if found is None:
            self._refuse("is a request without a prompt", f"keys with a prompt: {', '.join(PROMPT_KEYS)}")
        key, value = found
        return json.dumps(value) if isinstance(value, dict) else self._text(key, value)

    def _sampling(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for key in _STEPS:
            self._take(given, "steps", key, self._count)
        for key, field in _SCALES.items():
            self._take(given, field, key, self._number)
        if (interval := self._entry.get(_INTERVAL)) is not None:
            if not isinstance(interval, list) or len(interval) != 2:
                self._refuse(f"has {_INTERVAL} = {shown(interval)}, which is not two numbers")
            given[_INTERVAL] = tuple(self._number(_INTERVAL, value) for value in interval)
        assert given.keys() <= {option.name for option in fields(Overrides)}
        return given

    def _size(self, acts: bool, given: Mapping[str, Any]) -> dict[str, Any]:
        """Height and width of a tier and an aspect ratio, as in the framework; a tier alone of an action."""
        if "resolution" not in self._entry or "height" in given or "width" in given:
            return {}
        tier = str(self._entry["resolution"]).lower().removesuffix("p")
        if not tier.isdecimal() or int(tier) not in ACTION_BINS:
            known = ", ".join(map(str, ACTION_BINS))
            self._refuse(f"has resolution = {shown(self._entry['resolution'])}; known: {known}")
        if acts:
            return {} if "tier" in given else {"tier": int(tier)}
        text = str(self._entry.get("aspect_ratio", "16,9")).replace(":", ",").split(",")
        if len(text) != 2 or not all(part.strip().isdecimal() and int(part) for part in text):
            self._refuse(f"has aspect_ratio = {shown(self._entry['aspect_ratio'])}, which is not like 16,9")
        ratio = int(text[1]) / int(text[0])
        height, width = min(ACTION_BINS[int(tier)], key=lambda size: abs(size[0] / size[1] - ratio))
        return {"height": height, "width": width}

    def _media(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for key in (*MEDIA_KEYS, "action_path"):
            if (value := self._entry.get(key)) is None:
                continue
            name = self._text(key, value)
            if "://" in name:
                self._refuse(
                    f"has {key} = {shown(name)}, which is not on this machine", "download it, and give its name"
                )
            path = self._path.parent / name
            if not path.is_file():
                self._refuse(
                    f"has {key} = {shown(name)}, which is not a file beside it", "names are relative to the file"
                )
            field = "actions" if key == "action_path" else "video" if path.suffix.lower() in CLIPS else "image"
            given[field] = path
        return given

    def _take(self, given: dict[str, Any], field: str, key: str, read: Any) -> None:
        if key in self._entry and field not in given:
            given[field] = read(key, self._entry[key])

    def _first(self, keys: tuple[str, ...]) -> tuple[str, Any] | None:
        return next(((key, self._entry[key]) for key in keys if key in self._entry), None)

    def _text(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            self._refuse(f"has {key} = {shown(value)}, which is not text")
        return value

    def _count(self, key: str, value: Any) -> int:
        if type(value) is not int and not (isinstance(value, str) and value.isdecimal()):
            self._refuse(f"has {key} = {shown(value)}, which is not a whole number")
        return int(value)

    def _number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float):
            self._refuse(f"has {key} = {shown(value)}, which is not a number")
        return float(value)

    def _flag(self, key: str, value: object) -> bool:
        if not isinstance(value, bool):
            self._refuse(f"has {key} = {shown(value)}, which is neither true nor false")
        return value

    def _refuse(self, what: str, hint: str = "correct the file, or give the prompt as text") -> NoReturn:
        raise UserError("CX600", f"the request {self._path} {what}", hint)
