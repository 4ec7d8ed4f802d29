"""Codec programs as ONNX files with one weight file for their graphs, run or built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from codec_models import Run, Tensors

from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.program import Program
from cosmos_export.progress import Silent
from cosmos_export.targets.description import load_target
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.weights import layout, write_weights
from cosmos_export.targets.profiles import input_shapes, parse_profile
from cosmos_export.targets.trt.common import EngineReport
from cosmos_export.targets.trt.engine_inspector import PlanGraph, inspect_engine
from cosmos_export.targets.trt.tensorrt_rtx import build_engine


def write_onnx(program: Program, folder: Path, compute: torch.dtype | None = None) -> dict[str, Path]:
    """The graphs of ``program``; equal bindings of several graphs are stored once."""
    folder.mkdir(exist_ok=True)
    stored = layout(node.meta["weight"] for graph in program.graphs.values() for node in graph.weights.values())
    write_weights(folder / "codec.weights", stored, "weights", Silent())
    paths = {name: folder / f"{name}.onnx" for name in program.graphs}
    for name, path in paths.items():
        model = lower(program.graphs[name], stored, "codec.weights", compute=compute)
        path.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(path))
    return paths


def onnx_run(paths: Mapping[str, Path]) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for name, path in paths.items()
    }

    def run(name: str, inputs: Tensors) -> Tensors:
        session = sessions[name]
        results = session.run(None, {k: np.ascontiguousarray(v.numpy()) for k, v in inputs.items()})
        return {output.name: torch.from_numpy(v) for output, v in zip(session.get_outputs(), results, strict=True)}

    return run


def build(
    program: Program, name: str, path: Path, profile: str, decomposable: bool = True
) -> tuple[EngineReport, PlanGraph]:
    """The engine of one graph for compute capability 12.0, and its plan."""
    inputs = program.graphs[name].inputs
    spec = {i: [s if isinstance(s, int) else str(s) for s in spec_of(node).shape] for i, node in inputs.items()}
    report = build_engine(
        path,
        path.with_suffix(".engine"),
        target=load_target("rtx-pro-6000"),
        profiles=[input_shapes(parse_profile(profile), spec)],
        decomposable_attention=decomposable,
    )
    (plan,) = inspect_engine(report.path).graphs
    return report, plan
