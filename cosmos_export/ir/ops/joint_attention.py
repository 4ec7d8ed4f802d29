"""`JOINT_ATTENTION`: attention over the rows of the step and of the prompt, and its form in FP8."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cosmos_export.ir import packing
from cosmos_export.ir.ops.attention import ATTENTION, check_attention
from cosmos_export.ir.ops.declare import Trait, new_operator, operation, require
from cosmos_export.ir.spec import TensorSpec


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
    result: torch.Tensor = ATTENTION(query, keys, values, False, scale)
    return result


JOINT_ATTENTION = new_operator(joint_attention)


@operation(JOINT_ATTENTION, traits=(Trait.ATTENDS, Trait.JOINT), rows=(0,))
def _rule(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    prefix_key: TensorSpec,
    prefix_value: TensorSpec,
    scale: float,
) -> TensorSpec:
    check_attention(query, key, value)
    check_attention(query, prefix_key, prefix_value)
    return query


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


JOINT_ATTENTION_FP8 = new_operator(joint_attention_fp8)


@operation(JOINT_ATTENTION_FP8, traits=(Trait.ATTENDS, Trait.JOINT, Trait.ROUNDS), rows=(0,))
def _rule_fp8(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    prefix_key: TensorSpec,
    prefix_value: TensorSpec,
    scales: TensorSpec,
    scale: float,
) -> TensorSpec:
    require(scales == TensorSpec(torch.float32, (3,)), f"three scales, not {scales}")
    return _rule(query, key, value, prefix_key, prefix_value, scale)


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
