"""Matrix product with 4-bit weights in groups, dequantized in registers: W4A16.

    y[n, o] = Σ_g scales[o, g] · Σ_{k in g} a[n, k] · q[o, k]

Contract
    a         [N, K] bf16 or fp16, contiguous last axis
    packed    uint8 [O, K/2], contiguous: two signed 4-bit values per byte, the even k in the low half
    scales    [O, K/128] of a's type, contiguous: one for each group of 128 along K
    result    a's type [N, O]
    K         a multiple of 128; N and O any
The weight's integers are exact in a's type, so the product of a group is exact but for the order of its fp32 sum, and
the scale multiplies once behind it.

ONNX: `DequantizeLinear` of an INT4 constant, ``block_size`` 128, then `Gemm`: TensorRT makes one kernel of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cosmos_export.kernels.launch import Tile, Variant, require, require_rows, tile_for, tile_of

GROUP = 128
TILES = {90: Tile((128, 128), 8, 3), 100: Tile((64, 128), 8, 3), 120: Tile((64, 64), 4, 3)}
CANDIDATE_TILES = (
    Tile((16, 64), 4, 4), Tile((32, 64), 4, 4), Tile((64, 64), 4, 3), Tile((64, 128), 8, 3), Tile((128, 128), 8, 3),
    Tile((128, 256), 8, 2),
)  # fmt: skip
"""(rows, outputs)"""


@triton.jit
def _widened(nibble, dtype: tl.constexpr):
    """A signed 4-bit number, int16 0 … 15, as bf16 or fp16, without a conversion: bits of 128 + n + 8, or 1024 + n + 8.

    A conversion from int8 takes more instructions, and they are most of the kernel's.
    """
    offset: tl.constexpr = 0x4308 if dtype == tl.bfloat16 else 0x6408
    zero = tl.full(nibble.shape, offset, tl.int16)
    return (nibble ^ zero).to(dtype, bitcast=True) - zero.to(dtype, bitcast=True)


@triton.jit(do_not_specialize=["rows"])  # one code for every prompt
def gemm_w4a16_kernel(
    a, packed, scales, y, rows, outputs, depth, stride_a, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the result; a turn of the loop is one group."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, GROUP)
    half = tl.arange(0, GROUP // 2)
    groups = depth // GROUP
    a_at = a + (m % rows).to(tl.int64)[:, None] * stride_a + k[None, :]
    w_at = packed + (n % outputs)[:, None] * (depth // 2) + half[None, :]
    s_at = scales + (n % outputs) * groups
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for group in range(groups):
        left = tl.load(a_at + group * GROUP)
        byte = tl.load(w_at + group * (GROUP // 2)).to(tl.int16)
        low, high = _widened(byte & 15, left.dtype), _widened(byte >> 4, left.dtype)
        whole = tl.join(low, high).reshape(BLOCK_N, GROUP)
        part = tl.dot(left, whole.trans(1, 0))
        acc += part * tl.load(s_at + group).to(tl.float32)[None, :]
    y_at = y + m[:, None].to(tl.int64) * stride_y + n[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


def gemm_w4a16(
    a: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, *, tile: Tile | None = None
) -> torch.Tensor:
    """See the module's contract. ValueError where it is broken."""
    check(a, packed, scales)
    rows, depth = a.shape
    outputs = packed.shape[0]
    y = torch.empty((rows, outputs), dtype=a.dtype, device=a.device)
    tile = tile or tile_for(TILES, a)
    block_m, block_n = tile.sizes
    gemm_w4a16_kernel[(triton.cdiv(outputs, block_n), triton.cdiv(rows, block_m))](
        a, packed, scales, y, rows, outputs, depth, a.stride(0), y.stride(0),
        BLOCK_M=block_m, BLOCK_N=block_n, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def check(a: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> None:
    """ValueError where operands break the contract."""
    require_rows("a", a, 2)
    depth = a.shape[1]
    require(depth % GROUP == 0, f"K = {depth} is no multiple of {GROUP}")
    require(packed.dtype == torch.uint8 and packed.is_contiguous(), f"packed weights are {packed.dtype}")
    require(
        packed.dim() == 2 and packed.shape[1] == depth // 2, f"packed weights {tuple(packed.shape)} for K = {depth}"
    )
    wanted = (packed.shape[0], depth // GROUP)
    fits = scales.shape == wanted and scales.dtype == a.dtype and scales.is_contiguous()
    require(fits, f"scales are {scales.dtype}{tuple(scales.shape)}, expected {a.dtype}{wanted}")


def pack(values: torch.Tensor) -> torch.Tensor:
    """uint8 [O, K/2] of integers −8 … 7 [O, K], the even k in the low half of a byte."""
    nibbles = values.to(torch.int16) & 15
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """int8 [O, K], the inverse of ``pack``."""
    wide = packed.to(torch.int16)
    nibbles = torch.stack((wide & 15, wide >> 4), dim=-1).flatten(1)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8)


def reference(a: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same in fp64; fp64 [N, O]."""
    wide = torch.float64
    weight = unpack(packed).to(wide) * scales.to(wide).repeat_interleave(GROUP, dim=1)
    return a.to(wide) @ weight.T


def variants(capability: int) -> list[Variant]:
    """The forms compiled ahead of time."""
    tile = tile_of(TILES, capability)
    signature = {
        "a": "*bf16", "packed": "*u8", "scales": "*bf16", "y": "*bf16",
        **dict.fromkeys(("rows", "outputs", "depth", "stride_a", "stride_y"), "i32"),
    }  # fmt: skip
    constants = {"BLOCK_M": tile.sizes[0], "BLOCK_N": tile.sizes[1], "GROUP": GROUP}
    divisible = frozenset({"outputs", "depth", "stride_a", "stride_y"})
    return [Variant("gemm_w4a16", gemm_w4a16_kernel, signature, constants, tile.warps, tile.stages, divisible)]
