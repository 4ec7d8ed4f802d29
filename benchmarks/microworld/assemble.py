"""Puts the trained parts together as a checkpoint in the published layout.

    python -m benchmarks.microworld.assemble FOLDER OUTPUT [--random]

Reads what the training scripts left in FOLDER; a transformer still in training gives the average of its weights so far.
``--random`` leaves the transformer and the vision encoder as they were before training: the zero of every score.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.microworld import model, reasoner, text
from cosmos_export.checkpoint import demo_components
from cosmos_export.checkpoint.safetensors_writer import write_json

TRANSFORMER = "diffusion_pytorch_model.safetensors"


def averages(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The averaged weights of a training and how far it is."""
    progress = json.loads((folder / "progress.json").read_text())
    stored = load_file(folder / f"state-{progress['step']}.safetensors")
    weights = {name.removeprefix("average."): value for name, value in stored.items() if name.startswith("average.")}
    return weights, progress


def assemble(folder: Path, output: Path, random: bool = False) -> Path:
    """Writes the checkpoint ``output``, which must not exist."""
    output.mkdir(parents=True)
    geometry = reasoner.geometry()
    root = reasoner.config()
    transformer = model.make()
    asked = reasoner.make(transformer)
    vision = {name: value.detach() for name, value in asked.model.visual.state_dict().items() if "inv_freq" not in name}
    weights = dict(transformer.state_dict())
    if not random:
        trained, _ = averages(folder / "transformer-state")
        vision = {name: trained[f"vision.{name}"] for name in vision}
        weights = {name: trained[name] for name in weights}
    (output / "transformer").mkdir()
    (output / "vision_encoder").mkdir()
    write_json(output / "transformer" / "config.json", demo_components.transformer_config(geometry))
    _save(weights, output / "transformer" / TRANSFORMER)
    write_json(output / "vision_encoder" / "config.json", root["vision_config"])
    _save(vision, output / "vision_encoder" / "model.safetensors")
    for part in ("vae", "sound_tokenizer"):
        shutil.copytree(folder / part, output / part)
    text.write_tokenizer(output / "text_tokenizer")
    (output / "scheduler").mkdir()
    write_json(output / "scheduler" / "scheduler_config.json", demo_components.scheduler_config(geometry))
    write_json(output / "model_index.json", demo_components.model_index(geometry))
    write_json(output / "config.json", root)
    places = dict.fromkeys(weights, f"transformer/{TRANSFORMER}")
    places |= dict.fromkeys(vision, "vision_encoder/model.safetensors")
    size = 2 * sum(value.numel() for value in (*weights.values(), *vision.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(output / "model.safetensors.index.json", index)
    return output


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    narrow = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
    save_file(narrow, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--random", action="store_true")
    arguments = parser.parse_args()
    assemble(arguments.folder, arguments.output, arguments.random)


if __name__ == "__main__":
    main()
