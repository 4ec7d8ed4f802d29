"""Names of kernels, and how a plugin of one is described to a builder that has neither torch nor Triton.

A plugin is PTX and a description: types and shapes of its operands, its launch, and the integers it takes, each as an
expression over the sizes of its inputs. The kernel's parameters are the inputs, then the integers (32 bit, no other
scalars), then the outputs; all of them are contiguous.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import mul
from typing import Any

CAPABILITIES = (90, 100, 103, 110, 120)
"""Compute capabilities every kernel is compiled for ahead of time: Hopper; Blackwell in data centres (two), in the
Jetson module and in workstations."""

JOINT_ATTENTION, NORM_QUANTIZE, ACTIVATION_QUANTIZE = "joint-attention", "norm-quantize", "activation-quantize"
QKV_PACK, SAMPLER_STEP, W4A16 = "qkv-pack", "sampler-step", "w4a16"
KERNELS: Mapping[str, str] = {
    NORM_QUANTIZE: "residual sum, RMS norm and FP8 quantization in one pass",
    ACTIVATION_QUANTIZE: "SiLU·up or relu², and FP8 quantization in one pass",
    QKV_PACK: "norms and rotation of query and key, and the value, in one pass over the merged projection",
    SAMPLER_STEP: "guidance and UniPC's corrector and predictor in one pass over the latents",
    W4A16: "products with INT4 weights that are dequantized in registers",
}
"""Kernels, besides attention, that may take the place of a compiler's own code."""
PLUGINS: Mapping[str, str] = {
    JOINT_ATTENTION: "attention over the prompt's K/V in place, in FP8 over any number of keys",
    **{name: text for name, text in KERNELS.items() if name != W4A16},
}
"""Kernels that ``build --kernels`` offers for TensorRT, which has a kernel of its own for products with INT4
weights."""

NAMESPACE = "cosmos_export"
"""Domain of the nodes in a model, and namespace of the plugins in TensorRT's registry."""
PLUGIN_FOLDER, DOCUMENT = "plugins", "plugins.json"
"""Where a bundle has them, and what describes them there."""

Size = int | tuple[Any, ...]
"""A number; ``("size", input, axis)``; ``("cdiv", size, number)``, rounded up; ``("product", size, …)``."""


@dataclass(frozen=True)
class Output:
    """A result of a plugin."""

    type: str
    """``bf16``, ``fp16``, ``fp32`` or ``fp8`` (E4M3)."""
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class PluginRecord:
    """One kernel in one form."""

    name: str
    """The operation in models, and the file ``NAME.ptx``."""
    entry: str
    """The function in the PTX."""
    inputs: tuple[str, ...]
    """Types of the inputs."""
    outputs: tuple[Output, ...]
    integers: tuple[Size, ...]
    grid: tuple[Size, Size, Size]
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class PluginDocument:
    """``plugins.json``."""

    namespace: str
    plugins: tuple[PluginRecord, ...]


def evaluate(size: Size, size_of: Callable[[int, int], Any], cdiv: Callable[[Any, int], Any]) -> Any:
    """``size`` where ``size_of(input, axis)`` is a number, or a symbol that knows ``*`` and which ``cdiv`` divides."""
    if isinstance(size, int):
        return size
    kind, *operands = size
    if kind == "size":
        return size_of(operands[0], operands[1])
    parts = [evaluate(operand, size_of, cdiv) for operand in operands]
    if kind == "cdiv":
        return -(-parts[0] // parts[1]) if isinstance(parts[0], int) else cdiv(parts[0], parts[1])
    if kind == "product":
        return reduce(mul, sorted(parts, key=lambda part: isinstance(part, int)))  # symbols know ``*`` on their right
    raise ValueError(f"a size is {kind!r}, which is not one of size, cdiv, product")


def document_text(records: Sequence[PluginRecord]) -> str:
    """``plugins.json``."""
    return json.dumps(asdict(PluginDocument(NAMESPACE, tuple(records))), indent=1) + "\n"
