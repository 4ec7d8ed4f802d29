"""A bf16 program on disk, quantized one way or another, and what it was lowered to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from captured import captured
from safetensors.torch import save_file
from tiny_cosmos import Case, random_model, request, tiny_config

from cosmos_export.evaluation.models import OnnxModel, Value
from cosmos_export.ir.interpreter import read_weights, run_program
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import WeightSource
from cosmos_export.passes.options import PassOptions, Ranges
from cosmos_export.passes.pipeline import default_passes, passes_of, run_passes
from cosmos_export.precision import schemes
from cosmos_export.progress import Silent
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.weights import layout, read_source, write_weights

SCHEMES = tuple(name for name, scheme in schemes.SCHEMES.items() if scheme.weight is not None)
POLICY = Case("policy", 3, 4, 4, 9, clean=(0,), actions=5, clean_actions=(1, 3))


def sources_on_disk(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, WeightSource]:
    """``tensors`` in a safetensors file, and where each lies."""
    import json

    save_file(tensors, path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: WeightSource(name, path, 8 + length + header[name]["data_offsets"][0], t.dtype, tuple(t.shape))
        for name, t in tensors.items()
    }


def uniform(scheme: str) -> Callable[[str, str, int], tuple[str, ...]]:
    """``scheme`` for every linear."""
    return lambda tower, kind, layer: ("bf16" if kind in ("attention.core", "attention.kv") else scheme,)


class Tiny:
    """A tiny model in bf16: its program, inputs, and the largest input that each linear sees in one request."""

    def __init__(self, backbone: str, folder: Path) -> None:
        self.backbone, self.folder = backbone, folder
        self.config = tiny_config(backbone)
        model = random_model(self.config)
        tensors = {n: p.detach().bfloat16().contiguous() for n, p in model.named_parameters()}
        self.sources = sources_on_disk(folder / "model.safetensors", tensors)
        self.weights = read_weights(read_source)
        self.program = captured(self.config, self.sources)
        run_passes(self.program, default_passes())
        self.inputs = request(self.config, POLICY, dtype=torch.bfloat16)
        self.wide = {n: t.float() if t.dtype is torch.bfloat16 else t for n, t in self.inputs.items()}
        self.ranges = Ranges(self._amax())

    def _amax(self) -> dict[str, float]:
        from cosmos_export.evaluation.gates import observe_inputs

        return observe_inputs(self.program, self.wide, self.weights)

    def assigned(self, over_steps: Any) -> Program:
        return self._after(PassOptions(over_steps=over_steps), "sites")

    def quantized(self, scheme: str, ranges: Ranges | None = None) -> Program:
        return self._after(PassOptions(over_steps=uniform(scheme), ranges=ranges or self.ranges), "sites", "numbers")

    def _after(self, options: PassOptions, *phases: str) -> Program:
        program = self.program.copy()
        run_passes(program, passes_of(options, *phases))
        return program

    def run(self, program: Program) -> dict[str, torch.Tensor]:
        """By the interpreter, in fp32 but for what is quantized."""
        return run_program(program, self.wide, self.weights, compute=torch.float32)

    def models(self, program: Program, compute: torch.dtype | None) -> dict[str, onnx.ModelProto]:
        """Lowered, with their weights beside them in the folder."""
        stored = layout(n.meta["weight"] for g in program.graphs.values() for n in g.weights.values())
        write_weights(self.folder / "weights.bin", stored, "weights", Silent())
        return {name: lower(g, stored, "weights.bin", compute=compute) for name, g in program.graphs.items()}

    def run_onnx(self, program: Program) -> dict[str, torch.Tensor]:
        """In ONNX Runtime, one graph feeding the next."""
        results: dict[str, dict[str, Value]] = {}
        for name, model in self.models(program, torch.float32).items():
            path = self.folder / f"{name}.onnx"
            onnx.save(model, path)
            onnx.checker.check_model(str(path))
            feed = {e.input: results[e.source][e.output] for e in program.edges_into(name)}
            feed |= {i: self.wide[i].numpy() for i in program.free_inputs(name)}
            results[name] = OnnxModel(path)(feed)
        return {k: torch.from_numpy(np.array(v)) for k, v in results[program.loop.body].items()}
