"""RMS norm and quantization of its result in one pass, with the residual sum in front where there is one.

    x ← x + delta (optional)        n = cast(x · rsqrt(mean(x²) + eps)) · w        y = E4M3(n / scale)

Contract
    x        [N, width], contiguous last axis; bf16, fp16 or fp32
    delta    the same shape and type, or None
    total    where ``delta`` is given, the same shape and type: receives the sum; None: ``x`` itself does
    weight   [width], of x's type (Qwen) or float32 (Nemotron)
    scale    float32 of one element: static. None: one scale per row, its largest magnitude / 448
    result   y E4M3 [N, width], and the scale: as given, or float32 [N] (a row of zeros: 1e-12 / 448)
    width    any; one program holds a row of up to 65,536
Rounding before the division follows `cosmos_export::rms_norm`, cast to x's type; the division is IEEE's.

ONNX: `Add`, `RMSNormalization`, `QuantizeLinear` (static) or `ReduceMax` and `Div` (per row). TensorRT fuses the static
form in front of an FP8 GEMM; it has no per-row form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cosmos_export.kernels.launch import FP8, FP8_MAX, SMALLEST_AMAX, Tile, Variant, quantize, require, require_rows

WIDEST = 65_536


@triton.jit
def norm_quantize_kernel(
    x, delta, total, weight, scale, y, row_scales, eps, width, stride_x, stride_delta, stride_total,
    BLOCK: tl.constexpr, ADD: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    narrow = tl.load(x + row * stride_x + at, mask=inside, other=0.0)
    kind = narrow.dtype
    if ADD:
        other = tl.load(delta + row * stride_delta + at, mask=inside, other=0.0)
        narrow = (narrow.to(tl.float32) + other.to(tl.float32)).to(kind)
        tl.store(total + row * stride_total + at, narrow, mask=inside)
    value = narrow.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0.0)
    normal = (value * factor).to(w.dtype).to(tl.float32) * w.to(tl.float32)
    normal = normal.to(w.dtype).to(kind).to(tl.float32)
    if PER_ROW:
        divisor = tl.maximum(tl.max(tl.abs(normal), 0), 1e-12) / 448.0
        tl.store(row_scales + row, divisor)
    else:
        divisor = tl.load(scale)
    quantized = tl.clamp(tl.div_rn(normal, divisor + tl.zeros_like(normal)), -448.0, 448.0)
    tl.store(y + row * width + at, quantized.to(y.dtype.element_ty), mask=inside)


def norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    *,
    delta: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the module's contract. ValueError where it is broken."""
    check(x, weight, scale, delta, total)
    total = total if total is not None else x
    rows, width = x.shape
    y = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = scale if scale is not None else torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    norm_quantize_kernel[(rows,)](
        x, delta if delta is not None else x, total, weight, scales, y, scales, eps, width,
        x.stride(0), delta.stride(0) if delta is not None else 0, total.stride(0),
        BLOCK=block, ADD=delta is not None, PER_ROW=scale is None, num_warps=tile.warps if tile else warps_for(block),
    )  # fmt: skip
    return y, scales


def warps_for(block: int) -> int:
    """Warps of a program that holds a row of ``block`` elements: 16 to 32 of them a thread."""
    return max(1, min(16, block // 512))


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    delta: torch.Tensor | None,
    total: torch.Tensor | None = None,
) -> None:
    """ValueError where operands break the contract."""
    require_rows("x", x, 2)
    require(x.shape[1] <= WIDEST, f"rows of {x.shape[1]} are wider than {WIDEST}")
    require(weight.shape == x.shape[1:] and weight.dtype in (x.dtype, torch.float32), f"weight {tuple(weight.shape)}")
    if scale is not None:
        require(scale.numel() == 1 and scale.dtype == torch.float32, "a static scale is one float32")
    require(total is None or delta is not None, "a total without anything to add")
    for name, t in (("delta", delta), ("total", total)):
        if t is not None:
            require_rows(name, t, 2)
            require(t.shape == x.shape and t.dtype == x.dtype, f"{name} is {t.dtype}{tuple(t.shape)}")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    *,
    delta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The graph's operations one after the other; ``x`` is left as it is."""
    total = x if delta is None else x + delta
    wide = total.to(torch.float32)
    normal = total * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    value = (normal.to(weight.dtype) * weight).to(x.dtype)
    return quantize_rows(value) if scale is None else (quantize(value, scale), scale)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 of ``x`` with one scale per row, and the scales."""
    scales = x.to(torch.float32).abs().amax(-1).clamp_min(SMALLEST_AMAX) / FP8_MAX
    return quantize(x, scales[:, None]), scales


def variants(capability: int) -> list[Variant]:
    """The forms compiled ahead of time: Nano's width, with and without the residual sum."""
    found = []
    for per_row in (False, True):
        signature = {
            "x": "*bf16", "delta": "*bf16", "total": "*bf16", "weight": "*bf16", "scale": "*fp32", "y": "*fp8e4nv",
            "row_scales": "*fp32", "eps": "fp32", "width": "i32", "stride_x": "i32", "stride_delta": "i32",
            "stride_total": "i32",
        }  # fmt: skip
        constants = {"BLOCK": 4096, "ADD": True, "PER_ROW": per_row}
        name = f"norm_quantize_{'row' if per_row else 'static'}"
        divisible = frozenset({"width", "stride_x", "stride_delta", "stride_total"})
        found.append(Variant(name, norm_quantize_kernel, signature, constants, warps_for(4096), 2, divisible))
    return found
