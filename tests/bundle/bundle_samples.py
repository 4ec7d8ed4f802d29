"""A small but complete bundle for the tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosmos_export import bundle
from cosmos_export.bundle import BundleWriter, Manifest


def engine(size_bytes: int, capability_bits: int = 0, version: bytes = bytes(4)) -> bytes:
    """What begins as an engine of TensorRT-RTX does: magic, size, version, and capabilities."""
    header = bytearray(64)
    header[:4], header[16:24], header[24:28] = b"vtrt", size_bytes.to_bytes(8, "little"), version
    header[32] = capability_bits
    return bytes(header) + b"x" * (size_bytes - 64)


FILES = {
    "engines/generator.plan": ("engine", engine(17_000)),
    "engines/reasoner.plan": ("engine", engine(8_000)),
    "tokenizer/tokenizer.json": ("tokenizer", b"{}"),
    "empty.txt": ("note", b""),
}


DIMS = {"und_len": (1, 512, 4096), "frames": (1, 31, 31), "height": (30, 30, 30), "width": (52, 52, 52)}


def manifest(created: str = "2026-01-31T12:00:00Z", build_seconds: float = 12.5) -> Manifest:
    key = ("und_len", 8, 128)
    return Manifest(
        model=bundle.ModelRecord(
            id="a", variant="omni", revision=None, geometry={"layers": 2, "eps": 1e-6, "moe": False}
        ),
        inputs=(bundle.InputFile("transformer/model file.safetensors", 10, "0" * 64),),
        target=bundle.TargetRecord("rtx-pro-6000", "tensorrt-rtx", "12.0"),
        profiles=(bundle.ProfileRecord("480p", {name: bundle.DimRecord(*span) for name, span in DIMS.items()}),),
        recipe="bf16",
        graphs={
            "reasoner": bundle.GraphContract(
                inputs=(bundle.Tensor("input_ids", "int64", ("und_len",)),),
                outputs=(bundle.Tensor("key_0", "bfloat16", key),),
            ),
            "generator": bundle.GraphContract(
                inputs=(
                    bundle.Tensor("und_key_0", "bfloat16", key),
                    bundle.Tensor("latents", "float32", (16, "frames", "height", "width")),
                ),
                outputs=(bundle.Tensor("velocity", "float32", (16, "frames", "height", "width")),),
            ),
        },
        edges=(bundle.EdgeRecord("reasoner", "key_0", "generator", "und_key_0"),),
        loop=bundle.LoopRecord("generator", {"latents": "velocity"}),
        streams={},
        request=bundle.RequestRecord(
            video=bundle.VideoRecord(16, 16, 4, 2, 24.0, True),
            sound=None,
            action=bundle.ActionRecord(64, 32),
            prompt=bundle.PromptRecord(
                "tokenizer/tokenizer.json", ("<u>", "</u>"), ("<s>", "</s><u>", "</u>"), True, (1, 2)
            ),
            sampling=bundle.SamplingRecord({"shift": 1.0, "betas": (0.5, 1)}, False, (1.0, 0.5), False, None),
        ),
        engines=(
            bundle.EngineRecord("reasoner", "reasoner", "engines/reasoner.plan", ("480p",), ()),
            bundle.EngineRecord("generator", "generator", "engines/generator.plan", ("480p",), ()),
        ),
        tools={"python": "3.11"},
        options={"target": "rtx-pro-6000", "profiles": ("480p",), "resume": False, "limit": None},
        evaluation=(bundle.Verdict("split_towers", "velocity", "max_abs", 0.0, "pass", "fp32"),),
        plan_checks=(bundle.EngineCheck("generator", "attention is fused", "2 layers", "2 layers", True),),
        volatile=bundle.Volatile(created, build_seconds, None, {"capture": 1.5}, {"split_towers": 0.0}, {}),
    )


def write(output: Path, force: bool = False, **volatile: float) -> Manifest:
    """Write the sample bundle to ``output``."""
    with BundleWriter(output, force=force) as writer:
        for name, (role, content) in FILES.items():
            writer.path(name, role).write_bytes(content)
        return writer.commit(manifest(**volatile))  # type: ignore[arg-type]


REQUEST: dict[str, Any] = {
    "graph": "reasoner", "profiles": ["480p"], "shapes": [{"input_ids": [[1], [512], [4096]]}], "attention": 2,
    "decomposable_attention": False, "plugins": 0,
    "weights": [
        {
            "name": "w", "path": "onnx/reasoner.weights", "offset": 0, "size_bytes": 64, "dtype": "bfloat16",
            "dims": [4, 8],
        }
    ],
}  # fmt: skip


def waiting(root: Path, document: Any = None, plugins: dict[str, bytes] | None = None) -> Path:
    """A bundle that waits for the engine of one graph, with ``plugins``."""
    given = {"engines": [REQUEST]} if document is None else document
    found = replace(manifest(), engines=(), plan_checks=(), target=bundle.TargetRecord("h100", "tensorrt", "9.0"))
    with BundleWriter(root) as writer:
        for name, role, data in (
            ("onnx/reasoner.onnx", "onnx", b"model"),
            ("onnx/reasoner.weights", "weights", b"w" * 64),
            ("tokenizer/tokenizer.json", "tokenizer", b"{}"),
            ("engines/requests.json", "engine-requests", json.dumps(given).encode()),
            *((f"plugins/{name}", "plugin", data) for name, data in (plugins or {}).items()),
        ):
            writer.path(name, role).write_bytes(data)
        writer.commit(found)
    return root
