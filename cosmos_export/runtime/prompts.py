"""The text of a prompt as the model was trained on it: metadata sentences, system message, JSON caption of an action.

The sentences and their joins are those of diffusers (``Cosmos3OmniPipeline.tokenize_prompt``). A caption of the
official recipe (NVIDIA's cookbooks) is a JSON object in a file; it goes to the model as ``json.dumps`` writes it, and
that recipe adds no sentences, because duration, rate and resolution are fields of the caption.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cosmos_export import files
from cosmos_export.checkpoint.strict_json import parse_object
from cosmos_export.diagnostics import UserError, shown

# The misspelling is part of what the model knows.
SYSTEM_IMAGE = "You are a helpful assistant who will generate images from a give prompt."
SYSTEM_VIDEO = "You are a helpful assistant who will generate videos from a give prompt."

VIEWPOINTS: Mapping[str, str] = {
    "ego_view": "This video is captured from a first-person perspective looking at the scene.",
    "third_person_view": (
        "This video is captured from a third-person perspective looking towards the agent from the front."
    ),
    "wrist_view": "This video is captured from a wrist-mounted camera.",
    "concat_view": "This video contains concatenated views from multiple camera perspectives.",
    "wrist_over_two_view": (
        "This video contains concatenated views from multiple camera perspectives. The top row is from the "
        "wrist-mounted camera. The bottom row contains two horizontally concatenated third-person perspective views of "
        "the scene from opposite sides, with the robot visible."
    ),
    "third_person_beside_wrist_view": (
        "This video contains concatenated views from multiple camera perspectives. The left half shows the "
        "third-person view; the right half shows the wrist-mounted camera."
    ),
}
"""Sentence of each camera perspective of an action."""
DEFAULT_VIEWPOINT = "ego_view"

_ASPECTS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))
_LISTS = (".txt", ".jsonl")
"""Files of many prompts, which `calibrate` reads."""
_DATA = (
    ".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".md", ".parquet", ".pkl", ".pt", ".npy", ".npz", ".safetensors",
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".mp4", ".mov", ".mkv", ".webm", ".avi", ".wav", ".zip", ".tar",
    ".gz", ".mp3", ".flac",
)  # fmt: skip
"""Endings that make one word the name of a file, whether or not it exists."""
REQUEST_OPTIONS: Mapping[str, str] = {
    "prompt": "-p", "caption": "-p", "caption_json": "-p", "negative_prompt": "--negative", "mode": "--mode",
    "model_mode": "--mode", "inference_type": "--mode", "seed": "--seed", "num_frames": "--frames",
    "num_output_frames": "--frames", "height": "--height", "width": "--width", "num_steps": "--steps",
    "num_inference_steps": "--steps", "guidance": "--guidance", "guidance_scale": "--guidance",
    "guidance_interval": "--guidance-interval", "shift": "--shift", "flow_shift": "--shift", "image": "--image",
    "image_path": "--image", "vision_path": "--image", "video": "--video", "video_path": "--video",
    "input_path": "--image", "action_path": "--actions", "domain_name": "--embodiment",
    "view_point": "--viewpoint", "action_chunk_size": "--chunk", "image_size": "--tier",
}  # fmt: skip
"""Keys of requests as NVIDIA's framework and cookbooks write them, and the option of `run` that says the same. Captions
of the official recipe have none of them."""
_CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
_OTHER_DOCUMENTS: Mapping[str, str] = {
    **dict.fromkeys(("prompts", "captions", "requests", "inputs", "samples", "items", "messages"), "a list of prompts"),
    **dict.fromkeys(("q01", "q99", "norm_stats", "mean", "std"), "statistics"),
    **dict.fromkeys(("_class_name", "architectures", "model_type", "weight_map"), "part of a checkpoint"),
    "codebase_version": "part of a data set",
    "schema_version": "the manifest of a bundle",
}
"""Keys that only other documents have, and what those are."""
_SCENE_KEYS = {"resolution", "aspect_ratio", "duration", "fps"}
"""Keys of a caption that have numbers."""
MAX_PROMPT_BYTES = 1 << 20
"""The longest official caption has 15 kB, and the model 262,144 positions."""


@dataclass(frozen=True)
class Prompt:
    """The user's text. ``caption``: a JSON object that needs no sentences added."""

    text: str
    caption: bool = False


