"""Kernels as operators a compiled graph calls: opaque to the compiler, with a shape rule, run by the kernel."""

from __future__ import annotations

import torch

from cosmos_export.kernels import joint_attention as kernel


@torch.library.custom_op("cosmos_export_kernels::joint_attention", mutates_args=())
def _joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return kernel.joint_attention(query, key, value, prefix_key, prefix_value, scale)


@_joint_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("cosmos_export_kernels::joint_attention_fp8", mutates_args=())
def _joint_attention_fp8(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """E4M3 operands with scales of one, bf16 result."""
    heads, kv_heads = query.shape[1], key.shape[1]
    ones = [torch.ones(n, device=query.device) for n in (heads, kv_heads, kv_heads)]
    operands = (query, key, value, prefix_key, prefix_value, scale)
    return kernel.joint_attention(*operands, scales=(ones[0], ones[1], ones[2]))


@_joint_attention_fp8.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(query.shape, dtype=torch.bfloat16)


joint_attention_fp8 = torch.ops.cosmos_export_kernels.joint_attention_fp8.default
joint_attention = torch.ops.cosmos_export_kernels.joint_attention.default
