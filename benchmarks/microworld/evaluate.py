"""Scores a checkpoint (through the published pipeline) or a bundle on the micro world.

    python -m benchmarks.microworld.evaluate CHECKPOINT|BUNDLE [--clips N] [--modes t2v,i2v,…] -o FILE

The mode `codec` passes true clips through the video autoencoder: no other mode can score better, and a folder in which
only the autoencoder is trained has it too. Every request follows from a seed, and its noise too, so that two runs and
two implementations see the same noise. Captions are combinations that training never saw, unless ``--captions trained``
asks for the others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.microworld import checks, reasoner, text, world

MODES = ("t2v", "i2v", "v2v", "sound", "forward dynamics", "inverse dynamics", "policy", "reasoner", "codec")
SCENES = ("t2v", "i2v", "v2v", "sound", "codec")
STEPS = 35
GUIDANCE = {"t2v": 3.0, "sound": 3.0}
"""By mode; 1 elsewhere."""
GIVEN_FRAMES = 5
"""Frames of a video that is continued: two latent frames."""
SEED = 20_000


@dataclass(frozen=True)
class Request:
    """A request. The clip has the caption, the given frames and actions, and the true answer."""

    mode: str
    clip: world.Clip
    seed: int

    def noise(self, kind: str, shape: Sequence[int]) -> NDArray[np.float32]:
        """The initial noise of "vision", "sound" or "action"."""
        number = ("vision", "sound", "action").index(kind)
        return np.random.default_rng([self.seed, number]).standard_normal(tuple(shape)).astype(np.float32)


@dataclass(frozen=True)
class Generated:
    """The answer to a request: frames [17, 64, 64, 3], sound [2, samples] at 48 kHz, actions [16, 2]."""

    frames: NDArray[np.uint8] | None
    sound: NDArray[np.float32] | None = None
    actions: NDArray[np.float64] | None = None


Generate = Callable[[Request], Generated]


def requests(mode: str, count: int, held_out: bool = True) -> list[Request]:
    """The requests of a mode. Captions of random pushes are all trained; their starts and pushes are new."""
    random = np.random.default_rng([SEED, MODES.index(mode)])
    found = []
    for index in range(count):
        if mode in SCENES:
            clip = world.sample(random, "scene", held_out)
        else:
            wanted = [
                what
                for what in world.TASKS
                if (what.goal is None) == (mode != "policy") and (what.goal is None or what.held_out == held_out)
            ]
            clip = world.push(wanted[int(random.integers(len(wanted)))], random)
        found.append(Request(mode, clip, SEED + 1000 * MODES.index(mode) + index))
    return found


def score(request: Request, made: Generated) -> tuple[dict[str, bool], dict[str, float]]:
    """The checks of a generated clip, and its figures."""
    clip = request.clip
    if request.mode == "inverse dynamics":
        assert made.actions is not None and clip.actions is not None
        error = np.abs(made.actions - clip.actions)
        known = checks.identifiable(clip)
        names = [f"action {row}.{column}" for row, column in zip(*np.nonzero(known), strict=True)]
        return dict(zip(names, (error[known] <= checks.ACTION).tolist(), strict=True)), {
            "action error": float(np.median(error[known]))
        }
    assert made.frames is not None
    seen = checks.observe(made.frames)
    if isinstance(clip.what, world.Combination):
        found = checks.scene_checks(clip.what, seen)
        if request.mode == "sound":
            assert made.sound is not None
            found |= checks.click_checks(clip.what, seen, made.sound)
        if request.mode in ("t2v", "sound"):
            return found, {}
    else:
        found = {
            "visible": int(seen.visible.sum()) >= checks.MOST + 1,
            "colour": sum(colour == clip.what.colour for colour in seen.colours) >= checks.MOST,
            "shape": sum(shape == clip.what.shape for shape in seen.shapes) >= checks.MOST,
            "rigid": int(seen.rigid.sum()) >= checks.MOST,
        }
    if request.mode == "policy":
        assert made.actions is not None and isinstance(clip.what, world.Task) and clip.what.goal is not None
        path = world.execute(clip.centres[0], np.clip(made.actions, -1, 1))
        error = checks.position_error(seen, path)
        found |= {"goal": world.reached(clip.what.goal, path), "clip and actions agree": error <= 2 * checks.POSITION}
        return found, {"clip and actions": error}
    error = checks.position_error(seen, clip.centres)
    return {**found, "position": error <= checks.POSITION}, {"position error": error}


def evaluate(generate: Generate, mode: str, count: int, held_out: bool = True) -> dict[str, Any]:
    """The scores of a mode as a document."""
    begin, results, figures = time.perf_counter(), [], []
    for request in requests(mode, count, held_out):
        found, measured = score(request, generate(request))
        results.append(found)
        figures.append(measured)
    shares = checks.table(results) if mode != "inverse dynamics" else {"all": checks.pooled(results)}
    return {
        "clips": count,
        "seconds per clip": round((time.perf_counter() - begin) / count, 2),
        "checks": {name: share.document() for name, share in shares.items()},
        **{
            f"median {name}": round(float(np.median([row[name] for row in figures])), 3)
            for name in (figures[0] if figures else {})
        },
    }


def evaluate_reasoner(ask: reasoner.Asker, count: int, held_out: bool = True) -> dict[str, Any]:
    """The share of questions about pictures whose answer is exactly right, by question."""
    random = np.random.default_rng([SEED, MODES.index("reasoner")])
    asked = [reasoner.ask(random, held_out) for _ in range(count)]
    begin = time.perf_counter()
    answers = ask([(world.render_frame(clip, frame), question) for clip, frame, question, _ in asked])
    kinds = {"what is it?": "what is it?"}
    results = [
        {kinds.get(question, question.split()[-1].rstrip("?") if " half" not in question else "half"): answer == truth}
        for (_, _, question, truth), answer in zip(asked, answers, strict=True)
    ]
    return {
        "clips": count,
        "seconds per clip": round((time.perf_counter() - begin) / count, 3),
        "checks": {name: share.document() for name, share in checks.table(results).items()},
    }


# -- the published pipeline -------------------------------------------------------------------------------------------


def pipeline(checkpoint: Path, steps: int = STEPS, precision: str = "float32") -> Generate:
    """Generates with diffusers' pipeline."""
    import torch
    from diffusers import Cosmos3OmniPipeline

    loaded = Cosmos3OmniPipeline.from_pretrained(checkpoint, torch_dtype=getattr(torch, precision))
    loaded.set_progress_bar_config(disable=True)
    return with_pipeline(loaded, steps)


