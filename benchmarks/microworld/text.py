"""The words of the micro world: its tokenizer, and the prompts as the published pipeline makes them.

The tokenizer is byte-level BPE whose merges are learned from every text of the world, so that a word is a token.
Special tokens are entries of the vocabulary too: an added token gets its id from the size of the model's vocabulary,
not from the id beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.microworld import world
from cosmos_export.checkpoint import demo_components

VOCABULARY = 640
COLOURS = tuple(world.COLOURS)

IMAGE_QUESTIONS = (
    *(f"is it {colour}?" for colour in COLOURS),
    *(f"is it a {shape}?" for shape in world.SHAPES),
    "is it in the left half?",
    "is it in the upper half?",
    "what is it?",
)
ANSWERS = ("yes", "no", *(f"a {colour} {shape}" for colour in COLOURS for shape in world.SHAPES))


def corpus() -> list[str]:
    """Every text that a request of the micro world has in it."""
    captions = [what.caption for what in (*world.COMBINATIONS, *world.TASKS)]
    metadata = "The video is 0.7 seconds long and is of 24 FPS. This video is of 64x64 resolution."
    negated = "The video is not 0.7 seconds long and is not of 24 FPS. This video is not of 64x64 resolution."
    still = "This image is of 64x64 resolution. This image is not of 64x64 resolution."
    systems = [
        f"You are a helpful assistant who will generate {what} from a give prompt." for what in ("videos", "images")
    ]
    action = (
        '{"cinematography": {"framing": "This video is captured from a first-person perspective looking at the '
        'scene."},'
        ' "actions": [{"time": "0:00-0:02", "description": "push."}], "duration": "1s", "fps": 10.0, "resolution":'
        ' {"H": 256, "W": 256}, "aspect_ratio": "1,1"}'
    )
    roles = ["system\nuser\nassistant\n"] * 20
    return captions + [metadata, negated, still, *systems, action] * 40 + roles + [*IMAGE_QUESTIONS, *ANSWERS] * 3


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """At most ``count`` merges of BPE: at each step the most frequent pair, the alphabetically first of equals."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    pieces = {word: list(word) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(pieces[word]):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            pieces[word] = joined
    return merges


def write_tokenizer(folder: Path) -> None:
    """Writes the tokenizer's folder as published: the demo checkpoint's, with the merges of this world."""
    demo_components.write_tokenizer(folder)
    path = folder / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = dict(tokenizer["model"]["vocab"]) | demo_components.token_ids()
    merges = learn_merges(corpus(), VOCABULARY - len(vocabulary))
    kept = []
    for first, second in merges:
        kept.append([first, second])
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer["model"] |= {"vocab": vocabulary, "merges": kept}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as the pipeline loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


class Prompts:
    """Token ids of prompts, by the published pipeline's own rules."""

    def __init__(self, tokenizer: Any) -> None:
        from diffusers import Cosmos3OmniPipeline

        pipeline = object.__new__(Cosmos3OmniPipeline)
        pipeline._internal_dict = {"default_use_system_prompt": True}
        pipeline.text_tokenizer = tokenizer
        pipeline.llm_special_tokens = {
            "start_of_generation": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            "eos_token_id": tokenizer.eos_token_id,
        }
        pipeline.duration_template = "The video is {duration:.1f} seconds long and is of {fps:.0f} FPS."
        pipeline.video_resolution_template = "This video is of {height}x{width} resolution."
        pipeline.image_resolution_template = "This image is of {height}x{width} resolution."
        pipeline.inverse_duration_template = "The video is not {duration:.1f} seconds long and is not of {fps:.0f} FPS."
        pipeline.inverse_video_resolution_template = "This video is not of {height}x{width} resolution."
        pipeline.inverse_image_resolution_template = "This image is not of {height}x{width} resolution."
        self._pipeline = pipeline

    def scene(self, caption: str) -> tuple[list[int], list[int]]:
        """The prompt of a scene and its unconditional one."""
        return self._tokenize(caption, height=world.SIZE, width=world.SIZE, fps=float(world.SCENE_FPS))

    def push(self, caption: str) -> tuple[list[int], list[int]]:
        """The prompt of a push, on the canvas of its embodiment, and the unconditional one."""
        return self._tokenize(
            caption,
            height=256,
            width=256,
            fps=float(world.PUSH_FPS),
            action_mode="policy",
            action_view_point="ego_view",
        )

    def _tokenize(self, caption: str, **options: Any) -> tuple[list[int], list[int]]:
        found = self._pipeline.tokenize_prompt(
            caption, None, num_frames=world.FRAMES, use_system_prompt=True, **options
        )
        return list(found[0]), list(found[1])