def read_prompt(value: str, what: str = "prompt") -> Prompt:
    """The prompt that ``value`` is, or that the file ``value`` holds if it ends in ``.json``.

    CX600 where ``value`` is a file and not a caption: its name is never taken for text. Text that is itself a JSON
    object is a caption.
    """
    ending = "" if "\n" in value else Path(value).suffix.lower()
    if ending == ".json":
        return _read_caption(Path(value), what)
    if ending in _LISTS:
        raise UserError(
            "CX600",
            f"the {what} is the name of a list, {value[-80:]!r}, and a request has one {what}",
            "give its text, or FILE.json with one caption",
        )
    if os.path.lexists(value):
        kind = "a directory" if Path(value).is_dir() else "a file"
        raise UserError(
            "CX600",
            f"the {what} {shown(value[-80:])} is {kind}, not text",
            f"a {what} is text or FILE.json with one caption; end the text with a full stop if it is meant as text",
        )
    if ending in _DATA and len(value.split()) == 1:
        raise UserError(
            "CX600",
            f"the {what} {shown(value[-80:])} is the name of a file that does not exist",
            f"a {what} is text or FILE.json with one caption",
        )
    return text_prompt(value, what)


def _read_caption(path: Path, what: str) -> Prompt:
    try:
        data = files.read_bytes(path, MAX_PROMPT_BYTES)
    except OSError as error:
        raise UserError(
            "CX600", f"cannot read the {what} file {path}: {files.reason(error)}", "a prompt is text or FILE.json"
        ) from error
    try:
        caption = parse_object(data)
    except ValueError as error:
        raise UserError(
            "CX600", f"the {what} file {path} is not a JSON caption: {error}", "a caption is one JSON object in UTF-8"
        ) from error
    _require_caption(caption, f"the {what} file {path}")
    if not _has_words(caption) and not _SCENE_KEYS & caption.keys():
        _no_caption(f"the {what} file {path}", "an object without text")
    return Prompt(json.dumps(caption), caption=True)


def text_prompt(value: str, what: str = "prompt") -> Prompt:
    """The prompt that ``value`` is, whatever it looks like: text of a data set opens no file.

    CX600 where it is a JSON object of another kind than a caption.
    """
    _require_size(len(value.encode("utf-8", "surrogatepass")), what)
    _require_utf8(value, what)
    caption = _object(value)
    if caption is not None:
        _require_caption(caption, f"the {what}")
    return Prompt(value, caption is not None)


def _require_caption(document: Mapping[str, Any], where: str) -> None:
    """CX600 where ``document`` is a request, a list of prompts, or another document, which would be read as a caption
    with everything in it lost."""
    if not document:
        _no_caption(where, "an empty object")
    options = [key for key in document if key in REQUEST_OPTIONS]
    if options:
        given = " ".join(_option(key, document[key]) for key in options)
        _no_caption(where, f"a request ({', '.join(options)})", f"give its parts as options of `run`: {given}")
    for key, meaning in _OTHER_DOCUMENTS.items():
        if key in document:
            _no_caption(where, f"{meaning} (`{key}`)")
    actions = document.get("actions")
    if isinstance(actions, list) and actions and isinstance(actions[0], list):
        _no_caption(where, "a file of actions", "pass it with --actions, and the task as --prompt")


def _option(key: str, value: object) -> str:
    """``value`` as an option of `run`; a long one is left to the reader."""
    text = value if isinstance(value, str) else json.dumps(value)
    option = REQUEST_OPTIONS[key]
    if option == "--image" and Path(text).suffix.lower() in _CLIPS:
        option = "--video"
    return f"{option} {shlex.quote(text) if len(text) <= 40 and text.isprintable() else '…'}"


