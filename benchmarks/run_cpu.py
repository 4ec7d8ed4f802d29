"""A whole request through diffusers' pipeline and through a bundle, on the CPU, in fp32, in one process.

    python benchmarks/run_cpu.py [--sizes tiny,mid] [--steps 12] [--runs 3] [-o FILE.json]
    python benchmarks/run_cpu.py --checkpoint DIR --bundle DIR [--steps 4] [--runs 1]

Both get the same prompts, sigmas and noise, and both decode their frames. What is timed is the pipeline's call and
`Generator.generate` with the decoding of its frames: nothing of loading, and no prompt that was seen before. The runs
alternate; medians are compared. The second form takes a bundle that was built for the schedule or has a host's loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.compiler.driver import build
from cosmos_export.evaluation.pipeline import (
    Published,
    PublishedRequest,
    distances,
    peak_signal_to_noise,
    run_published,
)
from cosmos_export.options import BuildOptions, GenerateOptions
from cosmos_export.runtime import Generator, Result, load_bundle, media
from cosmos_export.runtime.frontend import Prepared, prepare
from cosmos_export.runtime.step_inputs import Noise, sizes
from cosmos_export.sampling import Overrides

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "mid": {"layers": 8, "hidden": 1024, "heads": 16, "kv_heads": 4, "head_dim": 64, "intermediate": 3072,
            "vocab": 4096},
}  # fmt: skip
"""``mid``: 205 M parameters, of which the two towers have 193 M."""
PROFILE = "256p-17f"
PROMPT = "A robot arm folds a red towel on a wooden table, then waits for the next one. "
NEGATIVE = "blurry, shaking, low resolution"


def measure(name: str, checkpoint: Path, bundles: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both, and how far their results are apart. ``bundles``: by how they run the loop."""
    generators = {loop: Generator(load_bundle(path, backend="onnxruntime")) for loop, path in bundles.items()}
    seconds: dict[str, list[float]] = {"diffusers": [], **{loop: [] for loop in bundles}}
    reasoner: list[float] = []
    found: dict[str, tuple[Result, np.ndarray]] = {}
    for run in range(arguments.runs + 1):  # the first warms up
        prompt = f"{PROMPT * arguments.prompt} Take {run}."
        for loop, generator in generators.items():
            prepared = ask(generator, prompt, arguments)
            started = time.perf_counter()
            result = generator.generate(prepared.request)
            frames = np.concatenate([media.as_unit(chunk) for chunk in result.video()])
            if prepared.request.sound:
                result.sound()
            seconds[loop].append(time.perf_counter() - started)
            found[loop] = (result, frames)
            reasoner.append(result.timings["reasoner"] / (1 if prepared.request.negative_ids is None else 2))
        expected = published(checkpoint, prepared, prompt, generator)
        seconds["diffusers"].append(expected.seconds)
    times = {who: median(values[1:]) for who, values in seconds.items()}
    plan, first = prepared.request.schedule, next(iter(bundles))
    passes = plan.steps + sum(plan.guided)
    once = median(reasoner[1:])
    row = {
        "size": name,
        "steps": plan.steps,
        "passes": passes,
        "prompt_tokens": len(prepared.request.input_ids),
        "generated_rows": int(np.prod([prepared.request.height // 2, prepared.request.width // 2]))
        * ((prepared.request.frames - 1) // 4 + 1),
        "seconds": times,
        "ratio": {loop: times["diffusers"] / times[loop] for loop in bundles},
        "reasoner_pass_s": once,
        "reasoner_saved_s": once * (passes - 2),
        "reasoner_saved_share": once * (passes - 2) / (times[first] + once * (passes - 2)),
        "latents_relative_l2": {
            loop: max(distances(result.latents, expected.latents).values()) for loop, (result, _) in found.items()
        },
        "frames_psnr_db": {loop: psnr(frames, expected) for loop, (_, frames) in found.items()},
    }
    if len(found) == 2:
        (one, _), (other, _) = found.values()
        row["host_against_device_relative_l2"] = distances(one.latents, other.latents)["vision"]
    return row


def ask(generator: Generator, prompt: str, arguments: argparse.Namespace) -> Prepared:
    manifest = generator.bundle.manifest
    device = bool(manifest.loop and manifest.loop.segments)
    sampling = Overrides() if device else Overrides(steps=arguments.steps)
    sound = manifest.profiles[0].dims["sound_len"].min > 0
    return prepare(
        GenerateOptions(prompt, NEGATIVE, mode="t2v", sampling=sampling, seed=1, sound=sound), generator.bundle.files
    )


def published(checkpoint: Path, prepared: Prepared, prompt: str, generator: Generator) -> Published:
    request, record = prepared.request, generator.bundle.manifest.request
    height, width = prepared.size
    drawn = Noise(request, sizes(request, record)).initial
    noise = [drawn["vision"], *([drawn["sound"]] if request.sound else [])]
    size = {"frames": request.frames, "height": height, "width": width, "fps": request.fps, "sound": request.sound}
    return run_published(checkpoint, PublishedRequest("t2v", prompt, NEGATIVE, request.schedule, noise, **size))


def psnr(frames: np.ndarray, expected: Published) -> float:
    assert expected.frames is not None
    return peak_signal_to_noise(frames, expected.frames)


def built(size: str, work: Path, arguments: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    checkpoint = write_demo_checkpoint(work / size, "omni", **SIZES[size])
    bundles = {}
    for loop in ("host", "device"):
        bundles[loop] = work / f"{size}.{loop}"
        build(
            BuildOptions(
                checkpoint, bundles[loop], profiles=(PROFILE,), modalities=("vision",), loop=loop,  # type: ignore[arg-type]
                steps=arguments.steps, parity="never", components=("vae-decoder", "tokenizer"),
            )
        )  # fmt: skip
    return checkpoint, bundles


def show(row: dict[str, Any]) -> None:
    theirs = row["seconds"]["diffusers"]
    for loop, ratio in row["ratio"].items():
        print(
            f"| {row['size']} | {loop} | {theirs:.2f} s | {row['seconds'][loop]:.2f} s | {ratio:.2f} "
            f"| {row['reasoner_saved_share']:.0%} | {row['latents_relative_l2'][loop]:.1e} "
            f"| {row['frames_psnr_db'][loop]:.0f} dB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,mid")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=8, help="how often the prompt's sentence is repeated")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) != (arguments.bundle is None):
        parser.error("--checkpoint and --bundle go together")
    rows = []
    print("| checkpoint | loop | diffusers | bundle | ratio | reasoner saved | latents apart | frames |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for size in arguments.sizes.split(",") if arguments.bundle is None else ["given"]:
            if arguments.bundle is None:
                checkpoint, bundles = built(size, Path(work), arguments)
            else:
                checkpoint, bundles = arguments.checkpoint, {"given": arguments.bundle}
            rows.append(measure(size, checkpoint, bundles, arguments))
            show(rows[-1])
    if arguments.output:
        tools = {name: metadata.version(name) for name in ("cosmos-export", "torch", "diffusers", "onnxruntime")}
        document = {
            "command": " ".join(["python", *sys.argv]),
            "cpu": platform.processor() or platform.machine(),
            "threads": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "torch": torch.get_num_threads()},
            "tools": tools,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
