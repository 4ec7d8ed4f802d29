"""Kernels of ours as ahead-of-time plugins of TensorRT: how a builder is told of those in a bundle.

TensorRT puts their machine code into the engine; a runtime needs neither this module nor Triton. `tensorrt.plugin`
(11.4) asks for functions with one annotated parameter a tensor, so that these are made to look like that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Any

from cosmos_export.kernels.description import NAMESPACE, PluginRecord, Size, evaluate, read_document

_TYPES = {"bf16": "BF16", "fp16": "HALF", "fp32": "FLOAT", "fp8": "FP8"}


def register_plugins(trt: Any, trtp: Any, folder: Path) -> None:
    """Tell the builder ``trt`` and its ``tensorrt.plugin`` of the plugins in ``folder``."""
    for record in read_document(folder):
        _register(trt, trtp, record, (folder / f"{record.name}.ptx").read_bytes())


def _register(trt: Any, trtp: Any, record: PluginRecord, ptx: bytes) -> None:
    identity = f"{NAMESPACE}::{record.name}"
    names = [f"input_{i}" for i in range(len(record.inputs))]

    def sizes(inputs: Sequence[Any], wanted: Sequence[Size]) -> list[Any]:
        return [evaluate(size, lambda i, axis: inputs[i].shape_expr[axis], trtp.cdiv) for size in wanted]

    def describe(*inputs: Any) -> Any:
        results = [
            trtp.from_shape_expr(tuple(sizes(inputs, output.shape)), getattr(trt.DataType, _TYPES[output.type]))
            for output in record.outputs
        ]
        return results[0] if len(results) == 1 else tuple(results)

    def implement(*operands: Any) -> Any:
        inputs = operands[: len(names)]  # behind them the outputs and a tactic, of which there is one
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = sizes(inputs, record.grid)
        launch.block_x, launch.shared_mem = record.threads, record.shared_bytes
        integers = tuple(trtp.SymInt32(value) for value in sizes(inputs, record.integers))
        return record.entry, ptx, launch, trtp.SymIntExprs.from_tuple(integers)

    results: Any = GenericAlias(tuple, (trtp.TensorDesc,) * len(record.outputs))
    answer = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    signed(describe, dict.fromkeys(names, trtp.TensorDesc), results)
    trtp.register(identity)(describe)
    signed(implement, {**dict.fromkeys(names, trtp.TensorDesc), "outputs": results, "tactic": int}, answer)
    trtp.aot_impl(identity)(implement)


def signed(function: Callable[..., Any], parameters: Mapping[str, Any], result: Any) -> None:
    """Show ``function`` with one parameter for each of ``parameters``: TensorRT reads them from the signature."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=result)  # type: ignore[attr-defined]
