#!/usr/bin/env python
"""Good builds of random checkpoints that no gate may refuse: other sizes, other sizes of weights, both backbones.

    python benchmarks/false_alarms.py [--only N] -o benchmarks/results/false-alarms.json

Each checkpoint is written, its weights are multiplied by the factor of its case, and it is built for the CPU with every
check, in float32, bfloat16 or FP8. A line of the result says the outcome, the worst value of the requests through the
finished bundle, and the seconds of these requests and of the whole build.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.checkpoint.safetensors_header import read_header
from cosmos_export.compiler.calibrate_checkpoint import calibrate_checkpoint
from cosmos_export.compiler.driver import build
from cosmos_export.diagnostics import CosmosExportError
from cosmos_export.options import BuildOptions, CalibrateOptions
from cosmos_export.sampling import Overrides

STEPS = 8
SMALL = {"hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 32, "intermediate": 64}
WIDE = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 192}


@dataclass(frozen=True)
class Subject:
    """A checkpoint and how it is built. ``factor`` multiplies its matrices."""

    variant: str
    dtype: str
    recipe: str = "bf16"
    factor: float = 1.0
    sizes: dict[str, Any] = field(default_factory=dict)


SUBJECTS = (
    Subject("edge", "float32", sizes={**SMALL, "layers": 1}),
    Subject("edge", "bfloat16", sizes={**WIDE, "layers": 2}, factor=0.5),
    Subject("edge", "bfloat16", "fp8", sizes={**WIDE, "layers": 2}),
    Subject("omni", "float32", sizes={**WIDE, "layers": 2}, factor=2.0),
    Subject("omni", "bfloat16", sizes={**SMALL, "layers": 3}),
    Subject("omni", "bfloat16", "fp8", sizes={**SMALL, "layers": 2}),
    Subject("edge", "bfloat16", sizes={"layers": 4, "heads": 8, "kv_heads": 8}),
    Subject("edge", "float32", factor=3.0),
    Subject("omni", "bfloat16", factor=3.0, sizes={"layers": 2}),
    Subject("edge", "bfloat16", "fp8", factor=2.0, sizes={"layers": 2}),
)


def scale(checkpoint: Path, factor: float) -> None:
    """Multiply every matrix of the transformer by ``factor``, where it is."""
    kinds = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
    for path in sorted((checkpoint / "transformer").glob("*.safetensors")):
        for entry in read_header(path).tensors.values():
            if len(entry.shape) == 2:
                values = np.memmap(path, kinds[entry.dtype], "r+", entry.offset, entry.shape)
                values[:] = values * np.asarray(factor, values.dtype)
                values.flush()


def measured(subject: Subject, folder: Path) -> dict[str, Any]:
    """The outcome of one build."""
    checkpoint, bundle, scales = folder / "checkpoint", folder / "bundle", folder / "scales"
    write_demo_checkpoint(checkpoint, subject.variant, dtype=subject.dtype, **subject.sizes)
    scale(checkpoint, subject.factor)
    options: dict[str, Any] = {"target": "cpu", "components": ("none",), "steps": STEPS, "recipe": subject.recipe}
    if subject.recipe != "bf16":
        prompts = folder / "prompts.txt"
        prompts.write_text("A robot arm folds a red towel.\nRain on a window.\n", encoding="utf-8")
        overrides = Overrides(steps=STEPS)
        made = CalibrateOptions(
            checkpoint, scales, (str(prompts),), modalities=("vision",), latents="rollout", overrides=overrides
        )
        calibrate_checkpoint(made)
        options |= {"calibration": scales, "modalities": ("vision",)}
    started = time.perf_counter()
    try:
        result = build(BuildOptions(checkpoint, bundle, **options))
    except CosmosExportError as error:
        return {"outcome": error.code, "message": error.message}
    assert result.manifest is not None
    requests = {m.stage: m.value for m in result.parity if "request" in m.stage}
    return {
        "outcome": "built",
        "verdicts": sorted({v.verdict for v in result.manifest.evaluation}),
        "requests": requests,
        "requests_s": round(result.costs.stages["requests"].seconds, 2),
        "build_s": round(time.perf_counter() - started, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=int, help="the number of one subject")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = []
    for number, subject in enumerate(SUBJECTS):
        if arguments.only not in (None, number):
            continue
        folder = Path(tempfile.mkdtemp(prefix="false-alarms-"))
        try:
            found.append(asdict(subject) | measured(subject, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(found[-1]), flush=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
