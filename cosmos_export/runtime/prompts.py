"""The text of a prompt as the model was trained on it: metadata sentences, system message, JSON caption of an action.

The sentences and their joins are those of diffusers (``Cosmos3OmniPipeline.tokenize_prompt``). A caption of the
official recipe (NVIDIA's cookbooks) is a JSON object in a file; it goes to the model as ``json.dumps`` writes it, and
that recipe adds no sentences, because duration, rate and resolution are fields of the caption.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cosmos_export.checkpoint.strict_json import parse_object
from cosmos_export.diagnostics import UserError

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
}
"""Sentence of each camera perspective of an action."""
DEFAULT_VIEWPOINT = "ego_view"

_ASPECTS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))
_LISTS = (".txt", ".jsonl")
"""Files of many prompts, which `calibrate` reads."""
MAX_PROMPT_BYTES = 1 << 20
"""The longest official caption has 15 kB, and the model 262,144 positions."""


@dataclass(frozen=True)
class Prompt:
    """What the user wrote. ``caption``: a JSON object that says everything itself."""

    text: str
    caption: bool = False


def read_prompt(value: str, what: str = "prompt") -> Prompt:
    """The prompt that ``value`` is, or that the file ``value`` holds if it ends in ``.json``; CX600 if that is none.

    Text that is itself a JSON object is a caption as it stands.
    """
    if "\n" in value or not value.endswith(".json"):
        if "\n" not in value and value.endswith(_LISTS):
            raise UserError(
                "CX600",
                f"the {what} is the name of a list, {value[-80:]!r}, and a request has one {what}",
                "give its text, or FILE.json with one caption",
            )
        return text_prompt(value, what)
    path = Path(value)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            "CX600", f"cannot read the {what} file {path}: {error.strerror or error}", "a prompt is text or FILE.json"
        ) from error
    _require_size(len(data), f"{what} file {path}")
    try:
        caption = parse_object(data)
    except ValueError as error:
        raise UserError(
            "CX600", f"the {what} file {path} is not a JSON caption: {error}", "a caption is one JSON object in UTF-8"
        ) from error
    return Prompt(json.dumps(caption), caption=True)


def text_prompt(value: str, what: str = "prompt") -> Prompt:
    """The prompt that ``value`` is, whatever it looks like: text of a data set opens no file."""
    _require_size(len(value.encode("utf-8", "surrogatepass")), what)
    _require_utf8(value, what)
    return Prompt(value, _is_object(value))


@dataclass(frozen=True)
class Scene:
    """What the metadata of a prompt speaks of: pixel frames (1 is an image), pixels and frames a second."""

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
    """Both texts of a request for ``scene`` as the tokenizer gets them.

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


def _is_object(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    try:
        parse_object(text.encode())
    except ValueError:
        return False
    return True


def _require_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("CX600", f"the {what} is not valid UTF-8", "check the encoding of your terminal") from error


def _require_size(size: int, what: str) -> None:
    if size > MAX_PROMPT_BYTES:
        raise UserError("CX600", f"the {what} has {size:,} bytes; allowed: {MAX_PROMPT_BYTES:,}")
