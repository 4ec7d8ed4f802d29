"""Kernels as TensorRT launches them: inputs, then integers, then outputs, everything else compiled in.

Each plugin here is a few lines around a kernel: operands are contiguous, so strides are constants, and TensorRT passes
no numbers but 32-bit integers, so those that are none are constants too. A plugin is therefore one form for one model.
`cosmos_export.targets.onnx.plugins` puts them into models, `cosmos_export.targets.trt.plugins` into a builder.

    python -m cosmos_export.kernels.plugins CAPABILITY FOLDER < forms.json

compiles them: in a process of its own, since kernels may be interpreted in the one that wants them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from cosmos_export.diagnostics import ToolError
from cosmos_export.kernels.activation_quantize import TILE as ACTIVATION_TILE
from cosmos_export.kernels.activation_quantize import activation_quantize_kernel
from cosmos_export.kernels.description import (
    CAPABILITIES,
    DOCUMENT,
    Output,
    PluginRecord,
    Size,
    document_text,
    evaluate,
)
from cosmos_export.kernels.joint_attention import FP8_TILES, LOG2E, TILES, joint_attention_kernel
from cosmos_export.kernels.launch import Tile, Variant, tile_of
from cosmos_export.kernels.norm_quantize import norm_quantize_kernel, warps_for
from cosmos_export.kernels.qkv_pack import TILES as PACK_TILES
from cosmos_export.kernels.qkv_pack import qkv_pack_kernel
from cosmos_export.kernels.sampler_step import TILE as SAMPLER_TILE
from cosmos_export.kernels.sampler_step import unipc_step_kernel

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
_TRITON = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "fp8": "*fp8e4nv"}


@triton.jit
def joint_attention_plugin(
    query, key, value, prefix_key, prefix_value, rows, keys, prefix_rows, out,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    joint_attention_kernel(
        query, key, value, prefix_key, prefix_value, out, query, query, query, query, rows, keys, prefix_rows, SCALE,
        0, HEADS * D, D, 1, 0, KV_HEADS * D, D, 1, 0, KV_HEADS * D, D, 1,
        0, KV_HEADS * D, D, 1, 0, KV_HEADS * D, D, 1, 0, HEADS * D, D,
        HEADS // KV_HEADS, D, BLOCK_M, BLOCK_N, False, False, "tf32",
    )  # fmt: skip


@triton.jit
def joint_attention_fp8_plugin(
    query, key, value, prefix_key, prefix_value, q_scales, k_scales, v_scales,
    rows, keys, prefix_rows, value_rows, prefix_value_rows, out,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    joint_attention_kernel(
        query, key, value, prefix_key, prefix_value, out, query, q_scales, k_scales, v_scales,
        rows, keys, prefix_rows, SCALE,
        0, HEADS * D, D, 1, 0, KV_HEADS * D, D, 1, 0, 1, D * value_rows, value_rows,
        0, KV_HEADS * D, D, 1, 0, 1, D * prefix_value_rows, prefix_value_rows, 0, HEADS * D, D,
        HEADS // KV_HEADS, D, BLOCK_M, BLOCK_N, True, False, "tf32",
    )  # fmt: skip


@triton.jit
def norm_quantize_plugin(x, weight, scale, y, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    norm_quantize_kernel(x, x, x, weight, scale, y, scale, EPS, WIDTH, WIDTH, 0, 0, BLOCK, False, False)


@triton.jit
def add_norm_quantize_plugin(
    x, delta, weight, scale, y, total, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    norm_quantize_kernel(x, delta, total, weight, scale, y, scale, EPS, WIDTH, WIDTH, WIDTH, WIDTH, BLOCK, True, False)


@triton.jit
def activation_quantize_plugin(
    x, up, scale, y, OFFSET: tl.constexpr, UP_OFFSET: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    STEP: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    activation_quantize_kernel(
        x + OFFSET, up + UP_OFFSET, scale, y, scale, WIDTH, STRIDE, STRIDE, BLOCK, GATED, False, STEP
    )


@triton.jit
def qkv_pack_plugin(
    merged, q_weight, k_weight, cos, sin, rows, table_rows, q, k, v,
    EPS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    qkv_pack_kernel(
        merged, merged + HEADS * 2 * HALF, merged + (HEADS + KV_HEADS) * 2 * HALF, q_weight, k_weight, cos, sin,
        q, k, v, q_weight, q_weight, q_weight, rows, table_rows, EPS, STRIDE, STRIDE, STRIDE,
        KV_HEADS * 2 * HALF, 2 * HALF, 1, HEADS, KV_HEADS, HALF, ROWS, True, True, False,
    )  # fmt: skip


@triton.jit
def unipc_step_plugin(
    row, cond, uncond, sample, last, m0, m1, mask_a, mask_b, count, inner_a, size_a, inner_b, size_b,
    to_sample, to_last, to_m0, BLOCK: tl.constexpr, GUIDED: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    unipc_step_kernel(
        row, cond, uncond, sample, last, m0, m1, to_sample, to_last, to_m0, sample, mask_a, mask_b,
        count, inner_a, size_a, inner_b, size_b, BLOCK, GUIDED, MASKS, False, False,
    )  # fmt: skip


@dataclass(frozen=True)
class Plugin:
    """One form of a kernel: what TensorRT is told of it, and what is compiled."""

    name: str
    kernel: Any
    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    integers: tuple[Size, ...]
    grid: tuple[Size, Size, Size]
    constants: Mapping[str, Any]
    tile: Tile
    divisible: frozenset[str] = frozenset()

    @property
    def variant(self) -> Variant:
        kinds = [_TRITON[kind] for kind in self.inputs] + ["i32"] * len(self.integers)
        kinds += [_TRITON[output.type] for output in self.outputs]
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        signature = dict(zip(names, kinds, strict=True))
        return Variant(
            self.name, self.kernel, signature, self.constants, self.tile.warps, self.tile.stages, self.divisible
        )


def _size(operand: int, axis: int = 0) -> Size:
    return ("size", operand, axis)


def joint_attention(
    capability: int, *, kind: str, heads: int, kv_heads: int, size: int, scale: float, narrow: bool
) -> Plugin:
    """``joint_attention`` of bf16 or fp16 rows; ``narrow``: of E4M3 with a scale per head, the values transposed as
    [kv_heads, size, rows], where rows are a multiple of 16, and a result in ``kind``."""
    tile = tile_of(FP8_TILES if narrow else TILES, capability)
    constants = {
        "SCALE": scale * LOG2E, "HEADS": heads, "KV_HEADS": kv_heads, "D": size, "BLOCK_M": tile.sizes[0],
        "BLOCK_N": tile.sizes[1],
    }  # fmt: skip
    integers = [_size(0), _size(1), _size(3)]
    return Plugin(
        "joint_attention_fp8" if narrow else "joint_attention",
        joint_attention_fp8_plugin if narrow else joint_attention_plugin,
        ("fp8",) * 5 + ("fp32",) * 3 if narrow else (kind,) * 5,
        (Output(kind, (_size(0), heads, size)),),
        (*integers, _size(2, 2), _size(4, 2)) if narrow else tuple(integers),
        (("cdiv", _size(0), tile.sizes[0]), heads, 1),
        constants,
        tile,
        frozenset({"value_rows", "prefix_value_rows"}) if narrow else frozenset(),
    )


def norm_quantize(capability: int, *, kind: str, weight: str, width: int, eps: float, add: bool) -> Plugin:
    """E4M3 of the RMS norm of rows, with ``add`` of the sum of two, which is a result too."""
    block = triton.next_power_of_2(width)
    results = [Output("fp8", (_size(0), width))]
    return Plugin(
        "add_norm_quantize" if add else "norm_quantize",
        add_norm_quantize_plugin if add else norm_quantize_plugin,
        (kind, *((kind,) if add else ()), weight, "fp32"),
        (*results, Output(kind, (_size(0), width))) if add else tuple(results),
        (),
        (_size(0), 1, 1),
        {"EPS": eps, "WIDTH": width, "BLOCK": block},
        Tile((), warps_for(block), 2),
    )


def activation_quantize(
    capability: int, *, kind: str, width: int, stride: int, step: int, offset: int, up_offset: int, gated: bool
) -> Plugin:
    """E4M3 of SiLU·up, both in columns of rows of ``stride`` elements, or of relu²; the second input is the rows again
    where both are in one tensor."""
    (block,) = ACTIVATION_TILE.sizes
    constants = {
        "OFFSET": offset, "UP_OFFSET": up_offset, "WIDTH": width, "STRIDE": stride, "STEP": step, "GATED": gated,
        "BLOCK": block,
    }  # fmt: skip
    return Plugin(
        "activation_quantize",
        activation_quantize_plugin,
        (kind, kind, "fp32"),
        (Output("fp8", (_size(0), width)),),
        (),
        (_size(0), -(-width // block), 1),
        constants,
        ACTIVATION_TILE,
    )


def qkv_pack(
    capability: int, *, kind: str, weight: str, table: str, stride: int, heads: int, kv_heads: int, size: int,
    eps: float,
) -> Plugin:  # fmt: skip
    """Query, key and value of a merged projection: its first columns, in that order."""
    tile = tile_of(PACK_TILES, capability)
    constants = {
        "EPS": eps, "STRIDE": stride, "HEADS": heads, "KV_HEADS": kv_heads, "HALF": size // 2, "ROWS": tile.sizes[0],
    }  # fmt: skip
    return Plugin(
        "qkv_pack",
        qkv_pack_plugin,
        (kind, weight, weight, table, table),
        tuple(Output(kind, (_size(0), n, size)) for n in (heads, kv_heads, kv_heads)),
        (_size(0), _size(3)),
        (("cdiv", _size(0), tile.sizes[0]), heads + 2 * kv_heads, 1),
        constants,
        tile,
    )


def unipc_step(
    capability: int, *, kind: str, masks: Sequence[str], rank: int, axes: Sequence[int], guided: bool
) -> Plugin:
    """A step of UniPC. Of inputs that a form lacks stands another in their place: the velocity, or the coefficients."""
    (block,) = SAMPLER_TILE.sizes
    shape = tuple(_size(3, axis) for axis in range(rank))
    places: list[Size] = []
    for axis in axes:
        places += [("product", 1, *shape[axis + 1 :]), shape[axis]]
    places += [1, 1] * (2 - len(axes))
    count: Size = ("product", 1, *shape)
    return Plugin(
        "unipc_step",
        unipc_step_plugin,
        ("fp32", kind, kind, *("fp32",) * 4, *masks, *("fp32",) * (2 - len(masks))),
        (Output("fp32", shape),) * 3,
        (count, *places),
        (("cdiv", count, block), 1, 1),
        {"BLOCK": block, "GUIDED": guided, "MASKS": len(axes)},
        SAMPLER_TILE,
    )


FORMS: Mapping[str, Callable[..., Plugin]] = {
    "joint_attention": joint_attention, "norm_quantize": norm_quantize, "activation_quantize": activation_quantize,
    "qkv_pack": qkv_pack, "unipc_step": unipc_step,
}  # fmt: skip


def run(plugin: Plugin, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results of ``plugin`` on contiguous ``inputs``, launched as TensorRT launches it. ValueError for others."""
    kinds = tuple(next((name for name, dtype in _DTYPES.items() if dtype is t.dtype), "") for t in inputs)
    if kinds != tuple(plugin.inputs) or not all(t.is_contiguous() for t in inputs):
        raise ValueError(f"{plugin.name} takes contiguous {', '.join(plugin.inputs)}, not {', '.join(kinds)}")

    def known(size: Size) -> int:
        return int(evaluate(size, lambda operand, axis: inputs[operand].shape[axis], triton.cdiv))

    results = [
        torch.empty([known(size) for size in output.shape], dtype=_DTYPES[output.type], device=inputs[0].device)
        for output in plugin.outputs
    ]
    grid = tuple(known(size) for size in plugin.grid)
    plugin.kernel[grid](
        *inputs, *(known(size) for size in plugin.integers), *results, **plugin.constants,
        num_warps=plugin.tile.warps, num_stages=plugin.tile.stages,
    )  # fmt: skip
    return results


