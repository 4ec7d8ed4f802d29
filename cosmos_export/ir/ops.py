"""The operations a graph may hold: for each, how type and shape follow from its operands.

The table is the specification of the dialect: the verifier refuses what is not in it and derives every shape again.
The operations that ATen lacks are declared here with their CPU reference, which is also what the interpreter runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from cosmos_export.ir import packing
from cosmos_export.ir.dims import Shape, Size, equal, expression, floor_div, product, simplify
from cosmos_export.ir.spec import E2M1, INT4, TensorSpec

aten = torch.ops.aten

# --------------------------------------------------------------------------------------------------------------------
# Operations of our own. References follow the published module they are recognised from, in the same order of rounding.
# --------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cosmos_export::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``cast(x / sqrt(mean(x², -1) + eps), weight.dtype) * weight`` statistics in fp32, result in weight's type."""
    wide = x.to(torch.float32)
    normal = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normal.to(weight.dtype) * weight


@torch.library.custom_op("cosmos_export::rotary", mutates_args=())
def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + d/2) of ``x`` [rows, heads, d] by the angles of each row; tables are [rows, d/2]."""
    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(1) for t in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@torch.library.custom_op("cosmos_export::swiglu", mutates_args=())
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate) * up


@torch.library.custom_op("cosmos_export::attention", mutates_args=())
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Grouped-query attention over rows: query [N, heads, d], key and value [M, kv_heads, d], result [N, heads, d]."""
    q, k, v = (t.unsqueeze(0).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).squeeze(0).contiguous()


@torch.library.custom_op("cosmos_export::joint_attention", mutates_args=())
def joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of ``query`` over own and prefix rows together; the prefix is last, so that its tail can be masked."""
    keys, values = torch.cat((key, prefix_key), dim=0), torch.cat((value, prefix_value), dim=0)
    result: torch.Tensor = attention(query, keys, values, False, scale)
    return result


@torch.library.custom_op("cosmos_export::quantize", mutates_args=())
def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale`` in FP8 E4M3, saturated; ``scale`` float32 []."""
    return packing.to_fp8(x, scale)


@torch.library.custom_op("cosmos_export::dequantize", mutates_args=())
def dequantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x · scale`` of FP8 E4M3 ``x``, multiplied in float32 and rounded to ``dtype``.

    ``scale`` is float32 [], or [N] with one for each row of ``x`` [N, K].
    """
    wide = x.to(torch.float32)
    return wide.mul_(scale if scale.dim() == 0 else scale.unsqueeze(-1)).to(dtype)


@torch.library.custom_op("cosmos_export::dequantize_groups", mutates_args=())
def dequantize_groups(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """INT4 ``x`` [N, K] times the ``scale`` [N, K / group] of its group, in the type of ``scale``."""
    group = x.shape[1] // scale.shape[1]
    return (packing.groups_of(x.to(scale.dtype), group) * scale.unsqueeze(-1)).flatten(-2)


@torch.library.custom_op("cosmos_export::dequantize_blocks", mutates_args=())
def dequantize_blocks(
    x: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """NVFP4: E2M1 ``x`` [N, K] times the scale of its block, ``block_scale · scale`` rounded to ``dtype``."""
    blocks = (block_scale.to(torch.float32) * scale).to(dtype).unsqueeze(-1)
    return (packing.groups_of(x.to(dtype), packing.NVFP4_BLOCK) * blocks).flatten(-2)


@torch.library.custom_op("cosmos_export::requantize_blocks", mutates_args=())
def requantize_blocks(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Activations in NVFP4 and back: block scales follow from ``x``, ``scale`` float32 [] does not."""
    blocks = packing.nvfp4_block_scale(x, scale)
    values = packing.to_e2m1(x, blocks, scale)
    result: torch.Tensor = dequantize_blocks(values, blocks, scale, x.dtype)
    return result


