"""Attention of generated rows over their own keys and the prompt's, both read in place.

    out[n, h] = Σ_j softmax_j(scale · q[n, h]·k[j, g]) · v[j, g]     g = h // (heads / kv_heads), no mask

over the keys of the generator (all rows) and of the prompt (the first ``prefix_lengths[b]`` rows), in one online
softmax. Nothing is concatenated: the prompt's K/V stay in the buffer that the reasoner wrote once a request.

Contract
    query         [N, heads, d] or [branches, N, heads, d]; bf16, fp16, fp32, or E4M3 with all three scales
    key, value    [N', kv_heads, d] or with branches, the query's type; N' ≥ 1. Any strides, also a value stored
                  [kv_heads, d, N'] and given as its transposed view: what FP8 matrix units want
    prefix_*      [S, kv_heads, d] or with branches; S ≥ 0
    prefix_lengths  int32 [branches] on the same device, 0 ≤ length ≤ S; None: S. Rows beyond it are never read
    scale         positive
    scales        float32 [heads], [kv_heads], [kv_heads], positive (not checked: they are on the device): value =
                  scale · E4M3. Shared by own and prompt rows
    d             a power of two of at least 16; heads a multiple of kv_heads
    result        the query's shape, contiguous; its type, bf16 where the query is E4M3
Statistics and sums are fp32; probabilities are rounded to the value's type before the second product, in FP8 after a
factor of 256 that the normalization takes out again; sums of blocks of keys are added in fp32. Without FP8 it is the
operation `cosmos_export::joint_attention`.

ONNX: `Concat` of both parts, then `Attention` with `nonpad_kv_seqlen`; TensorRT: the same as `IAttention`, with Q/DQ on
query, key, value and the softmax for FP8. As a plugin the prompt is an input of its own and the copy is saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cosmos_export.kernels.launch import FP8, Tile, Variant, require, require_reach, tile_for, tile_of

LOG2E = 1.4426950408889634

TILES = {90: Tile((128, 128), 8, 3), 100: Tile((128, 128), 8, 3), 120: Tile((128, 64), 8, 2)}
# On 90 with 64 keys nothing is spilled, but the loop issues more instructions for as many keys (`kernels/loops.py`).
FP8_TILES = {90: Tile((128, 128), 8, 3), 100: Tile((128, 128), 8, 3), 120: Tile((128, 64), 8, 2)}
CANDIDATE_TILES = (
    Tile((128, 128), 8, 2), Tile((128, 128), 8, 3), Tile((128, 64), 8, 3), Tile((128, 64), 4, 3),
    Tile((64, 128), 4, 3), Tile((128, 176), 8, 2), Tile((128, 256), 8, 2),
)  # fmt: skip
"""(query rows, keys): what the benchmark sweeps. Sizes that are no power of two are skipped."""


@triton.jit
def _attend(
    acc, total, peak, q, k_ptr, v_ptr, low, high, rows,
    stride_kn, stride_kd, stride_vn, stride_vd, log2_scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One online-softmax pass over the keys [low, high), of which those below ``rows`` exist."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    for start in range(low, high, BLOCK_N):
        n = start + offs_n
        k_at = k_ptr + n[None, :] * stride_kn + offs_d[:, None] * stride_kd
        v_at = v_ptr + n[:, None] * stride_vn + offs_d[None, :] * stride_vd
        k = tl.load(k_at, mask=n[None, :] < rows, other=0.0) if MASKED else tl.load(k_at)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if MASKED:
            scores = tl.where(n[None, :] < rows, scores, float("-inf"))
        # Scaled in the exponent, where it is one operation with the shift.
        higher = tl.maximum(peak, tl.max(scores, 1) * log2_scale)
        shift = higher - 8.0 if FP8 else higher  # E4M3 holds 2^8, and loses small probabilities without it
        p = tl.exp2(scores * log2_scale - shift[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(p, 1)
        peak = higher
        v = tl.load(v_at, mask=n[:, None] < rows, other=0.0) if MASKED else tl.load(v_at)
        if FP8:
            # Hopper's FP8 units keep 13 bits of what they add to: over thousands of keys small terms would be lost
            # (benchmarks/fp8_sums.py), so a block's sum starts at zero and is added in fp32.
            acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, peak


@triton.jit(do_not_specialize=["rows", "keys", "prefix_rows"])  # one code for every prompt
def joint_attention_kernel(
    query, key, value, prefix_key, prefix_value, out, lengths, q_scales, k_scales, v_scales,
    rows, keys, prefix_rows, scale,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd,
    stride_pkb, stride_pkn, stride_pkh, stride_pkd, stride_pvb, stride_pvn, stride_pvh, stride_pvd,
    stride_ob, stride_on, stride_oh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FP8: tl.constexpr, LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head and branch, over all keys."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, branch = tl.program_id(1), tl.program_id(2)
    group = head // GROUP
    d = tl.arange(0, D)
    q_at = query + branch * stride_qb + head * stride_qh + m[:, None] * stride_qn + d[None, :] * stride_qd
    q = tl.load(q_at, mask=m[:, None] < rows, other=0.0)
    log2_scale = scale
    if FP8:
        log2_scale = scale * tl.load(q_scales + head) * tl.load(k_scales + group)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

    k_ptr = key + branch * stride_kb + group * stride_kh
    v_ptr = value + branch * stride_vb + group * stride_vh
    whole = keys // BLOCK_N * BLOCK_N
    acc, total, peak = _attend(
        acc, total, peak, q, k_ptr, v_ptr, 0, whole, keys, stride_kn, stride_kd, stride_vn, stride_vd, log2_scale,
        D, BLOCK_N, FP8, False, PRECISION,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_ptr, v_ptr, whole, keys, keys, stride_kn, stride_kd, stride_vn, stride_vd, log2_scale,
        D, BLOCK_N, FP8, True, PRECISION,
    )  # fmt: skip

    length = prefix_rows
    if LENGTHS:
        length = tl.load(lengths + branch)
    k_ptr = prefix_key + branch * stride_pkb + group * stride_pkh
    v_ptr = prefix_value + branch * stride_pvb + group * stride_pvh
    whole = length // BLOCK_N * BLOCK_N
    acc, total, peak = _attend(
        acc, total, peak, q, k_ptr, v_ptr, 0, whole, length, stride_pkn, stride_pkd, stride_pvn, stride_pvd,
        log2_scale, D, BLOCK_N, FP8, False, PRECISION,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_ptr, v_ptr, whole, length, length, stride_pkn, stride_pkd, stride_pvn, stride_pvd,
        log2_scale, D, BLOCK_N, FP8, True, PRECISION,
    )  # fmt: skip

    result = acc / total[:, None]
    if FP8:
        result = result * tl.load(v_scales + group)
    out_at = out + branch * stride_ob + head * stride_oh + m[:, None] * stride_on + d[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=m[:, None] < rows)


def joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
    *,
    prefix_lengths: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """See the module's contract. ``scales``: of query, key and value, for E4M3 operands. ValueError where broken."""
    check(query, key, value, prefix_key, prefix_value, scale, prefix_lengths, scales)
    flat = query.dim() == 3
    q, k, v, pk, pv = (t[None] if flat else t for t in (query, key, value, prefix_key, prefix_value))
    branches, rows, heads, size = q.shape
    if out is None:
        dtype = torch.bfloat16 if query.dtype == FP8 else query.dtype
        out = torch.empty(query.shape, dtype=dtype, device=query.device)
    o = out[None] if flat else out
    narrow = query.dtype == FP8
    tile = tile or tile_for(FP8_TILES if narrow else TILES, query)
    block_m, block_n = tile.sizes
    lengths = prefix_lengths if prefix_lengths is not None else q
    of_query, of_key, of_value = scales if scales is not None else (q, q, q)
    # Without branches none is stepped over; a view's stride there may be a prompt's length, and would be compiled in.
    strides = [(0, *t.stride()[1:]) if flat else t.stride() for t in (q, k, v, pk, pv, o)]
    joint_attention_kernel[(triton.cdiv(rows, block_m), heads, branches)](
        q, k, v, pk, pv, o, lengths, of_query, of_key, of_value,
        rows, k.shape[1], pk.shape[1], scale * LOG2E,
        *(n for stride in strides[:5] for n in stride), *strides[5][:3],
        GROUP=heads // k.shape[2], D=size, BLOCK_M=block_m, BLOCK_N=block_n, FP8=narrow,
        LENGTHS=prefix_lengths is not None, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
    prefix_lengths: torch.Tensor | None,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> None:
    """ValueError where operands break the contract."""
    size = query.shape[-1]
    require(scale > 0, f"scale is {scale}, expected a positive number")
    require(query.dim() in (3, 4), f"query has {query.dim()} axes, expected [N, heads, d] or [branches, N, heads, d]")
    require_reach("query", query)
    for name, t in (("key", key), ("value", value), ("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        require_reach(name, t)
        require(t.dim() == query.dim() and t.shape[-1] == size, f"{name} {tuple(t.shape)} over {tuple(query.shape)}")
        require(t.dtype == query.dtype, f"{name} is {t.dtype}, the query {query.dtype}")
        require(t.shape[:-3] == query.shape[:-3], f"{name} has other branches than the query")
        require(t.shape[-2] == key.shape[-2], f"{name} has {t.shape[-2]} heads, key {key.shape[-2]}")
    require(key.shape == value.shape and prefix_key.shape == prefix_value.shape, "keys and values differ in shape")
    require(key.shape[-3] > 0, "attention over no key of its own")
    require(size >= 16 and size & (size - 1) == 0, f"head size {size} is no power of two of at least 16")
    require(query.shape[-2] % key.shape[-2] == 0, f"{query.shape[-2]} query heads over {key.shape[-2]} key heads")
    require((scales is not None) == (query.dtype == FP8), "E4M3 operands need scales, and no others take them")
    if scales is not None:
        wanted = (query.shape[-2], key.shape[-2], key.shape[-2])
        found = tuple(s.numel() for s in scales)
        require(found == wanted, f"scales of {found} heads, expected {wanted}")
    if prefix_lengths is not None:
        branches = query.shape[0] if query.dim() == 4 else 1
        fits = prefix_lengths.dtype == torch.int32 and prefix_lengths.numel() == branches
        require(
            fits, f"prefix_lengths is {prefix_lengths.dtype}{tuple(prefix_lengths.shape)}, expected int32 [{branches}]"
        )


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
    *,
    prefix_lengths: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The same in fp64 with one softmax over all keys; fp64 [branches, N, heads, d] or without branches."""
    flat = query.dim() == 3
    q, k, v, pk, pv = (
        (t[None] if flat else t).to(torch.float64) for t in (query, key, value, prefix_key, prefix_value)
    )
    if scales is not None:
        of_query, of_key, of_value = (s.to(torch.float64)[:, None] for s in scales)
        q, k, pk, v, pv = q * of_query, k * of_key, pk * of_key, v * of_value, pv * of_value
    group = q.shape[2] // k.shape[2]
    results = []
    for branch in range(q.shape[0]):
        length = pk.shape[1] if prefix_lengths is None else int(prefix_lengths[branch])
        keys = torch.cat((k[branch], pk[branch, :length])).repeat_interleave(group, dim=1)
        values = torch.cat((v[branch], pv[branch, :length])).repeat_interleave(group, dim=1)
        scores = torch.einsum("nhd,mhd->hnm", q[branch], keys) * scale
        results.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values))
    out = torch.stack(results)
    return out[0] if flat else out


_STRIDES = [
    f"stride_{t}{axis}" for t in ("q", "k", "v", "pk", "pv", "o") for axis in ("b", "n", "h", "d") if t + axis != "od"
]


def _variant(kind: str, tile: Tile, group: int) -> Variant:
    narrow = kind == "fp8e4nv"
    pointers = dict.fromkeys(("query", "key", "value", "prefix_key", "prefix_value"), f"*{kind}")
    # A stride of one is a constant, so that loads are seen to be contiguous; FP8 values are stored transposed.
    unit = (
        "stride_qd",
        "stride_kd",
        "stride_pkd",
        *(("stride_vn", "stride_pvn") if narrow else ("stride_vd", "stride_pvd")),
    )
    signature = {
        **pointers, "out": "*bf16", "lengths": "*i32", "q_scales": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32",
        "rows": "i32", "keys": "i32", "prefix_rows": "i32", "scale": "fp32",
        **{name: "i32" for name in _STRIDES if name not in unit},
    }  # fmt: skip
    constants = dict.fromkeys(unit, 1) | {
        "GROUP": group, "D": 128, "BLOCK_M": tile.sizes[0], "BLOCK_N": tile.sizes[1], "FP8": narrow, "LENGTHS": True,
        "PRECISION": "tf32",
    }  # fmt: skip
    return Variant(
        f"joint_attention_{'fp8' if narrow else kind}", joint_attention_kernel, signature, constants,
        tile.warps, tile.stages, frozenset(_STRIDES),
    )  # fmt: skip


def variants(capability: int) -> list[Variant]:
    """The forms compiled ahead of time: head size 128, groups of four (Nano)."""
    wide, narrow = (tile_of(tiles, capability) for tiles in (TILES, FP8_TILES))
    return [_variant("bf16", wide, 4), _variant("fp8e4nv", narrow, 4)]
