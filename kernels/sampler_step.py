"""Guidance, corrector and predictor of one sampler step in one pass over the latents.

    v    =  u + g·(c − u)                          d   =  x − σ·v
    x'   =  c_sample·x + c_last·last + c_m0·m0 + c_m1·m1 + c_d·d
    x    ←  p_sample·x' + p_d·d + p_m0·m0          last, m0, m1  ←  x', d, m0

the formulas and columns of `cosmos_export.sampling.solvers`; where a mask is 0 the sample stays bit for bit what it is.

Contract
    coefficients   float32 [10] on the device: this step's row of the table, columns of ``UNIPC_COLUMNS``
    cond, uncond   the velocity of both branches, contiguous; bf16, fp16 or fp32. uncond None: not guided, v = cond
    sample, last, m0, m1   float32 of the same shape, contiguous. Updated in place, unless ``into`` is given
    into           three of the same: receive the next sample, last and m0; the next m1 is m0 as it is
    masks          up to two of (axis, 0/1 values along it, in any floating type)
    narrow         optional, the velocity's shape: receives the next sample in its type, as the next step reads it
    result         None; state and ``narrow`` are written
All arithmetic is fp32. It reads and writes each of the seven tensors once; as separate operations it is about forty
passes.

ONNX, TensorRT: the same operations in the body of `Loop`, which the builder fuses; there the kernel is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from cosmos_export.kernels.launch import Tile, Variant, require

TILE = Tile((1024,), 4, 2)
COLUMNS = ("guidance", "sigma", "c_sample", "c_last", "c_m0", "c_m1", "c_d", "p_sample", "p_d", "p_m0")
Masks = Sequence[tuple[int, torch.Tensor]]


@triton.jit
def unipc_step_kernel(
    row, cond, uncond, sample, last, m0, m1, to_sample, to_last, to_m0, narrow, mask_a, mask_b,
    count, inner_a, size_a, inner_b, size_b,
    BLOCK: tl.constexpr, GUIDED: tl.constexpr, MASKS: tl.constexpr, NARROW: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    velocity = tl.load(cond + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        other = tl.load(uncond + at, mask=inside, other=0.0).to(tl.float32)
        velocity = other + tl.load(row) * (velocity - other)
    x = tl.load(sample + at, mask=inside, other=0.0)
    before = tl.load(last + at, mask=inside, other=0.0)
    view0 = tl.load(m0 + at, mask=inside, other=0.0)
    view1 = tl.load(m1 + at, mask=inside, other=0.0)
    d = x - tl.load(row + 1) * velocity
    corrected = tl.load(row + 2) * x + tl.load(row + 3) * before + tl.load(row + 4) * view0
    corrected += tl.load(row + 5) * view1 + tl.load(row + 6) * d
    new = tl.load(row + 7) * corrected + tl.load(row + 8) * d + tl.load(row + 9) * view0
    if MASKS >= 1:
        new = tl.where(tl.load(mask_a + at // inner_a % size_a, mask=inside, other=0.0).to(tl.float32) != 0.0, new, x)
    if MASKS >= 2:
        new = tl.where(tl.load(mask_b + at // inner_b % size_b, mask=inside, other=0.0).to(tl.float32) != 0.0, new, x)
    tl.store(to_sample + at, new, mask=inside)
    tl.store(to_last + at, corrected, mask=inside)
    if SHIFT:
        tl.store(m1 + at, view0, mask=inside)
    tl.store(to_m0 + at, d, mask=inside)
    if NARROW:
        tl.store(narrow + at, new.to(narrow.dtype.element_ty), mask=inside)


def unipc_step(
    coefficients: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    sample: torch.Tensor,
    last: torch.Tensor,
    m0: torch.Tensor,
    m1: torch.Tensor,
    *,
    masks: Masks = (),
    narrow: torch.Tensor | None = None,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    tile: Tile = TILE,
) -> None:
    """See the module's contract. ValueError where it is broken."""
    check(coefficients, cond, uncond, (sample, last, m0, m1, *(into or ())), masks, narrow)
    (block,) = tile.sizes
    places = [(mask, _inner(cond, axis), cond.shape[axis]) for axis, mask in masks]
    places += [(coefficients, 1, 1)] * (2 - len(places))
    (mask_a, inner_a, size_a), (mask_b, inner_b, size_b) = places
    unipc_step_kernel[(triton.cdiv(cond.numel(), block),)](
        coefficients, cond, uncond if uncond is not None else cond, sample, last, m0, m1,
        *(into or (sample, last, m0)), narrow if narrow is not None else sample,
        mask_a, mask_b, cond.numel(), inner_a, size_a, inner_b, size_b,
        BLOCK=block, GUIDED=uncond is not None, MASKS=len(masks), NARROW=narrow is not None, SHIFT=into is None,
        num_warps=tile.warps,
    )  # fmt: skip


