"""The cost of recipes and shorter schedules on the micro world: scores, distance from bf16, bytes, predicted time.

    python benchmarks/quality.py CHECKPOINT [--recipes bf16,fp8,…] [--steps 35,18,…] [--clips N] [--modes t2v,i2v,…]
                                 [--work DIR] [-o benchmarks/results/quality.json]

CHECKPOINT is what `python -m benchmarks.microworld.make` writes. Each recipe is calibrated and built for the CPU once,
and runs every request of the suite with the noise that the published pipeline gets; other schedules run on the bf16
bundle. Rows are added to a file that is there. Times are what `plan` predicts for a published size with the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

import cosmos_export as cx
from benchmarks.microworld import evaluate, world

PROFILE = "frames=5,height=4:4:16,width=4:4:16,und_len=1:64:256,sound_len=0:0:18,action_len=0:0:16"
SAMPLES = 128


def prompts(path: Path) -> Path:
    """A file of training captions, for calibration."""
    captions = [what.caption for what in world.COMBINATIONS if not what.held_out]
    path.write_text("\n".join(captions[:: max(1, len(captions) // 32)]) + "\n", encoding="utf-8")
    return path


def build(checkpoint: Path, recipe: str, work: Path) -> Path:
    """The bundle of a recipe, built where it is not there yet. Gates report and do not end it: the scores judge."""
    output = work / f"{recipe}.bundle"
    if output.is_dir():
        return output
    options: dict[str, Any] = {"target": "cpu", "profiles": [PROFILE], "parity": "never", "recipe": recipe}
    if recipe != "bf16":
        scales = work / "scales"
        if not scales.is_dir():
            data = f"{prompts(work / 'prompts.txt')},licence=Apache-2.0,origin=synthetic"
            cx.calibrate(
                checkpoint, scales, data=[data], profile=PROFILE, samples=SAMPLES, latents="rollout",
                modalities=["vision"], frames=world.FRAMES,
            )  # fmt: skip
        options |= {"calibration": scales, "quality": "report", "modalities": ["vision"]}
    cx.compile(checkpoint, output, **options)
    return output


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """PSNR of two clips in decibels; 99 where they are equal."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * float(np.log10(255**2 / error)))


def row(
    generate: evaluate.Generate, reference: evaluate.Generate | None, modes: Sequence[str], clips: int
) -> dict[str, Any]:
    """The scores of each mode, and beside ``reference`` the PSNR of each clip at equal noise."""
    found = {}
    for mode in modes:
        distances: list[float] = []

        def beside(request: evaluate.Request) -> evaluate.Generated:
            made = generate(request)
            if reference is not None and made.frames is not None:
                other = reference(request)
                assert other.frames is not None
                distances.append(psnr(made.frames, other.frames))  # noqa: B023
            return made

        found[mode] = evaluate.evaluate(beside, mode, clips)
        if distances:
            found[mode]["psnr beside bf16"] = {
                "median": round(float(np.median(distances)), 2), "worst": round(min(distances), 2)
            }  # fmt: skip
    return found


def bytes_of(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.rglob("*.weights"))


def predicted(recipe: str, size: str, targets: Sequence[str]) -> dict[str, float | None]:
    """Seconds that `plan` predicts for a published size, by target; None where the recipe does not run there."""
    found: dict[str, float | None] = {}
    for target in targets:
        try:
            fit = cx.plan(size, targets=[target], workloads=["t2v-480p-121f"], recipe=recipe).fits[0]
            found[target] = None if fit.latency is None else round(fit.latency.total_s, 2)
        except cx.CosmosExportError:
            found[target] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipes", default="bf16,fp8,int4")
    parser.add_argument("--steps", default="35,18,12,8")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--modes", default="t2v,i2v")
    parser.add_argument("--work", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    modes, rows = arguments.modes.split(","), {}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bf16 = build(arguments.checkpoint, "bf16", work)
        reference = evaluate.bundle(bf16)
        cases = [(recipe, evaluate.STEPS) for recipe in arguments.recipes.split(",")]
        cases += [("bf16", int(steps)) for steps in arguments.steps.split(",") if int(steps) != evaluate.STEPS]
        for recipe, steps in cases:
            path = build(arguments.checkpoint, recipe, work)
            plain = (recipe, steps) == ("bf16", evaluate.STEPS)
            scores = row(evaluate.bundle(path, steps), None if plain else reference, modes, arguments.clips)
            name = recipe if steps == evaluate.STEPS else f"{recipe}, {steps} steps"
            rows[name] = {
                "scores": scores, "weight bytes": bytes_of(path),
                "predicted seconds, nano 480p": predicted(recipe, "nano", ("h100", "rtx-pro-6000")),
            }  # fmt: skip
            print(name, json.dumps(rows[name]), flush=True)
    if arguments.output:
        before = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
        arguments.output.write_text(json.dumps({**before, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
