"""Trains the transformer of the micro world: scenes (text, image and video to video, some with sound), pushes (forward
and inverse dynamics, policy) and the reasoner's questions.

    python -m benchmarks.microworld.train FOLDER [--steps N]

Reads ``FOLDER``/vae and ``FOLDER``/latents.safetensors; saves and continues in ``FOLDER``/transformer-state, from where
``assemble`` takes the averaged weights. x_t = (1 − σ) x0 + σ ε and the target is ε − x0, as the published sampler has
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional

from benchmarks.microworld import latents as encoded
from benchmarks.microworld import model, reasoner, sound, state, text, world

PROMPTS, EACH = 8, 8
"""Prompts of a step and samples of each."""
DROPPED = 0.1
"""The share of samples that see the unconditional prompt."""
KARRAS_SHARE = 0.6
ACTION_WEIGHT, SOUND_WEIGHT, TEXT_WEIGHT = 0.5, 0.3, 0.05
FIRST_FRAME_WEIGHT = 2.0
"""The weight of the first latent frame of scenes: a fifth of the tokens, and what everything after it follows from."""
RATE = 2.5e-3


SOUND_BEGINS = 2000
"""The step from which on scenes have sound; before it a shape must first move."""
QUESTION_WEIGHT = 0.3


def kind_of(step: int) -> str:
    """The kind of example that a step trains on."""
    turn = ("scene", "push", "scene", "push", "sound", "question")[step % 6]
    return "scene" if turn == "sound" and step < SOUND_BEGINS else turn


def draw_sigma(count: int, random: np.random.Generator) -> torch.Tensor:
    """Shares of noise: mostly from the density of the published grid, carried on to lower noise, the rest uniform."""
    root = 200 ** (1 / 7) + random.random(count) * (0.05 ** (1 / 7) - 200 ** (1 / 7))
    grid = root**7 / (1 + root**7)
    uniform = random.uniform(0.02, 1, count)
    return torch.from_numpy(np.where(random.random(count) < KARRAS_SHARE, grid, uniform)).float()


@dataclass
class Material:
    """Everything that steps draw from."""

    clips: list[world.Clip]
    latents: torch.Tensor
    """[clips, 16, 5, 4, 4], normalized."""
    actions: torch.Tensor
    """[clips, 16, 8], zero beyond the first two columns and for scenes."""
    sounds: torch.Tensor
    """[clips, 8, 18], the latents of the click."""
    prompts: dict[str, list[int]]
    """Token ids of captions."""
    unconditional: dict[str, list[int]]
    by_caption: dict[str, dict[str, list[int]]]
    """Per kind, the clips of each caption."""
    tokenizer: Any


def load_material(folder: Path) -> Material:
    """Latents with their clips, made again from their seed."""
    stored = load_file(folder / "latents.safetensors")
    scenes, pushes, seed = (int(value) for value in stored["count"])
    if not (folder / "text_tokenizer").is_dir():
        text.write_tokenizer(folder / "text_tokenizer")
    tokenizer = text.load_tokenizer(folder / "text_tokenizer")
    return material_of(encoded.clips(scenes, pushes, seed), stored["latents"].float(), tokenizer)


def material_of(clips: list[world.Clip], latents: torch.Tensor, tokenizer: Any) -> Material:
    """Everything that follows from clips and their latents."""
    prompter = text.Prompts(tokenizer)
    actions = torch.zeros(len(clips), world.CHUNK, model.CONFIG["action_dim"])
    by_caption: dict[str, dict[str, list[int]]] = {"scene": {}, "push": {}}
    for index, clip in enumerate(clips):
        by_caption["scene" if clip.actions is None else "push"].setdefault(clip.caption, []).append(index)
        if clip.actions is not None:
            actions[index, :, : model.ACTION_WIDTH] = torch.from_numpy(clip.actions)
    prompts = {caption: prompter.scene(caption)[0] for caption in by_caption["scene"]}
    prompts |= {caption: prompter.push(caption)[0] for caption in by_caption["push"]}
    return Material(
        clips,
        latents,
        actions,
        torch.stack([sound.latents(clip) for clip in clips]),
        prompts,
        {"scene": prompter.scene("")[1], "push": prompter.push("")[1]},
        by_caption,
        tokenizer,
    )


def pad(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one array, padded on the right, and their lengths."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    return ids, lengths


def noisy(
    clean: torch.Tensor, mask: torch.Tensor, sigma: torch.Tensor, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noised sample, clean where ``mask`` is 0, and the velocity."""
    noise = torch.randn(clean.shape, generator=random)
    level = sigma.view(-1, *[1] * (clean.ndim - 1))
    return torch.where(mask > 0, (1 - level) * clean + level * noise, clean), noise - clean