def _no_caption(where: str, found: str, hint: str = "give text, or FILE.json with one caption") -> NoReturn:
    raise UserError("CX600", f"{where} is no caption: it is {found}", hint)


def _has_words(value: object) -> bool:
    if isinstance(value, str):
        return any(character.isalpha() for character in value)
    if isinstance(value, dict):
        return any(map(_has_words, value.values()))
    return isinstance(value, list) and any(map(_has_words, value))


@dataclass(frozen=True)
class Scene:
    """Subject of a prompt's metadata: pixel frames (1 is an image), pixels, and frames per second."""

    frames: int
    height: int
    width: int
    fps: float

    @property
    def is_image(self) -> bool:
        return self.frames == 1

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def request_texts(
    prompt: Prompt, negative: Prompt, scene: Scene, *, action: str | None = None, metadata: bool | None = None
) -> tuple[str, str]:
    """The prompt and the negative prompt of a request for ``scene`` as the tokenizer gets them.

    ``action``: the viewpoint of an action, whose prompt becomes a caption; None: no action. ``metadata``: whether
    sentences on duration and resolution follow; None: unless the prompt is a caption.
    """
    if action is not None:
        return prompt.text if prompt.caption else action_caption(prompt.text, scene, action), negative.text
    if metadata or (metadata is None and not prompt.caption):
        return with_metadata(prompt.text, scene), with_metadata(negative.text, scene, negative=True)
    return prompt.text, negative.text


def with_metadata(text: str, scene: Scene, *, negative: bool = False) -> str:
    """``text`` and the sentences on duration (not of an image) and resolution; denied in a negative prompt."""
    no = " not" if negative else ""
    if not scene.is_image:
        text = _joined(text, f"The video is{no} {scene.seconds:.1f} seconds long and is{no} of {scene.fps:.0f} FPS.")
    kind = "image" if scene.is_image else "video"
    return _joined(text, f"This {kind} is{no} of {scene.height}x{scene.width} resolution.")


def system_message(scene: Scene) -> str:
    """The system message of a request for ``scene``."""
    return SYSTEM_IMAGE if scene.is_image else SYSTEM_VIDEO


def action_caption(task: str, scene: Scene, viewpoint: str = DEFAULT_VIEWPOINT) -> str:
    """The JSON caption of an action: ``task`` over the whole clip, on a canvas of ``scene``'s size.

    CX602 for a viewpoint that is not in `VIEWPOINTS`.
    """
    if viewpoint not in VIEWPOINTS:
        raise UserError("CX602", f"viewpoint {viewpoint!r}; known: {', '.join(VIEWPOINTS)}")
    task = task.strip()
    if task and not task.endswith((".", "!", "?")):
        task += "."
    minutes, seconds = divmod(round(scene.seconds), 60)
    ratio = scene.width / scene.height
    across, down = min(_ASPECTS, key=lambda a: abs(a[0] / a[1] - ratio))
    return json.dumps(
        {
            "cinematography": {"framing": VIEWPOINTS[viewpoint]},
            "actions": [{"time": f"0:00-{minutes}:{seconds:02d}", "description": task}],
            "duration": f"{math.trunc(scene.seconds)}s",
            "fps": float(scene.fps),
            "resolution": {"H": scene.height, "W": scene.width},
            "aspect_ratio": f"{across},{down}",
        }
    )


def _joined(text: str, sentence: str) -> str:
    text = text.rstrip(".")
    return f"{text}. {sentence}" if text else sentence


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that ``text`` is; None where it is none."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        return parse_object(text.encode())
    except ValueError:
        return None


def _require_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("CX600", f"the {what} is not valid UTF-8", "check the encoding of your terminal") from error


def _require_size(size: int, what: str) -> None:
    if size > MAX_PROMPT_BYTES:
        raise UserError("CX600", f"the {what} has {size:,} bytes; allowed: {MAX_PROMPT_BYTES:,}")