def with_pipeline(loaded: Any, steps: int = STEPS) -> Generate:
    """Generates with a pipeline that is loaded."""
    import torch
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
    from PIL import Image

    def generate(request: Request) -> Generated:
        true = [Image.fromarray(frame) for frame in world.render(request.clip)]
        options: dict[str, Any] = {
            "num_inference_steps": steps, "guidance_scale": GUIDANCE.get(request.mode, 1.0), "output_type": "np",
        }  # fmt: skip
        if request.mode in SCENES:
            options |= {"num_frames": world.FRAMES, "height": world.SIZE, "width": world.SIZE, "fps": world.SCENE_FPS}
            options |= {
                "i2v": {"image": true[0]}, "v2v": {"video": true[:GIVEN_FRAMES]}, "sound": {"enable_sound": True},
            }.get(request.mode, {})  # fmt: skip
        else:
            mode = request.mode.replace(" ", "_")
            given = torch.tensor(request.clip.actions, dtype=torch.float32) if mode == "forward_dynamics" else None
            media = {"video": true} if mode == "inverse_dynamics" else {"image": true[0]}
            condition = CosmosActionCondition(mode, world.CHUNK, "pusht", 256, raw_actions=given, **media)
            options |= {"action": condition, "fps": world.PUSH_FPS}
        with _noise_of(request):
            made = loaded(request.clip.caption, **options)
        frames = np.rint(np.asarray(made.video).reshape(-1, *np.asarray(made.video).shape[-3:]) * 255).astype(np.uint8)
        sound = None if made.sound is None else made.sound.float().numpy()
        actions = None if made.action is None else made.action[0].double().numpy()[:, :2]
        return Generated(frames[:, : world.SIZE, : world.SIZE], sound, actions)

    return generate


@contextmanager
def _noise_of(request: Request) -> Iterator[None]:
    """Lets the pipeline draw the request's noise: vision first, then sound or actions."""
    import torch
    from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as module

    kinds = iter(("vision", "sound" if request.mode == "sound" else "action"))

    def drawn(shape: Sequence[int], **_: Any) -> Any:
        return torch.from_numpy(request.noise(next(kinds), shape))

    original = module.randn_tensor
    module.randn_tensor = drawn
    try:
        yield
    finally:
        module.randn_tensor = original