def _inner(tensor: torch.Tensor, axis: int) -> int:
    """Elements between neighbours along ``axis`` of a contiguous tensor."""
    return tensor.stride(axis)


def check(
    coefficients: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    state: Sequence[torch.Tensor],
    masks: Masks,
    narrow: torch.Tensor | None,
) -> None:
    """ValueError where operands break the contract."""
    fits = coefficients.dtype == torch.float32 and coefficients.shape == (len(COLUMNS),)
    require(fits, f"coefficients are {coefficients.dtype}{tuple(coefficients.shape)}, expected [{len(COLUMNS)}]")
    for t in (cond, *state, *((uncond,) if uncond is not None else ()), *((narrow,) if narrow is not None else ())):
        require(t.shape == cond.shape and t.is_contiguous(), f"{tuple(t.shape)} beside {tuple(cond.shape)}")
    require(all(t.dtype == torch.float32 for t in state), "the state is float32")
    require(uncond is None or uncond.dtype == cond.dtype, "the branches differ in type")
    require(len(masks) <= 2, f"{len(masks)} masks, at most two")
    for axis, mask in masks:
        require(
            0 <= axis < cond.dim() and mask.shape == (cond.shape[axis],),
            f"a mask of {tuple(mask.shape)} on axis {axis}",
        )
    require(cond.numel() < 2**31, "more elements than an index holds")


def reference(
    coefficients: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    sample: torch.Tensor,
    last: torch.Tensor,
    m0: torch.Tensor,
    m1: torch.Tensor,
    *,
    masks: Masks = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The next (sample, last, m0, m1), in the sample's type."""
    kind = sample.dtype
    guidance, sigma, c_sample, c_last, c_m0, c_m1, c_d, p_sample, p_d, p_m0 = coefficients.to(kind)
    velocity = cond.to(kind) if uncond is None else uncond.to(kind) + guidance * (cond.to(kind) - uncond.to(kind))
    d = sample - sigma * velocity
    corrected = c_sample * sample + c_last * last + c_m0 * m0 + c_m1 * m1 + c_d * d
    new = p_sample * corrected + p_d * d + p_m0 * m0
    for axis, mask in masks:
        shape = [-1 if i == axis else 1 for i in range(new.dim())]
        new = torch.where(mask.reshape(shape) != 0, new, sample)
    return new, corrected, d, m0


def variants(capability: int) -> list[Variant]:
    """The forms compiled ahead of time: vision (one mask) with and without guidance, action (two masks)."""
    signature = {
        "row": "*fp32", "cond": "*bf16", "uncond": "*bf16",
        **dict.fromkeys(("sample", "last", "m0", "m1", "to_sample", "to_last", "to_m0"), "*fp32"),
        "narrow": "*bf16", "mask_a": "*bf16", "mask_b": "*bf16",
        **dict.fromkeys(("count", "inner_a", "size_a", "inner_b", "size_b"), "i32"),
    }  # fmt: skip
    return [
        Variant(
            f"unipc_step_{'guided' if guided else 'plain'}_{masks}", unipc_step_kernel, signature,
            {"BLOCK": TILE.sizes[0], "GUIDED": guided, "MASKS": masks, "NARROW": False, "SHIFT": False},
            TILE.warps, TILE.stages, frozenset({"count"}),
        )
        for guided, masks in ((True, 1), (False, 1), (True, 2))
    ]  # fmt: skip
