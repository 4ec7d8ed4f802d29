"""Whole requests: a bundle and its runtime against the published pipeline, from the same prompt, media and noise.

Both in fp32 on the CPU. The bundle sees files and text as a user gives them; nothing of the pipeline's goes into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_samples
from run_samples import MARK
from subjects import PROFILE, Subject, Subjects

from cosmos_export import sampling
from cosmos_export.evaluation.parity import PROGRAM_LIMIT
from cosmos_export.evaluation.pipeline import (
    Published,
    PublishedAction,
    PublishedRequest,
    distances,
    peak_signal_to_noise,
    run_published,
)
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime import Generator, Result, media, read_media
from cosmos_export.runtime.frontend import Prepared
from cosmos_export.runtime.step_inputs import Noise, sizes
from cosmos_export.sampling import Overrides

pytestmark = pytest.mark.xdist_group("run-parity")

LIMIT, PSNR = 1e-4, 60.0
HEIGHT, WIDTH, FRAMES = 80, 112, 9
PROMPT, NEGATIVE = "A robot arm folds a red towel.", "blurry, shaking"


@dataclass(frozen=True)
class Mode:
    """What is asked of both: options of the request, and the same for the pipeline."""

    asked: Mapping[str, Any]
    published: Mapping[str, Any]
    sound: bool = False


@cache
def rows() -> np.ndarray:
    return np.linspace(-0.9, 0.9, 80, dtype=np.float32).reshape(8, 10)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    media.write_png(folder / "image.png", run_samples.picture(100, 150)[0], MARK)
    media.write_png(folder / "robot.png", run_samples.picture(150, 330, seed=1)[0], MARK)
    media.write_mp4(folder / "clip.mp4", [run_samples.picture(64, 96, 12)], 24.0, MARK)
    media.write_mp4(folder / "robot.mp4", [run_samples.picture(150, 330, 9)], 10.0, MARK)
    media.write_json(folder / "rows.json", {"actions": rows().tolist()}, MARK)
    return folder


def modes(files: Path) -> dict[str, Mode]:
    size = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    image, robot = (read_media.read_image(files / name) for name in ("image.png", "robot.png"))
    clip, seen = (read_media.read_clip(files / name, 100).frames for name in ("clip.mp4", "robot.mp4"))
    of_umi: dict[str, Any] = {"embodiment": "umi", "chunk": 8, "tier": 256}
    action = {"domain": "umi", "rows": 8, "tier": 256}

    def acting(name: str, asked: dict[str, Any], published: dict[str, Any], **part: Any) -> Mode:
        return Mode(
            {"mode": name, **of_umi, **asked}, {"fps": 10.0, "action": PublishedAction(**action, **part), **published}
        )

    return {
        "t2i": Mode({"mode": "t2i", "height": HEIGHT, "width": WIDTH}, {**size, "frames": 1}),
        "t2v": Mode({**size, "fps": 16.0}, {**size, "fps": 16.0}),
        "sound": Mode({**size, "sound": True}, {**size, "sound": True}, sound=True),
        "i2v": Mode({**size, "image": files / "image.png"}, {**size, "image": image}),
        "v2v": Mode({**size, "frames": 13, "video": files / "clip.mp4"}, {**size, "frames": 13, "video": clip}),
        "policy": acting("policy", {"image": files / "robot.png"}, {"image": robot}),
        "forward-dynamics": acting(
            "forward-dynamics",
            {"image": files / "robot.png", "actions": files / "rows.json"},
            {"image": robot},
            raw=rows(),
        ),
        "inverse-dynamics": acting("inverse-dynamics", {"video": files / "robot.mp4"}, {"video": seen}),
    }


MODES = ("t2i", "t2v", "sound", "i2v", "v2v", "policy", "forward-dynamics", "inverse-dynamics")
CASES = [(backbone, mode) for backbone in ("omni", "edge") for mode in MODES if (backbone, mode) != ("edge", "sound")]


def ask(mode: Mode, **options: Any) -> GenerateOptions:
    sampling = Overrides(steps=5, guidance=3.0)
    return GenerateOptions(PROMPT, NEGATIVE, **{"sampling": sampling, "seed": 11, **mode.asked, **options})


def published(subject: Subject, mode: str, arguments: Mapping[str, Any], prepared: Prepared) -> Published:
    """The pipeline's results for the same request; its noise is the request's own."""
    noise, plan = Noise(prepared.request, sizes(prepared.request, subject.manifest.request)), prepared.request.schedule
    drawn = [noise.initial[name] for name in ("vision", "sound", "action") if noise.initial.get(name, np.empty(0)).size]
    if plan.sampler == "distilled-sde":
        drawn += list(noise.steps(plan.steps)["vision"])
    negative = NEGATIVE if any(plan.guided) else None
    return run_published(subject.checkpoint, PublishedRequest(mode, PROMPT, negative, plan, drawn, **arguments))


def agree(found: Result, expected: Published, prepared: Prepared) -> None:
    """Latents, frames, sound and actions, each within its limit."""
    request = prepared.request
    assert expected.latents["vision"].shape == found.latents["vision"].shape
    errors = distances(found.latents, expected.latents)
    if request.mode != "inverse-dynamics":
        frames = np.concatenate([media.as_unit(chunk) for chunk in found.video()])
        assert expected.frames is not None
        assert len(frames) == request.frames
        assert peak_signal_to_noise(frames, expected.frames) >= PSNR
    if request.sound:
        assert {"vision", "sound"} == set(expected.latents)
        errors |= distances({"waveform": found.sound()}, {"waveform": expected.waveform})
    if request.mode in ("policy", "inverse-dynamics"):
        errors |= distances({"actions": found.actions()}, {"actions": expected.actions})
    assert max(errors.values()) <= LIMIT, errors


def test_every_mode_is_compared() -> None:
    assert {*MODES} - {"sound"} == {*sampling.MODES}


@pytest.mark.parametrize(("backbone", "mode"), CASES)
def test_a_request_is_the_published_one(subjects: Subjects, files: Path, backbone: str, mode: str) -> None:
    case, subject = modes(files)[mode], subjects(backbone)
    prepared = subject.prepare(ask(case))
    found = subject.generator.generate(prepared.request)
    agree(found, published(subject, mode, case.published, prepared), prepared)


@pytest.mark.parametrize("mode", ["t2i", "t2v", "i2v"])
@pytest.mark.parametrize("loop", ["host", "device"])
def test_a_distilled_checkpoint(subjects: Subjects, files: Path, mode: str, loop: str) -> None:
    """Its published pipeline is another one: a stochastic sampler, one branch, clean frames put back each step."""
    case = modes(files)[mode]
    subject = subjects("omni-distilled", loop=loop, mode="t2v", modalities=("vision",))
    prepared = subject.prepare(GenerateOptions(PROMPT, seed=3, **case.asked))
    found = subject.generator.generate(prepared.request)
    agree(found, published(subject, mode, case.published, prepared), prepared)


@pytest.mark.parametrize("interval", [None, (500.0, 900.0)], ids=["every-step", "interval"])
@pytest.mark.parametrize("backbone", ["omni", "edge"])
def test_the_loop_on_the_device_is_the_loop_of_the_host(
    subjects: Subjects, files: Path, backbone: str, interval: Any
) -> None:
    """The same requests through both; with an interval the device runs a chain of loops."""
    options = {"steps": 8, "guidance": 3.0, "guidance_interval": interval, "components": ("vae-encoder", "tokenizer")}
    device, host = subjects(backbone, loop="device", **options), subjects(backbone, loop="host", **options)
    assert device.manifest.loop is not None
    assert len(device.manifest.loop.segments) == (1 if interval is None else 3)
    for name in ("t2v", "policy", "forward-dynamics", "inverse-dynamics"):
        sampling = Overrides(None, 8, None, 3.0, interval)
        request = host.prepare(ask(modes(files)[name], sampling=sampling)).request
        errors = distances(device.generator.generate(request).latents, host.generator.generate(request).latents)
        assert max(errors.values()) <= 1e-6, (name, errors)


@pytest.mark.parametrize("loop", ["host", "device"])
def test_actions_alone(subjects: Subjects, files: Path, loop: str) -> None:
    """A bundle that computes no other velocity: what the pictures are is given, and the last layer has few rows."""
    options = {"steps": 4, "guidance": 3.0, "guidance_interval": (0.0, 1000.0)}
    profiles = (PROFILE.replace("action_len=0:8:16", "action_len=1:8:16"),)
    parts = ("vae-encoder", "tokenizer")
    alone = subjects("omni", loop=loop, outputs=("action_velocity",), profiles=profiles, components=parts,
                     mode="inverse-dynamics", **options)  # fmt: skip
    request = alone.prepare(ask(modes(files)["inverse-dynamics"], sampling=Overrides(**options))).request
    found = alone.generator.generate(request)
    expected = subjects("omni").generator.generate(request)
    assert max(distances(found.latents, expected.latents).values()) <= PROGRAM_LIMIT


def test_a_prompt_is_read_once(subjects: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request with a prompt has its keys and values on the device, and the same results."""
    subject = subjects("omni")
    generator, ran = Generator(subject.generator.bundle), list[str]()
    run = generator._run

    def counted(name: str, *arguments: Any) -> Any:
        ran.append(name)
        return run(name, *arguments)

    monkeypatch.setattr(generator, "_run", counted)
    request = subject.prepare(ask(Mode({"mode": "t2i"}, {}), sampling=Overrides(None, 2, None, 3.0, (0, 1000)))).request
    first, second = generator.generate(request), generator.generate(request)
    assert (ran.count("reasoner"), ran.count("generator")) == (2, 8)  # prompt and negative; steps, branches, requests
    np.testing.assert_array_equal(first.latents["vision"], second.latents["vision"])
    other = Generator(subject.generator.bundle, resident=False).generate(request)
    np.testing.assert_array_equal(first.latents["vision"], other.latents["vision"])