def codec(checkpoint: Path) -> Generate:
    """Gives the true clip back, encoded and decoded by diffusers' autoencoder."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)

    def generate(request: Request) -> Generated:
        true = world.render(request.clip)
        pixels = torch.from_numpy(np.moveaxis(true, -1, 0).astype(np.float32) / 127.5 - 1)[None]
        with torch.no_grad():
            made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
        return Generated(np.rint((np.moveaxis(made.numpy(), 0, -1) + 1) * 127.5).clip(0, 255).astype(np.uint8))

    return generate


def stock_reasoner(checkpoint: Path) -> reasoner.Asker:
    """Asks through transformers."""
    import torch
    from transformers import Cosmos3OmniForConditionalGeneration

    loaded = Cosmos3OmniForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return reasoner.asker(loaded, text.load_tokenizer(checkpoint / "text_tokenizer"))


# -- bundles ----------------------------------------------------------------------------------------------------------


def bundle(path: Path, steps: int = STEPS) -> Generate:
    """Generates with a bundle of this project."""
    import cosmos_export as cx

    model = cx.open(path)
    shapes = {"vision": (1, 16, 5, 4, 4), "sound": (8, 18), "action": (world.CHUNK, 8)}

    def generate(request: Request) -> Generated:
        true = world.render(request.clip)
        mode = "t2v" if request.mode == "sound" else request.mode.replace(" ", "-")
        options: dict[str, Any] = {"mode": mode, "num_inference_steps": steps}
        kinds = ["vision"]
        if request.mode in SCENES:
            options |= {"num_frames": world.FRAMES, "height": world.SIZE, "width": world.SIZE, "fps": world.SCENE_FPS}
            options |= {
                "i2v": {"image": true[0]}, "v2v": {"video": true[:GIVEN_FRAMES]}, "sound": {"enable_sound": True},
            }.get(request.mode, {})  # fmt: skip
            kinds += ["sound"] if request.mode == "sound" else []
        else:
            options |= {"embodiment": "pusht", "tier": 256, "chunk": world.CHUNK}
            if mode == "inverse-dynamics":
                options |= {"video": true}
                kinds = []
            else:
                options |= {"image": true[0]}
            if mode == "forward-dynamics":
                options |= {"actions": np.asarray(request.clip.actions, dtype=np.float32)}
            else:
                kinds += ["action"]
        noise = {kind: request.noise(kind, shapes[kind]) for kind in kinds}
        if "action" in noise:
            noise["action"][:, 2:] = 0
        made = model.generate(
            request.clip.caption, guidance_scale=GUIDANCE.get(request.mode, 1.0), noise=noise, **options
        )
        frames = None if mode == "inverse-dynamics" else np.asarray(made.frames)[:, : world.SIZE, : world.SIZE]
        actions = None if made.actions is None else np.asarray(made.actions, dtype=np.float64)[:, :2]
        return Generated(frames, made.sound, actions)

    return generate


# -- the command ------------------------------------------------------------------------------------------------------


def run(source: Path, modes: Sequence[str], count: int, held_out: bool, steps: int = STEPS) -> dict[str, Any]:
    """The document of a checkpoint or a bundle."""
    found: dict[str, Any] = {}
    generate: Generate | None = None
    for mode in modes:
        if mode == "reasoner":
            found[mode] = evaluate_reasoner(stock_reasoner(source), count, held_out)
        elif mode == "codec":
            found[mode] = evaluate(codec(source), mode, count, held_out)
        else:
            if generate is None:
                generate = bundle(source, steps) if (source / "manifest.json").is_file() else pipeline(source, steps)
            found[mode] = evaluate(generate, mode, count, held_out)
        print(mode, json.dumps(_brief(found[mode])), flush=True)
    return {"captions": "held out" if held_out else "trained", "steps": steps, "modes": found}


def _brief(document: Mapping[str, Any]) -> dict[str, Any]:
    shares = {name: share["share"] for name, share in document["checks"].items()}
    return {**shares, **{name: value for name, value in document.items() if name.startswith("median")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--modes", help="names with commas between them; default: all that the source has")
    parser.add_argument("--captions", choices=("held-out", "trained"), default="held-out")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    held_out = arguments.captions == "held-out"
    is_bundle = (arguments.source / "manifest.json").is_file()
    modes = [mode for mode in MODES if not is_bundle or mode not in ("reasoner", "codec")]
    modes = arguments.modes.split(",") if arguments.modes else modes
    document = run(arguments.source, modes, arguments.clips, held_out, arguments.steps)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
