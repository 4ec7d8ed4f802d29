"""The micro world's training code beside the published pipeline, processor and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.microworld import evaluate, latents, model, reasoner, sound, state, text, train, vae, world

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("microworld") / "text_tokenizer"
    text.write_tokenizer(folder)
    return text.load_tokenizer(folder)


def test_words_are_tokens(tokenizer: Any) -> None:
    for what in (*world.COMBINATIONS, *world.TASKS):
        ids = tokenizer(what.caption).input_ids
        assert len(ids) == len(what.caption.split()) and tokenizer.decode(ids) == what.caption
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 257
    assert tokenizer("<|im_start|>x").input_ids[0] == 257
    assert len(tokenizer) <= text.VOCABULARY


def test_the_batched_forward_is_the_pipelines(tokenizer: Any) -> None:
    """Every call that the pipeline makes of the transformer, in each mode, beside the same call in a batch."""
    transformer = model.make().eval()
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.startswith(("proj_out", "action_proj_out", "audio_proj_out")):
                weight.normal_(0, 0.1)
    scheduler = diffusers.UniPCMultistepScheduler(
        use_karras_sigmas=True,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        sigma_max=200.0,
        sigma_min=0.147,
    )
    pipe = diffusers.Cosmos3OmniPipeline(
        transformer, tokenizer, vae.make().eval(), scheduler, sound.make().eval(), enable_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    calls: list[tuple[dict[str, Any], Any]] = []
    original = transformer.forward

    def record(**given: Any) -> Any:
        made = original(**given)
        calls.append((given, made))
        return made

    transformer.forward = record
    generate = evaluate.with_pipeline(pipe, steps=2)
    batched = model.Batched(transformer)
    for mode in evaluate.MODES[:-2]:
        generate(evaluate.requests(mode, 1)[0])
        for given, (vision, sounds, actions) in calls[:2]:
            _same(batched, given, vision, sounds, actions)
        assert calls
        calls.clear()


@torch.no_grad()
def _same(batched: model.Batched, given: dict[str, Any], vision: Any, sounds: Any, actions: Any) -> None:
    ids = given["input_ids"][None]
    noisy = torch.zeros(1, model.LATENT_FRAMES)
    noisy[0, given["vision_noisy_frame_indexes"][0]] = 1
    has_action, has_sound = given.get("action_tokens") is not None, given.get("sound_tokens") is not None
    times = given["vision_timesteps"] if len(given["vision_timesteps"]) else given["action_timesteps"]
    sample = model.Sample(given["vision_tokens"][0], noisy, times[:1] / 1000, 10.0 if has_action else 24.0)
    if has_action:
        made = len(given["action_mse_loss_indexes"]) > 0
        sample.actions, sample.actions_noisy = given["action_tokens"][0][None], torch.tensor([float(made)])
    if has_sound:
        sample.sound = given["sound_tokens"][0][None]
    prompts = batched.prompts(ids, torch.tensor([ids.shape[1]]))
    seen, acted, heard = batched.velocity(prompts, torch.zeros(1, dtype=torch.long), sample)
    generated = noisy[:, None, :, None, None].bool().expand_as(seen)
    # Positions of 15,000 in fp32 in the pipeline, small ones here: rotations differ by 1e-3 of a radian at most.
    assert torch.allclose(seen[generated], vision[0][generated], atol=1e-3)
    if has_sound and heard is not None:
        assert torch.allclose(heard[0], sounds[0], atol=1e-3)
    if has_action and acted is not None and sample.actions_noisy is not None and sample.actions_noisy[0]:
        assert torch.allclose(acted[0], actions[0], atol=1e-3)


def test_padding_and_company_change_nothing(tokenizer: Any) -> None:
    """A sample beside others with longer prompts has the velocity that it has alone."""
    prompts = text.Prompts(tokenizer)
    short, long = (
        prompts.scene("a red box moves left fast")[0],
        prompts.scene("a red box moves up slowly and bounces")[0],
    )
    transformer = model.make()
    torch.nn.init.normal_(transformer.proj_out.weight, 0, 0.1)
    batched = model.Batched(transformer)
    vision = torch.randn(2, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    sample = model.Sample(vision, torch.ones(2, 5), torch.tensor([0.3, 0.8]), 24.0)
    with torch.no_grad():
        both = batched.velocity(batched.prompts(*train.pad([short, long])), torch.tensor([0, 1]), sample)[0]
        one = model.Sample(vision[:1], torch.ones(1, 5), torch.tensor([0.3]), 24.0)
        alone = batched.velocity(batched.prompts(*train.pad([short])), torch.tensor([0]), one)[0]
    assert len(short) < len(long) and torch.allclose(both[0], alone[0], atol=1e-5)


def test_pictures_reach_the_reasoner_as_its_processor_cuts_them() -> None:
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(
        patch_size=16, temporal_patch_size=2, merge_size=2, min_pixels=64 * 64, max_pixels=64 * 64,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    random = np.random.default_rng(2)
    for _ in range(3):
        frame = world.render_frame(world.sample(random, "scene", False), 4)
        expected = processor(images=[frame], return_tensors="pt")
        assert torch.allclose(reasoner.patches(frame), expected["pixel_values"], atol=1e-6)
        assert expected["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_the_reasoner_learns_with_the_transformers_weights(tokenizer: Any) -> None:
    transformer = model.make()
    asked = reasoner.make(transformer)
    loss, _ = reasoner.loss(asked, tokenizer, np.random.default_rng(0), count=2)
    loss.backward()
    layer = transformer.layers[0]
    for linear in (layer.self_attn.to_q, layer.self_attn.to_out, layer.mlp.down_proj, transformer.lm_head):
        assert linear.weight.grad is not None and linear.weight.grad.abs().max() > 0
    assert layer.self_attn.add_q_proj.weight.grad is None


def test_answers_are_the_facts() -> None:
    random = np.random.default_rng(3)
    answers = []
    for _ in range(300):
        clip, frame, question, answer = reasoner.ask(random, held_out=False)
        x, y = clip.centres[frame]
        if question == "what is it?":
            assert answer == f"a {clip.what.colour} {clip.what.shape}"
            continue
        claims = {
            "is it in the left half?": x < 32, "is it in the upper half?": y < 32,
            f"is it {clip.what.colour}?": True, f"is it a {clip.what.shape}?": True,
        }  # fmt: skip
        assert (answer == "yes") == claims.get(question, False)
        answers.append(answer)
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_a_run_that_was_stopped_gives_the_same_weights(tmp_path: Path) -> None:
    def run(folder: Path, stops: tuple[int, ...]) -> dict[str, torch.Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            linear = torch.nn.Linear(4, 3)
            weights = dict(linear.named_parameters())
            schedule = state.Schedule(stops[-1], 0.01, warmup=3)
            training = state.Training(folder, weights, state.adamw(weights, 0.01), schedule)
            training.resume()

            def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
                _, random = state.randomness(7, step)
                loss = (linear(torch.randn(5, 4, generator=random)) ** 2).mean()  # noqa: B023
                return loss, {"loss": float(loss.detach())}

            training.run(loss_of, save_every=4, until=stop)
        return training.averaged | weights

    once, twice = run(tmp_path / "a", (12,)), run(tmp_path / "b", (4, 8, 12))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_encoding_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents after an interruption are those of one run, and nothing is encoded twice."""
    monkeypatch.setattr(diffusers.AutoencoderKLWan, "from_pretrained", lambda _: vae.make())
    monkeypatch.setattr(latents, "PART", 4)
    encoded: list[int] = []

    def encode(_: Any, frames: np.ndarray, canvas: int) -> torch.Tensor:
        if len(encoded) == 6 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        encoded.append(canvas)
        return torch.full((16, 5, 4, 4), float(frames.mean()))

    monkeypatch.setattr(latents, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        latents.write(tmp_path, 6, 5)
    (tmp_path / "again").touch()
    latents.write(tmp_path, 6, 5)
    assert len(encoded) == 6 + 11 - 4 and encoded.count(latents.CANVAS) == 5
    means = [float(world.render(clip).mean()) for clip in latents.clips(6, 5, 0)]
    stored = load_file(tmp_path / "latents.safetensors")
    assert stored["count"].tolist() == [6, 5, 0]
    assert stored["latents"][:, 0, 0, 0, 0].tolist() == pytest.approx(means, abs=0.1)


def test_the_loss_of_training_falls(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of every kind on random latents: the loss is finite and falls, and each kind has its figures."""
    monkeypatch.setattr(train, "PROMPTS", 2)
    monkeypatch.setattr(train, "EACH", 2)
    material = train.material_of(train.encoded.clips(40, 40, 0), torch.randn(80, 16, 5, 4, 4), tokenizer)
    transformer = model.make()
    weights = dict(transformer.named_parameters())
    optimizer, batched, found = state.adamw(weights, 1e-3), model.Batched(transformer, half=True), {}
    for step in (0, 1, train.SOUND_BEGINS // 6 * 6 + 10):
        losses = []
        for _ in range(4):
            loss, figures = train.generation_loss(batched, material, step, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
        found[train.kind_of(step)] = set(figures)
    assert found == {
        "scene": {"scene", "text"}, "push": {"push", "action", "text"}, "sound": {"sound", "click", "text"}
    }  # fmt: skip
