"""The reasoner of the micro world: questions about pictures, asked through the stock transformers model.

The model shares the weights of the reasoner's tower with the transformer in training, so that captions of the pipeline
and answers about pictures are learned by one tower; only the vision encoder is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.microworld import model, text, world
from cosmos_export.checkpoint import demo_components
from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.published import PUBLISHED

VISION = {"hidden_size": 64, "intermediate_size": 128}
PATCH, MERGE, TEMPORAL = 16, 2, 2
TOKENS = (world.SIZE // PATCH // MERGE) ** 2
"""Tokens of a picture behind the vision encoder."""
CLEAR = 4.0
"""How far from the middle, in pixels, a shape is before its half is asked for."""


def geometry() -> Geometry:
    """The transformer's sizes as this project states them."""
    known = {name: value for name, value in model.CONFIG.items() if hasattr(PUBLISHED["nano"], name)}
    known.pop("rope_scaling", None)
    sections = tuple(model.CONFIG["rope_scaling"]["mrope_section"])
    return replace(PUBLISHED["nano"], **known, rope_axes_dim=sections)


def config() -> dict[str, Any]:
    """The root ``config.json``: the demo checkpoint's, with a wider vision encoder."""
    found, _ = demo_components.reasoner(geometry(), "BF16")
    vision: dict[str, Any] = {**found["vision_config"], **VISION}
    return {**found, "vision_config": vision}


def make(transformer: Any, seed: int = 0) -> Any:
    """The stock reasoner over the transformer's weights; its vision encoder is new."""
    from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration

    torch.manual_seed(seed + 1)
    found: Any = Cosmos3OmniForConditionalGeneration(Cosmos3OmniConfig(**{**config(), "dtype": "float32"})).float()
    inner = found.model.language_model
    inner.embed_tokens.weight, inner.norm.weight = transformer.embed_tokens.weight, transformer.norm.weight
    found.lm_head.weight = transformer.lm_head.weight
    for target, source in zip(inner.layers, transformer.layers, strict=True):
        for theirs, ours in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("o_proj", "to_out")):
            getattr(target.self_attn, theirs).weight = getattr(source.self_attn, ours).weight
        target.self_attn.q_norm.weight = source.self_attn.norm_q.weight
        target.self_attn.k_norm.weight = source.self_attn.norm_k.weight
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(target.mlp, name).weight = getattr(source.mlp, name).weight
        target.input_layernorm.weight = source.input_layernorm.weight
        target.post_attention_layernorm.weight = source.post_attention_layernorm.weight
    return found


def patches(frame: NDArray[np.uint8]) -> torch.Tensor:
    """A picture [64, 64, 3] as the vision encoder takes it: [16, 1536], twice in time, grouped by merged token."""
    pixels = np.moveaxis(frame.astype(np.float32) / 127.5 - 1, -1, 0)
    grid = world.SIZE // PATCH
    stacked = np.broadcast_to(pixels, (TEMPORAL, *pixels.shape))
    split = stacked.reshape(1, TEMPORAL, 3, grid // MERGE, MERGE, PATCH, grid // MERGE, MERGE, PATCH)
    ordered = split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return torch.from_numpy(np.ascontiguousarray(ordered).reshape(grid * grid, -1))


def truth(question: str, clip: world.Clip, frame: int) -> str | None:
    """The exact answer about a frame; None where the frame is too close to the middle to ask."""
    what, (x, y) = clip.what, clip.centres[frame]
    if question == "what is it?":
        return f"a {what.colour} {what.shape}"
    said: dict[str, bool] = {f"is it {colour}?": what.colour == colour for colour in world.COLOURS}
    said |= {f"is it a {shape}?": what.shape == shape for shape in world.SHAPES}
    for half, place in (("left", x), ("upper", y)):
        if question == f"is it in the {half} half?":
            return None if abs(place - world.SIZE / 2) < CLEAR else ("yes" if place < world.SIZE / 2 else "no")
    return "yes" if said[question] else "no"


def ask(random: np.random.Generator, held_out: bool) -> tuple[world.Clip, int, str, str]:
    """A random clip, a frame of it, a question and its answer; "yes" and "no" are equally frequent."""
    while True:
        clip = world.sample(random, "scene", held_out)
        frame = int(random.integers(world.FRAMES))
        question = text.IMAGE_QUESTIONS[int(random.integers(len(text.IMAGE_QUESTIONS)))]
        colours = [f"is it {colour}?" for colour in world.COLOURS]
        if question in colours and random.random() < 0.34:
            question = f"is it {clip.what.colour}?"
        answer = truth(question, clip, frame)
        if answer is not None:
            return clip, frame, question, answer


def tokens(tokenizer: Any, question: str) -> list[int]:
    """A question about a picture as token ids, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    written: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(written.replace("<|image_pad|>", "<|image_pad|>" * TOKENS)).input_ids
    return ids


def loss(
    found: Any, tokenizer: Any, random: np.random.Generator, count: int = 32
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Cross entropy of the answers to ``count`` questions, and the share of answers whose every token is right."""
    rows, labels, pictures = [], [], []
    for _ in range(count):
        clip, frame, question, answer = ask(random, held_out=False)
        asked = tokens(tokenizer, question)
        told = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
        rows.append(asked + told)
        labels.append([-100] * len(asked) + told)
        pictures.append(patches(world.render_frame(clip, frame)))
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    target = torch.tensor([row + [-100] * (width - len(row)) for row in labels])[:, 1:]
    logits = forward(found, ids, torch.cat(pictures))[:, :-1]
    asked_for = target != -100
    right = ((logits.argmax(-1) == target) | ~asked_for).all(1).float().mean()
    value = functional.cross_entropy(logits[asked_for], target[asked_for])
    return value, {"answer": float(value.detach()), "right": float(right)}


def forward(found: Any, ids: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Logits [N, S, vocabulary] of questions, each with one picture; padding is on the right, where nothing looks."""
    image = found.config.image_token_id
    grid = torch.tensor([[1, world.SIZE // PATCH, world.SIZE // PATCH]] * len(ids))
    logits: torch.Tensor = found(
        input_ids=ids,
        pixel_values=pictures,
        image_grid_thw=grid,
        mm_token_type_ids=(ids == image).int(),
        use_cache=False,
    ).logits
    return logits


Asker = Callable[[list[tuple[NDArray[np.uint8], str]]], list[str]]


def asker(found: Any, tokenizer: Any) -> Asker:
    """Asks a loaded reasoner; answers are greedy and at most 8 tokens."""

    def ask_all(questions: list[tuple[NDArray[np.uint8], str]]) -> list[str]:
        answers = []
        for frame, question in questions:
            ids = torch.tensor([tokens(tokenizer, question)])
            grid = torch.tensor([[1, world.SIZE // PATCH, world.SIZE // PATCH]])
            with torch.no_grad():
                out = found.generate(
                    input_ids=ids, pixel_values=patches(frame).to(found.dtype), image_grid_thw=grid,
                    mm_token_type_ids=(ids == found.config.image_token_id).int(), max_new_tokens=8, do_sample=False,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        return answers

    return ask_all
