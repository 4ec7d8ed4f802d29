"""The MLP's activation and quantization of its result in one pass.

    gated   a = silu(gate) · up           plain   a = relu(x)²            y = E4M3(a / scale)

Contract
    x        [N, width], and ``up`` of the same shape, type and strides for the gated form: the halves of the merged
             projection in place, one beside the other or element by element in turns; bf16, fp16 or fp32
    scale    float32 of one element: static. None: one scale per row, its largest magnitude / 448
    result   y E4M3 [N, width], and the scale: as given, or float32 [N]
Each step rounds to the input's type, as `cosmos_export::swiglu` and ``relu(x)²`` do. With one scale per row the row is
read twice, the second time out of the cache.

ONNX: `Sigmoid`, `Mul`, `QuantizeLinear`, or `Relu`, `Mul`, `QuantizeLinear`. TensorRT fuses the static form behind the
projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from cosmos_export.kernels.launch import FP8, Tile, Variant, quantize, require
from cosmos_export.kernels.norm_quantize import quantize_rows

TILE = Tile((2048,), 4, 2)


@triton.jit
def _activate(x, up, GATED: tl.constexpr):
    kind = x.dtype
    if GATED:
        wide = x.to(tl.float32)
        silu = (wide / (1.0 + tl.exp(-wide))).to(kind).to(tl.float32)
        result = (silu * up.to(tl.float32)).to(kind)
    else:
        positive = tl.maximum(x.to(tl.float32), 0.0)
        result = (positive * positive).to(kind)
    return result.to(tl.float32)


@triton.jit
def activation_quantize_kernel(
    x, up, scale, y, row_scales, width, stride_x, stride_up,
    BLOCK: tl.constexpr, GATED: tl.constexpr, PER_ROW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: a row (scale of the row), or BLOCK elements of one (static scale)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if PER_ROW:
        largest = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            inside = start + at < width
            a = tl.load(x + row * stride_x + (start + at) * STEP, mask=inside, other=0.0)
            b = tl.load(up + row * stride_up + (start + at) * STEP, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.abs(_activate(a, b, GATED)))
        divisor = tl.maximum(tl.max(largest, 0), 1e-12) / 448.0
        tl.store(row_scales + row, divisor)
        for start in range(0, width, BLOCK):
            inside = start + at < width
            a = tl.load(x + row * stride_x + (start + at) * STEP, mask=inside, other=0.0)
            b = tl.load(up + row * stride_up + (start + at) * STEP, mask=inside, other=0.0)
            value = _activate(a, b, GATED)
            quantized = tl.clamp(tl.div_rn(value, divisor + tl.zeros_like(value)), -448.0, 448.0)
            tl.store(y + row * width + start + at, quantized.to(y.dtype.element_ty), mask=inside)
    else:
        at += tl.program_id(1) * BLOCK
        inside = at < width
        a = tl.load(x + row * stride_x + at * STEP, mask=inside, other=0.0)
        b = tl.load(up + row * stride_up + at * STEP, mask=inside, other=0.0)
        value = _activate(a, b, GATED)
        quantized = tl.clamp(tl.div_rn(value, tl.load(scale) + tl.zeros_like(value)), -448.0, 448.0)
        tl.store(y + row * width + at, quantized.to(y.dtype.element_ty), mask=inside)


def activation_quantize(
    x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None = None, *, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the module's contract; ``up`` None: relu². ValueError where it is broken."""
    check(x, up, scale)
    rows, width = x.shape
    y = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = scale if scale is not None else torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = tile or TILE
    (block,) = tile.sizes
    other = up if up is not None else x
    activation_quantize_kernel[(rows, 1 if scale is None else triton.cdiv(width, block))](
        x, other, scales, y, scales, width, x.stride(0), other.stride(0),
        BLOCK=block, GATED=up is not None, PER_ROW=scale is None, STEP=x.stride(1),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, scales


def check(x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None) -> None:
    """ValueError where operands break the contract."""
    require(x.dim() == 2 and x.stride(1) in (1, 2), f"x {tuple(x.shape)} with strides {x.stride()}")
    if up is not None:
        require(up.stride() == x.stride(), f"up has strides {up.stride()}, x {x.stride()}")
        require(up.shape == x.shape and up.dtype == x.dtype, f"up is {up.dtype}{tuple(up.shape)}")
    if scale is not None:
        require(scale.numel() == 1 and scale.dtype == torch.float32, "a static scale is one float32")


def reference(
    x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The graph's operations one after the other."""
    if up is None:
        positive = F.relu(x)
        value = positive * positive
    else:
        value = F.silu(x) * up
    return quantize_rows(value) if scale is None else (quantize(value, scale), scale)


def variants(capability: int) -> list[Variant]:
    """The forms compiled ahead of time: both activations, both kinds of scale."""
    signature = {
        "x": "*bf16", "up": "*bf16", "scale": "*fp32", "y": "*fp8e4nv", "row_scales": "*fp32",
        "width": "i32", "stride_x": "i32", "stride_up": "i32",
    }  # fmt: skip
    divisible = frozenset({"width", "stride_x", "stride_up"})
    return [
        Variant(
            f"activation_quantize_{'gated' if gated else 'relu2'}_{'row' if per_row else 'static'}",
            activation_quantize_kernel, signature,
            {"BLOCK": TILE.sizes[0], "GATED": gated, "PER_ROW": per_row, "STEP": 2 if gated else 1},
            TILE.warps, TILE.stages, divisible,
        )
        for gated in (True, False)
        for per_row in (False, True)
    ]  # fmt: skip
