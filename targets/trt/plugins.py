"""This project's kernels as ahead-of-time plugins of TensorRT: how a builder is told of those in a bundle.

TensorRT puts their machine code into the engine; a runtime needs neither this module nor Triton. `tensorrt.plugin`
(11.4) asks for functions with one annotated parameter per tensor, so that these are made to look like that.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Any

from cosmos_export import files
from cosmos_export.bundle.strict import StrictError, decode, parse_object
from cosmos_export.diagnostics import shown
from cosmos_export.kernels.description import DOCUMENT, NAMESPACE, PluginDocument, PluginRecord, Size, evaluate

_TYPES = {"bf16": "BF16", "fp16": "HALF", "fp32": "FLOAT", "fp8": "FP8"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_MOST_NESTED, _MOST_THREADS, _MOST_SHARED = 8, 1024, 1 << 20


def parse_document(data: bytes) -> tuple[PluginRecord, ...]:
    """The plugins that ``plugins.json`` describes; StrictError where it is not as `document_text` writes it."""
    document = decode(PluginDocument, parse_object(data))
    if document.namespace != NAMESPACE:
        raise StrictError("namespace", f"{shown(document.namespace)} is not {NAMESPACE}")
    names = [record.name for record in document.plugins]
    for i, record in enumerate(document.plugins):
        for problem in _problems(record, names):
            raise StrictError(f"plugins[{i}]", problem)
    return document.plugins


def read_document(folder: Path) -> tuple[PluginRecord, ...]:
    """The plugins in ``folder``; StrictError as `parse_document`."""
    return parse_document(files.read_bytes(folder / DOCUMENT))


def _problems(record: PluginRecord, names: Sequence[str]) -> Iterator[str]:
    for name in (record.name, record.entry):
        if not _NAME.fullmatch(name):
            yield f"{shown(name)} is not a name"
    if names.count(record.name) > 1:
        yield f"{record.name} is there twice"
    for kind in (*record.inputs, *(output.type for output in record.outputs)):
        if kind not in _TYPES:
            yield f"{shown(kind)} is not one of {', '.join(_TYPES)}"
    if not 1 <= record.threads <= _MOST_THREADS or not 0 <= record.shared_bytes <= _MOST_SHARED:
        yield f"{record.threads} threads with {record.shared_bytes} bytes"
    if len(record.grid) != 3 or not record.outputs:
        yield f"a grid of {len(record.grid)} sizes and {len(record.outputs)} outputs"
    for size in (*record.integers, *record.grid, *(size for output in record.outputs for size in output.shape)):
        if not _is_size(size, len(record.inputs)):
            yield f"{shown(size)} is not a size"


def _is_size(size: Any, inputs: int, depth: int = 0) -> bool:
    if _is_number(size):
        return True
    if not isinstance(size, tuple | list) or not 2 <= len(size) <= 9 or depth > _MOST_NESTED:
        return False
    kind, *operands = size
    if kind == "size":
        return len(operands) == 2 and all(map(_is_number, operands)) and operands[0] < inputs
    if kind == "cdiv":
        return len(operands) == 2 and _is_size(operands[0], inputs, depth + 1) and _is_divisor(operands[1])
    return kind == "product" and all(_is_size(operand, inputs, depth + 1) for operand in operands)


def _is_divisor(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


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