@dataclass(frozen=True)
class Form:
    """A plugin by its kernel and settings, which is all that another process needs to know."""

    kernel: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The operation in a model: one name for one form."""
        digest = hashlib.sha256(json.dumps([self.kernel, self.settings]).encode()).hexdigest()
        return f"{self.kernel}_{digest[:8]}"

    def plugin(self, capability: int) -> Plugin:
        return FORMS[self.kernel](capability, **dict(self.settings))


def compile_plugins(forms: Sequence[Form], capability: int, folder: Path) -> list[str]:
    """Write ``plugins.json`` and one PTX a form into ``folder``; returns the files' names.

    Needs Triton, and neither a GPU nor a driver. ToolError (CX466) where a kernel does not compile.
    """
    request = json.dumps([[form.kernel, form.settings] for form in forms])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "cosmos_export.kernels.plugins", str(capability), str(folder)]
    # A bundle's reader needs neither the lines of the source code nor its place.
    environment |= {"TRITON_DISABLE_LINE_INFO": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ToolError(
            "CX466",
            f"kernels do not compile for capability {capability}: {done.stderr.strip()[-2000:]}",
            "leave the kernel out of `--kernels`, or install the release of Triton that the extra names",
        )
    return [DOCUMENT, *(f"{form.name}.ptx" for form in forms)]


def own_parameters(ptx: str, entry: str, count: int) -> str:
    """``ptx`` whose function ``entry`` has its first ``count`` parameters only.

    Triton puts pointers to scratch memory behind them, for which TensorRT passes nothing. ValueError where one is read.
    """
    head, rest = ptx.split(f".entry {entry}(", 1)
    listed, body = rest.split(")", 1)
    parameters = [one.strip() for one in listed.split(",")]
    for extra in parameters[count:]:
        name = extra.split()[-1]
        if re.search(rf"\b{re.escape(name)}\b", body):
            raise ValueError(f"kernel {entry} reads {name}, which is scratch memory that nobody gives it")
    if len(parameters) < count:
        raise ValueError(f"kernel {entry} has {len(parameters)} parameters, and takes {count}")
    kept = ",\n\t".join(parameters[:count])
    return f"{head}.entry {entry}(\n\t{kept}\n){body}"


def main(arguments: Sequence[str]) -> int:
    from cosmos_export.kernels.ahead import compile_variant

    capability, folder = int(arguments[0]), Path(arguments[1])
    if capability not in CAPABILITIES:
        raise ValueError(f"capability {capability} is not one of {CAPABILITIES}")
    records = []
    for kernel, settings in json.load(sys.stdin):
        form = Form(kernel, tuple((name, value) for name, value in settings))
        plugin = form.plugin(capability)
        binary = compile_variant(plugin.variant, capability)
        count = len(plugin.inputs) + len(plugin.integers) + len(plugin.outputs)
        (folder / f"{form.name}.ptx").write_text(own_parameters(binary.ptx, binary.entry, count), encoding="ascii")
        sizes = (plugin.integers, plugin.grid, binary.threads, binary.shared_bytes)
        records.append(PluginRecord(form.name, binary.entry, plugin.inputs, plugin.outputs, *sizes))
    (folder / DOCUMENT).write_text(document_text(records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