def generation_loss(
    batched: model.Batched, material: Material, step: int, seed: int
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """The loss of a step of scenes, sound or pushes."""
    random, torch_random = state.randomness(seed + 1, step)
    kind = kind_of(step)
    family = "push" if kind == "push" else "scene"
    captions = list(material.by_caption[family])
    chosen = [captions[index] for index in random.choice(len(captions), PROMPTS, replace=False)]
    ids, lengths = pad([*(material.prompts[caption] for caption in chosen), material.unconditional[family]])
    picked = np.concatenate([random.choice(material.by_caption[family][caption], EACH) for caption in chosen])
    which = torch.arange(PROMPTS).repeat_interleave(EACH)
    count = len(which)
    which = torch.where(torch.from_numpy(random.random(count) < DROPPED), PROMPTS, which)
    sigma = draw_sigma(count, random)
    role = random.random(count)
    vision_mask = torch.ones(count, model.LATENT_FRAMES)
    action_mask = torch.ones(count)
    if family == "scene":  # a half is text to video, then image to video, then video to video
        vision_mask[torch.from_numpy(role > 0.5), 0] = 0
        vision_mask[torch.from_numpy(role > 0.9), 1] = 0
    else:  # forward dynamics, policy, inverse dynamics
        vision_mask[:, 0] = 0
        action_mask[torch.from_numpy(role < 0.35)] = 0
        vision_mask[torch.from_numpy(role > 0.65)] = 0
    index = torch.from_numpy(picked)
    mask = vision_mask[:, None, :, None, None]
    seen, target = noisy(material.latents[index], mask, sigma, torch_random)
    sample = model.Sample(seen, vision_mask, sigma, world.PUSH_FPS if family == "push" else world.SCENE_FPS)
    targets: dict[str, torch.Tensor] = {}
    if family == "push":
        given = material.actions[index]
        seen, targets["action"] = noisy(given, action_mask[:, None, None], sigma, torch_random)
        seen[..., model.ACTION_WIDTH :] = 0
        sample.actions, sample.actions_noisy = seen, action_mask
    if kind == "sound":
        clean = material.sounds[index]
        sample.sound, targets["sound"] = noisy(clean, torch.ones(1, 1, 1), sigma, torch_random)
    prompts = batched.prompts(ids, lengths)
    vision, actions, sounds = batched.velocity(prompts, which, sample)
    weight = mask.clone()
    if family == "scene":
        weight[:, :, 0] *= FIRST_FRAME_WEIGHT
    error = (vision.float() - target) ** 2
    loss = (error * weight).sum() / (weight.sum() * error[0, :, 0].numel())
    figures = {kind: float(loss.detach())}
    if actions is not None:
        width = model.ACTION_WIDTH
        error = (actions.float() - targets["action"])[..., :width] ** 2 * action_mask[:, None, None]
        action_loss = error.sum() / (action_mask.sum() * world.CHUNK * width)
        figures["action"] = float(action_loss.detach())
        loss = loss + ACTION_WEIGHT * action_loss
    if sounds is not None:
        sound_loss = functional.mse_loss(sounds.float(), targets["sound"])
        figures["click"] = float(sound_loss.detach())
        loss = loss + SOUND_WEIGHT * sound_loss
    logits = batched.transformer.lm_head(prompts.hidden[:, :-1]).float()
    real = prompts.real[:, 1:]
    text_loss = functional.cross_entropy(logits[real], ids[:, 1:][real])
    figures["text"] = float(text_loss.detach())
    return loss + TEXT_WEIGHT * text_loss, figures


def train(folder: Path, steps: int, seed: int = 0) -> Any:
    """Trains, or continues."""
    material = load_material(folder)
    transformer = model.make(seed)
    batched = model.Batched(transformer, half=True)
    asked = reasoner.make(transformer, seed)
    weights = dict(transformer.named_parameters())
    weights |= {f"vision.{name}": weight for name, weight in asked.model.visual.named_parameters()}
    training = state.Training(
        folder / "transformer-state", weights, state.adamw(weights, RATE), state.Schedule(steps, RATE, 200, 0.3)
    )
    training.resume()

    def loss_of(step: int) -> tuple[torch.Tensor, Mapping[str, float]]:
        if kind_of(step) == "question":
            value, figures = reasoner.loss(asked, material.tokenizer, state.randomness(seed + 1, step)[0])
            return QUESTION_WEIGHT * value, figures
        return generation_loss(batched, material, step, seed)

    training.run(loss_of, save_every=200)
    return transformer


if __name__ == "__main__":
    state.command(train, __doc__, steps=12000)
