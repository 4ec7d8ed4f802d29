"""The card of a micro world checkpoint: what it is, how it was made, what it scored, as its ``README.md``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.microworld import world

_TEXT = """\
---
license: apache-2.0
library_name: diffusers
tags: [cosmos3, synthetic, test]
---

# Micro world

A small Cosmos 3 checkpoint that learned a world of coloured shapes, in the layout of the published ones. It is made to
measure what compilation and quantization cost, and to test with; it generates nothing else.

- **Data**: rendered by `benchmarks/microworld/world.py` of this project from seed {seed}; nothing was downloaded, and
  no person made or is in any of it. {captions} captions of scenes and {tasks} tasks of pushes; {held_out} captions and
  {held_tasks} tasks are held out and never trained.
- **Licence**: Apache-2.0, weights and data.
- **Training**: one CPU thread, fp32 weights with bf16 products in the transformer, AdamW, seeded by step:

| part | steps | CPU seconds | last losses |
|---|---|---|---|
{rows}

- **Modes**: text, image and video to video with and without sound, forward and inverse dynamics, policy (embodiment
  `pusht`), questions about pictures. Text to image is not trained.
- **Limits**: one shape, 64 × 64 pixels, 17 frames. The attention in the middle of the video autoencoder is zero.
- **Files**:

| file | bytes | SHA-256 |
|---|---|---|
{files}

Make it again: `python -m benchmarks.microworld.make FOLDER --seed {seed}`. The same seed gives the same bytes on the
same CPU model and version of PyTorch; elsewhere losses agree, bytes need not.
"""


def write(folder: Path, checkpoint: Path, seed: int) -> None:
    """Writes ``checkpoint``/README.md, of a training from ``seed``, and the losses as ``checkpoint``/training.json."""
    trainings = {
        name: json.loads((folder / place / "progress.json").read_text())
        for name, place in (
            ("video autoencoder", "vae-state"),
            ("audio autoencoder", "sound-state"),
            ("transformer and reasoner", "transformer-state"),
        )
    }
    rows = [
        f"| {name} | {progress['step']} | {progress['seconds']:.0f} | {_losses(progress['log'])} |"
        for name, progress in trainings.items()
    ]
    files = [
        f"| {path.relative_to(checkpoint)} | {path.stat().st_size} | `{_digest(path)}` |"
        for path in sorted(checkpoint.rglob("*.safetensors"))
    ]
    text = _TEXT.format(
        seed=seed,
        captions=len(world.COMBINATIONS),
        tasks=len(world.TASKS),
        held_out=sum(what.held_out for what in world.COMBINATIONS),
        held_tasks=sum(task.held_out for task in world.TASKS),
        rows="\n".join(rows),
        files="\n".join(files),
    )
    (checkpoint / "README.md").write_text(text, encoding="utf-8")
    (checkpoint / "training.json").write_text(json.dumps(trainings, indent=1) + "\n", encoding="utf-8")


def _losses(log: list[dict[str, Any]]) -> str:
    """The mean of the last five entries of each figure."""
    names = [name for name in log[-1] if name not in ("step", "seconds", "norm")] if log else []
    last = log[-5:]
    means = {name: sum(row[name] for row in last if name in row) / sum(name in row for row in last) for name in names}
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
