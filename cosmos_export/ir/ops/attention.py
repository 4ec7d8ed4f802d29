"""`ATTENTION` of rows, and the batched form in which PyTorch writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cosmos_export.ir.dims import equal
from cosmos_export.ir.ops.declare import Trait, aten, new_operator, operation, require
from cosmos_export.ir.spec import TensorSpec


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Grouped-query attention over rows: query [N, heads, d], key and value [M, kv_heads, d], result [N, heads, d]."""
    q, k, v = (t.unsqueeze(0).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).squeeze(0).contiguous()


ATTENTION = new_operator(attention)


def check_attention(query: TensorSpec, key: TensorSpec, value: TensorSpec) -> None:
    """SpecError unless rows of ``query`` can attend to rows of ``key`` and ``value``."""
    fits = query.rank == key.rank == 3 and key == value and query.dtype == key.dtype
    require(fits and query.shape[2] == key.shape[2], f"attention of {query} over {key} and {value}")
    require(query.shape[1] % key.shape[1] == 0, f"{query.shape[1]} query heads over {key.shape[1]} key heads")


def _rows(query: TensorSpec, key: TensorSpec, value: TensorSpec, causal: bool, scale: float) -> Sequence[int]:
    return () if causal else (0,)


@operation(ATTENTION, traits=(Trait.ATTENDS,), rows=_rows)
def _rule(query: TensorSpec, key: TensorSpec, value: TensorSpec, causal: bool, scale: float) -> TensorSpec:
    check_attention(query, key, value)
    require(not causal or equal(query.shape[0], key.shape[0]), "causal attention is over the same rows")
    return query


def _contiguous(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> Any:
    # Layout in memory is no part of a graph, yet it chooses among kernels that round differently: always the plain one.
    operands = (t.contiguous() for t in (query, key, value))
    return aten.scaled_dot_product_attention.default(*operands, *rest, **options)


@operation(aten.scaled_dot_product_attention.default, reference=_contiguous)
def _batched(
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
