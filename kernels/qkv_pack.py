"""Norms of query and key, their rotation, and K/V in the form attention reads: one pass over the projections.

    q = rotary(rms_norm(x_q, w_q), cos, sin)      k = rotary(rms_norm(x_k, w_k), cos, sin)      v = x_v

each optionally quantized with one scale per head, the value optionally transposed to [kv_heads, d, N].

Contract
    query        [N, heads · d], a view with a contiguous last axis: the merged projection's slice, in place
    key, value   [N, kv_heads · d], the same
    weights      [d] each, of the input's type (Qwen: the normalized value is rounded to it, then multiplied) or float32
                 (Nemotron: multiplied wide, rounded once); None: no norm
    cos, sin     [R, d/2] with N a multiple of R: row n takes angle n mod R, so both guidance branches share a table.
                 The input's type or float32
    scales       float32 [heads], [kv_heads], [kv_heads] for E4M3 results; None: results in the input's type
    d            a power of two of at least 2
    result       q [N, heads, d], k [N, kv_heads, d], v [N, kv_heads, d] or, transposed, a view of [kv_heads, d, N']
                 with N' = N rounded up to 16, whose padding is left as it is
Rounding follows `cosmos_export::rms_norm` and `::rotary` operation by operation: with equal sums of squares the results
are equal bit for bit.

ONNX: `RMSNormalization`, `RotaryEmbedding`, `QuantizeLinear`; TensorRT fuses the same chain behind the projection.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from cosmos_export.kernels.launch import (
    FP8,
    Tile,
    Variant,
    quantize,
    require,
    require_reach,
    require_rows,
    tile_for,
    tile_of,
)

TILES = {90: Tile((32,), 4, 2)}
CANDIDATE_TILES = tuple(Tile((rows,), warps, 2) for rows in (8, 16, 32, 64) for warps in (2, 4, 8))
"""(rows a program,)"""


@triton.jit
def _norm(a, b, weight, half, eps, kind: tl.constexpr, HALF: tl.constexpr):
    """RMS norm of rows in two halves, rounded as `rms_norm` rounds and then to ``kind``."""
    mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
    factor = tl.rsqrt(mean + eps)[:, None]
    first, second = tl.load(weight + half)[None, :], tl.load(weight + HALF + half)[None, :]
    narrow: tl.constexpr = weight.dtype.element_ty
    a = (a * factor).to(narrow).to(tl.float32) * first.to(tl.float32)
    b = (b * factor).to(narrow).to(tl.float32) * second.to(tl.float32)
    return a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)


@triton.jit
def _turn(
    source, stride, weight, target, width, scale, cos, sin, n, rows, table_rows, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Rows ``n`` of one head: norm, rotation, quantization."""
    half = tl.arange(0, HALF)
    inside = (n < rows)[:, None]
    at = source + n[:, None] * stride + half[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    kind: tl.constexpr = source.dtype.element_ty
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        a, b = _norm(a, b, weight, half, eps, kind, HALF)
    angle = (n % table_rows)[:, None] * HALF + half[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    # A product is rounded to the wider of the two types before the sum, as the graph's operations do.
    step: tl.constexpr = cos.dtype.element_ty
    low = ((a * c).to(step).to(tl.float32) - (b * s).to(step).to(tl.float32)).to(kind)
    high = ((b * c).to(step).to(tl.float32) + (a * s).to(step).to(tl.float32)).to(kind)
    to = target + n[:, None] * width + half[None, :]
    if FP8:
        divisor = tl.load(scale) + tl.zeros_like(a)
        low8 = tl.clamp(tl.div_rn(low.to(tl.float32), divisor), -448.0, 448.0)
        high8 = tl.clamp(tl.div_rn(high.to(tl.float32), divisor), -448.0, 448.0)
        tl.store(to, low8.to(target.dtype.element_ty), mask=inside)
        tl.store(to + HALF, high8.to(target.dtype.element_ty), mask=inside)
    else:
        tl.store(to, low, mask=inside)
        tl.store(to + HALF, high, mask=inside)


@triton.jit
def qkv_pack_kernel(
    query, key, value, q_weight, k_weight, cos, sin, q_out, k_out, v_out, q_scales, k_scales, v_scales,
    rows, table_rows, eps, stride_q, stride_k, stride_v, stride_vn, stride_vh, stride_vd,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one head of the query, the key or the value."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    if head < HEADS:
        _turn(query + head * 2 * HALF, stride_q, q_weight, q_out + head * 2 * HALF, HEADS * 2 * HALF, q_scales + head,
              cos, sin, n, rows, table_rows, eps, HALF, NORM_Q, FP8)  # fmt: skip
    elif head < HEADS + KV_HEADS:
        own = head - HEADS
        _turn(key + own * 2 * HALF, stride_k, k_weight, k_out + own * 2 * HALF, KV_HEADS * 2 * HALF, k_scales + own,
              cos, sin, n, rows, table_rows, eps, HALF, NORM_K, FP8)  # fmt: skip
    else:
        group = head - HEADS - KV_HEADS
        d = tl.arange(0, 2 * HALF)
        inside = (n < rows)[:, None]
        x = tl.load(value + n[:, None] * stride_v + group * 2 * HALF + d[None, :], mask=inside, other=0.0)
        at = v_out + n[:, None] * stride_vn + group * stride_vh + d[None, :] * stride_vd
        if FP8:
            divisor = tl.load(v_scales + group) + tl.zeros([ROWS, 2 * HALF], dtype=tl.float32)
            narrow = tl.clamp(tl.div_rn(x.to(tl.float32), divisor), -448.0, 448.0)
            tl.store(at, narrow.to(v_out.dtype.element_ty), mask=inside)
        else:
            tl.store(at, x, mask=inside)


Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def qkv_pack(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    scales: Packed | None = None,
    transpose_value: bool = False,
    tile: Tile | None = None,
) -> Packed:
    """See the module's contract. ValueError where it is broken."""
    size = 2 * cos.shape[-1]
    check(query, key, value, q_weight, k_weight, cos, sin)
    rows = query.shape[0]
    heads, kv_heads = query.shape[1] // size, key.shape[1] // size
    kind = FP8 if scales is not None else query.dtype

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device=query.device)

    q, k = empty(rows, heads, size), empty(rows, kv_heads, size)
    if transpose_value:
        v = empty(kv_heads, size, -(-rows // 16) * 16)[:, :, :rows].permute(2, 0, 1)
    else:
        v = empty(rows, kv_heads, size)
    tile = tile or tile_for(TILES, query)
    of_query, of_key, of_value = scales if scales is not None else (q, q, q)
    qkv_pack_kernel[(triton.cdiv(rows, tile.sizes[0]), heads + 2 * kv_heads)](
        query, key, value, q_weight if q_weight is not None else cos, k_weight if k_weight is not None else cos,
        cos, sin, q, k, v, of_query, of_key, of_value,
        rows, cos.shape[0], eps, query.stride(0), key.stride(0), value.stride(0), *v.stride(),
        HEADS=heads, KV_HEADS=kv_heads, HALF=size // 2, ROWS=tile.sizes[0],
        NORM_Q=q_weight is not None, NORM_K=k_weight is not None, FP8=scales is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return q, k, v


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """ValueError where operands break the contract."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        require_rows(name, t, 2)
        require_reach(name, t)
        require(t.shape[0] == query.shape[0] and t.dtype == query.dtype, f"{name} is {t.dtype}{tuple(t.shape)}")
    require(cos.shape == sin.shape and cos.dim() == 2 and cos.is_contiguous() and sin.is_contiguous(), "tables differ")
    require(cos.dtype == sin.dtype and cos.dtype in (query.dtype, torch.float32), f"tables are {cos.dtype}")
    size = 2 * cos.shape[1]
    require(size & (size - 1) == 0, f"head size {size} is no power of two")
    require(query.shape[0] % cos.shape[0] == 0, f"{query.shape[0]} rows over a table of {cos.shape[0]}")
    require(query.shape[1] % size == 0 and key.shape[1] % size == 0, f"widths are no multiples of the head size {size}")
    require(key.shape == value.shape, f"key {tuple(key.shape)} and value {tuple(value.shape)}")
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w is not None:
            fits = w.shape == (size,) and w.dtype in (query.dtype, torch.float32)
            require(fits, f"{name} is {w.dtype}{tuple(w.shape)}, expected [{size}]")
    if q_weight is not None and k_weight is not None:
        require(q_weight.dtype == k_weight.dtype, "the two norms are of different flavours")


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    scales: Packed | None = None,
) -> Packed:
    """The graph's operations one after the other."""
    size = 2 * cos.shape[1]
    repeats = query.shape[0] // cos.shape[0]
    c, s = (torch.cat((t, t), dim=-1).repeat(repeats, 1).unsqueeze(1) for t in (cos, sin))

    def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is None:
            return x
        wide = x.to(torch.float32)
        normal = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (normal.to(weight.dtype) * weight).to(x.dtype)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * c + torch.cat((-second, first), dim=-1) * s).to(x.dtype)

    q, k, v = (t.reshape(t.shape[0], -1, size) for t in (query, key, value))
    parts: list[Any] = [rotate(norm(q, q_weight)), rotate(norm(k, k_weight)), v]
    if scales is not None:
        parts = [quantize(x, scale[:, None]) for x, scale in zip(parts, scales, strict=True)]
    return parts[0], parts[1], parts[2]


_STRIDES = ("stride_q", "stride_k", "stride_v", "stride_vn", "stride_vh", "stride_vd")


def variants(capability: int) -> list[Variant]:
    """The forms compiled ahead of time: 32 query and 8 key heads of 128 (Nano), both norms."""
    found = []
    tile = tile_of(TILES, capability)
    for narrow, weight in ((False, "bf16"), (False, "fp32"), (True, "bf16")):
        result = "*fp8e4nv" if narrow else "*bf16"
        unit = "stride_vn" if narrow else "stride_vd"  # FP8 values are transposed
        signature = {
            **dict.fromkeys(("query", "key", "value"), "*bf16"), "q_weight": f"*{weight}", "k_weight": f"*{weight}",
            "cos": "*bf16", "sin": "*bf16", **dict.fromkeys(("q_out", "k_out", "v_out"), result),
            **dict.fromkeys(("q_scales", "k_scales", "v_scales"), "*fp32"),
            "rows": "i32", "table_rows": "i32", "eps": "fp32", **{s: "i32" for s in _STRIDES if s != unit},
        }  # fmt: skip
        constants = {
            unit: 1, "HEADS": 32, "KV_HEADS": 8, "HALF": 64, "ROWS": tile.sizes[0], "NORM_Q": True, "NORM_K": True,
            "FP8": narrow,
        }  # fmt: skip
        name = f"qkv_pack_{'fp8' if narrow else 'bf16'}_{weight}"
        found.append(Variant(name, qkv_pack_kernel, signature, constants, tile.warps, tile.stages, frozenset(_STRIDES)))
    return found