@torch.library.custom_op("cosmos_export::joint_attention_fp8", mutates_args=())
def joint_attention_fp8(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scales: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`joint_attention` with both products in FP8: the scaled query, keys, values and the softmax (scale 1/448).

    ``scales`` float32 [3]: of ``query · scale``, of all keys and of all values.
    """

    return attend_rounded(
        query, key, value, prefix_key, prefix_value, scales, scale, lambda _, x, step: packing.to_fp8(x, step)
    )


def attend_rounded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scales: torch.Tensor,
    scale: float,
    rounded: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`joint_attention_fp8` with its four roundings by ``rounded``: which, the values, and their scale.

    0 is the scaled query [heads, N, d], 1 the keys and 2 the values [heads, M, d], 3 the softmax [heads, N, M].
    """

    def narrow(which: int, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return (rounded(which, x, step).to(torch.float32) * step).to(x.dtype)

    def heads_first(own: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        return torch.cat((own, prefix), dim=0).transpose(0, 1).repeat_interleave(group, dim=0)

    group = query.shape[1] // key.shape[1]
    q = narrow(0, (query * scale).transpose(0, 1), scales[0])
    k, v = narrow(1, heads_first(key, prefix_key), scales[1]), narrow(2, heads_first(value, prefix_value), scales[2])
    weights = narrow(3, (q @ k.transpose(1, 2)).softmax(-1), torch.as_tensor(1 / packing.E4M3_MAX))
    return (weights @ v).transpose(0, 1).contiguous()


_ours = torch.ops.cosmos_export
JOINT_ATTENTION_FP8 = _ours.joint_attention_fp8.default
QUANTIZE = _ours.quantize.default
DEQUANTIZE = _ours.dequantize.default
DEQUANTIZE_GROUPS = _ours.dequantize_groups.default
DEQUANTIZE_BLOCKS = _ours.dequantize_blocks.default
REQUANTIZE_BLOCKS = _ours.requantize_blocks.default
RMS_NORM = _ours.rms_norm.default
ROTARY = _ours.rotary.default
SWIGLU = _ours.swiglu.default
ATTENTION = _ours.attention.default
JOINT_ATTENTION = _ours.joint_attention.default


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=weight.dtype)


@rotary.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))


@swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate)


@attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    return torch.empty_like(query)


@joint_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return torch.empty_like(query)


@quantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


@dequantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


@dequantize_groups.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=scale.dtype)


