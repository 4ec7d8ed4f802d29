"""Operations that this project's kernels compute in one pass, and `ITEM`, which takes one of several results.

Each reference is the operations that the kernel stands for, in their order; passes/fuse_*.py put one in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cosmos_export.ir.dims import equal, expression, simplify
from cosmos_export.ir.ops.declare import Trait, new_operator, operation, require
from cosmos_export.ir.ops.fp8 import quantize, require_scale
from cosmos_export.ir.ops.rms_norm import rms_norm
from cosmos_export.ir.ops.rotary import rotary
from cosmos_export.ir.ops.swiglu import swiglu
from cosmos_export.ir.spec import TensorSpec


def item(values: Sequence[Any], index: int) -> Any:
    """One of the results of an operation that has several."""
    return values[index]


ITEM = item


@operation(ITEM, traits=(Trait.FUSED,))
def _item(values: tuple[TensorSpec, ...], index: int) -> TensorSpec:
    require(not isinstance(values, TensorSpec) and 0 <= index < len(values), f"result {index} of {values}")
    return values[index]


def norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor) -> torch.Tensor:
    """``quantize(rms_norm(x))`` of rows [N, width], with the norm rounded to the type of ``x`` in between."""
    return quantize(rms_norm(x, weight, eps).to(x.dtype), scale)


NORM_QUANTIZE = new_operator(norm_quantize)


@operation(NORM_QUANTIZE, traits=(Trait.FUSED,), rows=(0,))
def _norm_quantize(x: TensorSpec, weight: TensorSpec, eps: float, scale: TensorSpec) -> TensorSpec:
    require_scale(scale)
    require(x.rank == 2 and weight.rank == 1 and equal(x.shape[1], weight.shape[0]), f"norm of {x} by {weight}")
    return TensorSpec(torch.float8_e4m3fn, x.shape)


def add_norm_quantize(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_quantize` of ``x + delta``, and the sum."""
    total = x + delta
    return norm_quantize(total, weight, eps, scale), total


ADD_NORM_QUANTIZE = new_operator(add_norm_quantize)


@operation(ADD_NORM_QUANTIZE, traits=(Trait.FUSED,))
def _add_norm_quantize(
    x: TensorSpec, delta: TensorSpec, weight: TensorSpec, eps: float, scale: TensorSpec
) -> tuple[TensorSpec, TensorSpec]:
    require(x == delta, f"sum of {x} and {delta}")
    return _norm_quantize(x, weight, eps, scale), x


def activation_quantize(x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """``quantize(swiglu(x, up))`` of rows [N, width]; without ``up``, ``quantize(relu(x)²)``."""
    return quantize(F.relu(x) * F.relu(x) if up is None else swiglu(x, up), scale)


ACTIVATION_QUANTIZE = new_operator(activation_quantize)


def _rows_of_activation(x: TensorSpec, up: TensorSpec | None, scale: TensorSpec) -> Sequence[int]:
    return (0,) if up is None else (0, 1)


@operation(ACTIVATION_QUANTIZE, traits=(Trait.FUSED,), rows=_rows_of_activation)
def _activation_quantize(x: TensorSpec, up: TensorSpec | None, scale: TensorSpec) -> TensorSpec:
    require_scale(scale)
    require(x.rank == 2 and up in (None, x), f"activation of {x} and {up}")
    return TensorSpec(torch.float8_e4m3fn, x.shape)


def qkv_pack(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads [N, heads, d] of columns [N, heads · d]: query and key normalized and rotated, and the value."""
    size = 2 * cos.shape[1]
    q, k, v = (t.reshape(t.shape[0], t.shape[1] // size, size) for t in (query, key, value))
    q, k = (rotary(rms_norm(t, w, eps).to(t.dtype), cos, sin).to(t.dtype) for t, w in ((q, q_weight), (k, k_weight)))
    return q, k, v.clone()


QKV_PACK = new_operator(qkv_pack)


@operation(QKV_PACK, traits=(Trait.FUSED,))
def _qkv_pack(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    q_weight: TensorSpec,
    k_weight: TensorSpec,
    cos: TensorSpec,
    sin: TensorSpec,
    eps: float,
) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    size = simplify(2 * expression(cos.shape[1]))
    fits = q_weight.shape == k_weight.shape == (size,) and cos == sin and equal(cos.shape[0], query.shape[0])
    require(fits and query.rank == 2 and key == value, f"heads of {query}, {key} and {value} by {cos}")

    def heads(columns: TensorSpec) -> TensorSpec:
        return TensorSpec(columns.dtype, (columns.shape[0], simplify(expression(columns.shape[1]) / size), size))

    return heads(query), heads(key), heads(value)


def unipc_step(
    coefficients: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    sample: torch.Tensor,
    last: torch.Tensor,
    m0: torch.Tensor,
    m1: torch.Tensor,
    masks: Sequence[torch.Tensor],
    axes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step of UniPC: the next sample, last and m0; the next m1 is ``m0``. State float32 of one shape.

    ``coefficients`` float32 [10]: guidance, sigma, c_sample, c_last, c_m0, c_m1, c_d, p_sample, p_d, p_m0. Where one of
    the 0/1 ``masks`` (along ``axes``) is 0, the sample stays what it is.
    """
    guidance, sigma, c_sample, c_last, c_m0, c_m1, c_d, p_sample, p_d, p_m0 = coefficients.unbind()
    velocity = cond.to(torch.float32)
    if uncond is not None:
        other = uncond.to(torch.float32)
        velocity = other + (velocity - other) * guidance
    d = sample - velocity * sigma
    corrected = sample * c_sample + last * c_last + m0 * c_m0 + m1 * c_m1 + d * c_d
    new = corrected * p_sample + d * p_d + m0 * p_m0
    for mask, axis in zip(masks, axes, strict=True):
        shape = [-1 if i == axis else 1 for i in range(sample.dim())]
        along = mask.to(torch.float32).reshape(shape)
        new = new * along + sample * (along * -1.0 + 1.0)
    return new, corrected, d


UNIPC_STEP = new_operator(unipc_step)


@operation(UNIPC_STEP, traits=(Trait.FUSED,))
def _unipc_step(
    coefficients: TensorSpec,
    cond: TensorSpec,
    uncond: TensorSpec | None,
    sample: TensorSpec,
    last: TensorSpec,
    m0: TensorSpec,
    m1: TensorSpec,
    masks: Sequence[TensorSpec],
    axes: Sequence[int],
) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    require(coefficients == TensorSpec(torch.float32, (10,)), f"a row of ten coefficients, not {coefficients}")
    state = sample.dtype == torch.float32 and sample == last == m0 == m1
    velocity = cond.shape == sample.shape and uncond in (None, cond)
    require(state and velocity, f"a step of {sample}, {last}, {m0}, {m1} by {cond} and {uncond}")
    held = [mask.rank == 1 and equal(mask.shape[0], sample.shape[axis]) for mask, axis in zip(masks, axes, strict=True)]
    require(all(held), f"masks {list(masks)} along {list(axes)} of {sample}")
    return sample, sample, sample
