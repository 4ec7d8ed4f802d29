"""FP8 matrix product of activations and weights: W8A8.

    y[n, o] = a_scale · b_scale · Σ_k a[n, k] · w[o, k] + bias[o]

Contract
    a         E4M3 [N, K], contiguous last axis
    weight    E4M3 [O, K], contiguous last axis: a checkpoint's own bytes
    a_scale   float32 of one element (static), or [N] (one per row)
    w_scale   float32 of one element, or [O] (one an output)
    bias      [O] in the result's type, or None
    result    bf16 [N, O]
    N, O, K   any; fast where K and O are multiples of 16
Sums are fp32. Hopper's FP8 units keep fewer bits than that in their accumulators: the products of one turn of the loop
are summed there and then promoted to true fp32 registers; ``fast`` leaves them there, as cuBLASLt's fast accumulation.

ONNX: `QuantizeLinear`, `DequantizeLinear` of both operands, `Gemm`: TensorRT makes one FP8 GEMM of it. In PyTorch:
`torch._scaled_mm` (cuBLASLt), the first candidate; this kernel is here to be measured against it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cosmos_export.kernels.launch import FP8, Tile, Variant, require, require_rows, tile_for, tile_of

TILES = {90: Tile((128, 128, 128), 8, 4), 100: Tile((128, 256, 128), 8, 3), 120: Tile((128, 128, 128), 8, 2)}
CANDIDATE_TILES = (
    Tile((128, 256, 128), 8, 3), Tile((128, 128, 128), 8, 4), Tile((128, 128, 128), 4, 4), Tile((128, 256, 64), 8, 4),
    Tile((64, 256, 128), 8, 4), Tile((256, 128, 128), 8, 3),
)  # fmt: skip
"""(rows, outputs, products)"""
_BAND = 8


@triton.jit
def gemm_w8a8_kernel(
    a, weight, y, a_scale, w_scale, bias, rows, outputs, depth, stride_a, stride_w, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    ROW_SCALES: tl.constexpr, OUTPUT_SCALES: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the result, in bands of rows so that neighbours share operands in the cache."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    band = program // (BAND * tiles_n)
    height = min(tiles_m - band * BAND, BAND)
    tile_m = band * BAND + program % (BAND * tiles_n) % height
    tile_n = program % (BAND * tiles_n) // height
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and outputs past the end are read again from the start and not stored: no mask in the loop but along K.
    a_at = a + (m % rows).to(tl.int64)[:, None] * stride_a + k[None, :]
    w_at = weight + (n % outputs)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = tl.load(a_at + start, mask=k[None, :] < depth - start, other=0.0)
        right = tl.load(w_at + start, mask=k[:, None] < depth - start, other=0.0)
        acc = tl.dot(left, right, acc, max_num_imprecise_acc=None if FAST else BLOCK_K)
    inside_m, inside_n = m < rows, n < outputs
    if ROW_SCALES:
        acc *= tl.load(a_scale + m, mask=inside_m, other=0.0)[:, None]
    else:
        acc *= tl.load(a_scale)
    if OUTPUT_SCALES:
        acc *= tl.load(w_scale + n, mask=inside_n, other=0.0)[None, :]
    else:
        acc *= tl.load(w_scale)
    if BIAS:
        acc += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    y_at = y + m[:, None].to(tl.int64) * stride_y + n[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def gemm_w8a8(
    a: torch.Tensor,
    weight: torch.Tensor,
    a_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    fast: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """See the module's contract. ValueError where it is broken."""
    check(a, weight, a_scale, w_scale, bias)
    rows, depth = a.shape
    outputs = weight.shape[0]
    y = torch.empty((rows, outputs), dtype=torch.bfloat16, device=a.device)
    tile = tile or tile_for(TILES, a)
    block_m, block_n, block_k = tile.sizes
    gemm_w8a8_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n),)](
        a, weight, y, a_scale, w_scale, bias if bias is not None else y, rows, outputs, depth,
        a.stride(0), weight.stride(0), y.stride(0),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BAND=_BAND, ROW_SCALES=a_scale.numel() > 1,
        OUTPUT_SCALES=w_scale.numel() > 1, BIAS=bias is not None, FAST=fast,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def check(
    a: torch.Tensor, weight: torch.Tensor, a_scale: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """ValueError where operands break the contract."""
    require_rows("a", a, 2)
    require_rows("weight", weight, 2)
    require(a.dtype == weight.dtype == FP8, f"operands are {a.dtype} and {weight.dtype}, expected E4M3")
    require(a.shape[1] == weight.shape[1], f"a {tuple(a.shape)} by weight {tuple(weight.shape)}")
    for name, scale, many in (("a_scale", a_scale, a.shape[0]), ("w_scale", w_scale, weight.shape[0])):
        fits = scale.dtype == torch.float32 and scale.numel() in (1, many)
        require(fits, f"{name} is {scale.dtype}{tuple(scale.shape)}, expected float32 of 1 or {many}")
    require(bias is None or bias.shape == (weight.shape[0],), "bias of another length than the outputs")


def reference(
    a: torch.Tensor,
    weight: torch.Tensor,
    a_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in fp64; fp64 [N, O]."""
    wide = torch.float64
    y = (a.to(wide) * a_scale.to(wide).reshape(-1, 1)) @ (weight.to(wide) * w_scale.to(wide).reshape(-1, 1)).T
    return y if bias is None else y + bias.to(wide)


def variants(capability: int) -> list[Variant]:
    """The forms compiled ahead of time: static scales (the published layout), and a scale per row and per output."""
    tile = tile_of(TILES, capability)
    block_m, block_n, block_k = tile.sizes
    signature = {
        "a": "*fp8e4nv", "weight": "*fp8e4nv", "y": "*bf16", "a_scale": "*fp32", "w_scale": "*fp32", "bias": "*bf16",
        **dict.fromkeys(("rows", "outputs", "depth", "stride_a", "stride_w", "stride_y"), "i32"),
    }  # fmt: skip
    divisible = frozenset({"outputs", "depth", "stride_a", "stride_w", "stride_y"})
    return [
        Variant(
            f"gemm_w8a8_{'row' if many else 'static'}", gemm_w8a8_kernel, signature,
            {
                "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BAND": _BAND, "ROW_SCALES": many,
                "OUTPUT_SCALES": many, "BIAS": False, "FAST": False,
            },
            tile.warps, tile.stages, divisible,
        )
        for many in (False, True)
    ]  # fmt: skip