@dequantize_blocks.register_fake
def _(x: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


@joint_attention_fp8.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scales: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return torch.empty_like(query)


@requantize_blocks.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


# --------------------------------------------------------------------------------------------------------------------
# Shape rules. A rule takes the operands (TensorSpec for values, plain Python otherwise) and returns the result's spec.
# --------------------------------------------------------------------------------------------------------------------

Rule = Callable[..., TensorSpec]
RULES: dict[Any, Rule] = {}


class SpecError(ValueError):
    """Operands that the operation does not take."""


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for target in targets:
            RULES[target] = rule
        return rule

    return register


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def axis_of(dim: int, rank: int) -> int:
    """``dim`` counted from the front; raises SpecError when out of range."""
    _require(-rank <= dim < rank, f"axis {dim} of a value of rank {rank}")
    return dim % rank


def broadcast(shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    result: list[Size] = []
    for axis in range(rank):
        size: Size = 1
        for shape in shapes:
            index = axis - rank + len(shape)
            if index < 0 or equal(shape[index], 1):
                continue
            _require(equal(size, 1) or equal(size, shape[index]), f"sizes {size} and {shape[index]} do not broadcast")
            size = shape[index]
        result.append(size)
    return tuple(result)


@_rule(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
def _elementwise(a: Any, b: Any) -> TensorSpec:
    specs = [s for s in (a, b) if isinstance(s, TensorSpec)]
    if len(specs) == 2:
        # A rank-0 tensor does not widen the other operand within one kind (PyTorch's type promotion).
        low, high = sorted(specs, key=lambda s: s.rank)
        weak = low.rank == 0 < high.rank and low.dtype.is_floating_point == high.dtype.is_floating_point
        dtype = high.dtype if weak else torch.promote_types(low.dtype, high.dtype)
    else:
        scalar = b if isinstance(a, TensorSpec) else a
        dtype = specs[0].dtype
        if isinstance(scalar, float) and not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
    return TensorSpec(dtype, broadcast([s.shape for s in specs]))


@_rule(aten.cos.default, aten.sin.default, aten.exp.default, aten.rsqrt.default, aten.silu.default, aten.relu.default)
@_rule(aten.neg.default, aten.reciprocal.default)
def _unary(x: TensorSpec) -> TensorSpec:
    return x


@_rule(aten.pow.Tensor_Scalar)
def _pow(x: TensorSpec, exponent: float) -> TensorSpec:
    return x


@_rule(aten.clamp_min.default)
def _clamp_min(x: TensorSpec, low: float) -> TensorSpec:
    return x


@_rule(aten.clamp.default)
def _clamp(x: TensorSpec, low: float, high: float) -> TensorSpec:
    return x


@_rule(aten.where.self)
def _where(condition: TensorSpec, a: TensorSpec, b: TensorSpec) -> TensorSpec:
    _require(condition.dtype == torch.bool and a.dtype == b.dtype, "where takes a bool and two values of one type")
    return TensorSpec(a.dtype, broadcast([condition.shape, a.shape, b.shape]))


@_rule(aten._to_copy.default)
def _convert(x: TensorSpec, *, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(dtype, x.shape)


@_rule(aten.mean.dim)
def _mean(x: TensorSpec, dims: Sequence[int], keepdim: bool = False) -> TensorSpec:
    axes = {axis_of(d, x.rank) for d in dims}
    kept = [1 if i in axes else s for i, s in enumerate(x.shape) if keepdim or i not in axes]
    return TensorSpec(x.dtype, tuple(kept))


@_rule(aten.linalg_vector_norm.default)
def _vector_norm(x: TensorSpec, order: float, dims: Sequence[int], keepdim: bool = False) -> TensorSpec:
    _require(order == 2, f"a norm of order {order}")
    return _mean(x, dims, keepdim)


@_rule(aten.linear.default)
def _linear(x: TensorSpec, weight: TensorSpec, bias: TensorSpec | None = None) -> TensorSpec:
    _require(weight.rank == 2 and equal(x.shape[-1], weight.shape[1]), f"linear of {x} by {weight}")
    _require(x.dtype == weight.dtype, f"linear of {x} by {weight}: types differ")
    _require(bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype), f"bias {bias} of {weight}")
    return TensorSpec(x.dtype, (*x.shape[:-1], weight.shape[0]))


@_rule(aten.matmul.default)
def _matmul(a: TensorSpec, b: TensorSpec) -> TensorSpec:
    _require(a.rank >= 2 and b.rank >= 2 and equal(a.shape[-1], b.shape[-2]), f"matmul of {a} and {b}")
    _require(a.dtype == b.dtype, f"matmul of {a} and {b}: types differ")
    return TensorSpec(a.dtype, (*broadcast([a.shape[:-2], b.shape[:-2]]), a.shape[-2], b.shape[-1]))


def spatial(values: Sequence[int], axes: int) -> list[int]:
    """One value an axis: a convolution takes one for all, too."""
    return list(values) * axes if len(values) == 1 else list(values)


@_rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _convolution(
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> TensorSpec:
    axes = x.rank - 2
    fits = weight.rank == x.rank and equal(x.shape[1], simplify(weight.shape[1] * sympy.Integer(groups)))
    _require(fits and x.dtype == weight.dtype, f"convolution of {x} by {weight}")
    _require(bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype), f"bias {bias} of {weight}")
    steps = zip(x.shape[2:], weight.shape[2:], *(spatial(v, axes) for v in (stride, padding, dilation)), strict=True)
    sizes = [floor_div(expression(n) + 2 * p - d * (k - 1) - 1, s) + 1 for n, k, s, p, d in steps]
    return TensorSpec(x.dtype, (x.shape[0], weight.shape[0], *sizes))


@_rule(aten.conv_transpose1d.default)
def _transposed_convolution(
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> TensorSpec:
    fits = weight.rank == x.rank == 3 and equal(x.shape[1], weight.shape[0]) and groups == 1
    _require(fits and x.dtype == weight.dtype, f"transposed convolution of {x} by {weight}")
    span = dilation[0] * (weight.shape[2] - 1) - 2 * padding[0] + output_padding[0] + 1
    return TensorSpec(x.dtype, (x.shape[0], weight.shape[1], (expression(x.shape[2]) - 1) * stride[0] + span))


@_rule(aten.view.default)
def _view(x: TensorSpec, shape: Sequence[Size]) -> TensorSpec:
    sizes = list(shape)
    if -1 in sizes:
        at = sizes.index(-1)
        rest = product(s for i, s in enumerate(sizes) if i != at)
        sizes[at] = simplify(sympy.cancel(expression(product(x.shape)) / rest))
    _require(equal(product(sizes), product(x.shape)), f"view of {x} as {list(shape)}")
    return TensorSpec(x.dtype, tuple(sizes))


@_rule(aten.expand.default)
def _expand(x: TensorSpec, sizes: Sequence[Size]) -> TensorSpec:
    offset = len(sizes) - x.rank
    result = tuple(x.shape[i - offset] if size == -1 else size for i, size in enumerate(sizes))
    for i, size in enumerate(x.shape):
        _require(equal(size, 1) or equal(size, result[i + offset]), f"expand of {x} to {list(sizes)}")
    return TensorSpec(x.dtype, result)


@_rule(aten.permute.default)
def _permute(x: TensorSpec, dims: Sequence[int]) -> TensorSpec:
    _require(sorted(axis_of(d, x.rank) for d in dims) == list(range(x.rank)), f"permute of {x} by {list(dims)}")
    return TensorSpec(x.dtype, tuple(x.shape[d] for d in dims))


@_rule(aten.unsqueeze.default)
def _unsqueeze(x: TensorSpec, dim: int) -> TensorSpec:
    at = axis_of(dim, x.rank + 1)
    return TensorSpec(x.dtype, (*x.shape[:at], 1, *x.shape[at:]))


@_rule(aten.squeeze.dim)
def _squeeze(x: TensorSpec, dim: int) -> TensorSpec:
    at = axis_of(dim, x.rank)
    _require(equal(x.shape[at], 1), f"squeeze of axis {dim} of {x}")
    return TensorSpec(x.dtype, (*x.shape[:at], *x.shape[at + 1 :]))


@_rule(aten.cat.default)
def _cat(tensors: Sequence[TensorSpec], dim: int = 0) -> TensorSpec:
    first = tensors[0]
    at = axis_of(dim, first.rank)
    for t in tensors[1:]:
        same = all(equal(a, b) for i, (a, b) in enumerate(zip(first.shape, t.shape, strict=True)) if i != at)
        _require(same and t.dtype == first.dtype, f"cat of {first} and {t} along {dim}")
    total = simplify(sum((t.shape[at] for t in tensors), sympy.Integer(0)))
    return TensorSpec(first.dtype, (*first.shape[:at], total, *first.shape[at + 1 :]))


@_rule(aten.slice.Tensor)
def _slice(x: TensorSpec, dim: int, start: Size, end: Size, step: int = 1) -> TensorSpec:
    at = axis_of(dim, x.rank)
    length = simplify(expression(end) - start)
    if step != 1:
        _require(isinstance(length, int), "a strided slice has a fixed length")
        length = -(-length // step)
    return TensorSpec(x.dtype, (*x.shape[:at], length, *x.shape[at + 1 :]))


@_rule(aten.select.int)
def _select(x: TensorSpec, dim: int, index: int) -> TensorSpec:
    at = axis_of(dim, x.rank)
    return TensorSpec(x.dtype, (*x.shape[:at], *x.shape[at + 1 :]))


@_rule(aten.slice_scatter.default)
def _slice_scatter(x: TensorSpec, src: TensorSpec, dim: int, start: Size, end: Size, step: int = 1) -> TensorSpec:
    part = _slice(x, dim, start, end, step)
    _require(part.dtype == src.dtype and all(map(equal, part.shape, src.shape)), f"scatter of {src} into {part}")
    return x


@_rule(aten.select_scatter.default)
def _select_scatter(x: TensorSpec, src: TensorSpec, dim: int, index: int) -> TensorSpec:
    part = _select(x, dim, index)
    _require(part.dtype == src.dtype and all(map(equal, part.shape, src.shape)), f"scatter of {src} into {part}")
    return x


@_rule(aten.index_put.default)
def _index_put(x: TensorSpec, indices: Sequence[TensorSpec], values: TensorSpec) -> TensorSpec:
    _require(len(indices) == 1 and values.dtype == x.dtype, "index_put along axis 0 with values of the same type")
    return x


@_rule(aten.index.Tensor)
def _index(x: TensorSpec, indices: Sequence[TensorSpec]) -> TensorSpec:
    _require(len(indices) == 1, "index along axis 0")
    return TensorSpec(x.dtype, (*indices[0].shape, *x.shape[1:]))


@_rule(aten.embedding.default)
def _embedding(weight: TensorSpec, indices: TensorSpec) -> TensorSpec:
    return TensorSpec(weight.dtype, (*indices.shape, *weight.shape[1:]))


@_rule(aten.arange.start)
def _arange(start: Size, end: Size, *, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(dtype, (simplify(expression(end) - start),))


@_rule(aten.full.default)
def _full(size: Sequence[Size], value: float, *, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(dtype, tuple(size))


@_rule(aten.constant_pad_nd.default)
def _pad(x: TensorSpec, pad: Sequence[Size], value: float = 0.0) -> TensorSpec:
    shape = list(x.shape)
    for i in range(len(pad) // 2):
        axis = x.rank - 1 - i
        shape[axis] = simplify(shape[axis] + expression(pad[2 * i]) + pad[2 * i + 1])
    return TensorSpec(x.dtype, tuple(shape))


@_rule(RMS_NORM)
def _rms_norm(x: TensorSpec, weight: TensorSpec, eps: float) -> TensorSpec:
    _require(weight.rank == 1 and equal(x.shape[-1], weight.shape[0]), f"rms_norm of {x} by {weight}")
    return TensorSpec(weight.dtype, x.shape)


@_rule(ROTARY)
def _rotary(x: TensorSpec, cos: TensorSpec, sin: TensorSpec) -> TensorSpec:
    half = simplify(expression(x.shape[-1]) / 2)
    fits = cos == sin and cos.rank == 2 and x.rank == 3 and equal(cos.shape[0], x.shape[0]) and cos.shape[1] == half
    _require(bool(fits), f"rotary of {x} by tables {cos} and {sin}")
    return TensorSpec(torch.promote_types(x.dtype, cos.dtype), x.shape)


@_rule(SWIGLU)
def _swiglu(gate: TensorSpec, up: TensorSpec) -> TensorSpec:
    _require(gate == up, f"swiglu of {gate} and {up}")
    return gate


def _check_attention(query: TensorSpec, key: TensorSpec, value: TensorSpec) -> None:
    fits = query.rank == key.rank == 3 and key == value and query.dtype == key.dtype
    _require(fits and query.shape[2] == key.shape[2], f"attention of {query} over {key} and {value}")
    _require(query.shape[1] % key.shape[1] == 0, f"{query.shape[1]} query heads over {key.shape[1]} key heads")


@_rule(ATTENTION)
def _attention(query: TensorSpec, key: TensorSpec, value: TensorSpec, causal: bool, scale: float) -> TensorSpec:
    _check_attention(query, key, value)
    _require(not causal or equal(query.shape[0], key.shape[0]), "causal attention is over the same rows")
    return query


@_rule(JOINT_ATTENTION)
def _joint_attention(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    prefix_key: TensorSpec,
    prefix_value: TensorSpec,
    scale: float,
) -> TensorSpec:
    _check_attention(query, key, value)
    _check_attention(query, prefix_key, prefix_value)
    return query


@_rule(JOINT_ATTENTION_FP8)
def _joint_attention_fp8(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    prefix_key: TensorSpec,
    prefix_value: TensorSpec,
    scales: TensorSpec,
    scale: float,
) -> TensorSpec:
    _require(scales == TensorSpec(torch.float32, (3,)), f"three scales, not {scales}")
    return _joint_attention(query, key, value, prefix_key, prefix_value, scale)


def _require_scale(scale: TensorSpec) -> None:
    _require(scale == TensorSpec(torch.float32, ()), f"a scale is one float32 number, not {scale}")


@_rule(QUANTIZE)
def _quantize(x: TensorSpec, scale: TensorSpec) -> TensorSpec:
    _require_scale(scale)
    _require(x.dtype in (torch.float32, torch.bfloat16, torch.float16), f"quantize of {x}")
    return TensorSpec(torch.float8_e4m3fn, x.shape)


@_rule(DEQUANTIZE)
def _dequantize(x: TensorSpec, scale: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    if scale != TensorSpec(torch.float32, x.shape[:1]):
        _require_scale(scale)
    _require(x.dtype == torch.float8_e4m3fn, f"dequantize of {x}")
    return TensorSpec(dtype, x.shape)


@_rule(DEQUANTIZE_GROUPS)
def _dequantize_groups(x: TensorSpec, scale: TensorSpec) -> TensorSpec:
    fits = x.dtype == INT4 and x.rank == scale.rank == 2 and equal(x.shape[0], scale.shape[0])
    _require(fits and x.shape[1] % scale.shape[1] == 0, f"dequantize of {x} by {scale}")
    return TensorSpec(scale.dtype, x.shape)


@_rule(DEQUANTIZE_BLOCKS)
def _dequantize_blocks(x: TensorSpec, block_scale: TensorSpec, scale: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    _require_scale(scale)
    blocks = TensorSpec(torch.float8_e4m3fn, (*x.shape[:-1], x.shape[-1] // packing.NVFP4_BLOCK))
    _require(x.dtype == E2M1 and block_scale == blocks, f"dequantize of {x} by {block_scale}")
    return TensorSpec(dtype, x.shape)


@_rule(REQUANTIZE_BLOCKS)
def _requantize_blocks(x: TensorSpec, scale: TensorSpec) -> TensorSpec:
    _require_scale(scale)
    _require(x.shape[-1] % packing.NVFP4_BLOCK == 0, f"{x} has no blocks of {packing.NVFP4_BLOCK}")
    return x


@_rule(aten.scaled_dot_product_attention.default)
def _sdpa(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    attn_mask: TensorSpec | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> TensorSpec:
    return query


VIEWS = frozenset({
    aten.view.default, aten.expand.default, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten._to_copy.default,
})  # fmt: skip
"""Operations that move or repeat elements and compute nothing: free to repeat where they are read."""

COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})
