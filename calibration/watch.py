"""Observations of one decoder layer while it runs: the input of every linear, and what enters both attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

from cosmos_export.calibration.observers import ObservedRange
from cosmos_export.checkpoint import Tower

_ATTENTION = "diffusers.models.transformers.transformer_cosmos3.dispatch_attention_fn"


@dataclass
class Seen:
    """Observations of one layer by what the table calls them, without the layer's name, and rows kept for a search."""

    ranges: dict[str, ObservedRange] = field(default_factory=dict)
    """``self_attn.to_q.input_amax``, ``attention.generator.q_amax`` …"""
    readers: dict[str, list[str]] = field(default_factory=dict)
    """Linears that read one tensor, under the first of them; only where rows are kept."""
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    """float32 [kept, K] of the tensor that the linears of a key of ``readers`` read."""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """float64 [K + 1] of the same: the sum of |x| over all rows, and the number of rows."""


@dataclass(frozen=True)
class Watched:
    """The observations to keep: distributions (``count``), and for a search ``rows`` of each sample."""

    count: bool = False
    rows: int = 0

    @contextmanager
    def on(self, layer: nn.Module) -> Iterator[Seen]:
        """Fills the result while ``layer`` runs within the block."""
        seen = Seen()
        cache: dict[int, tuple[torch.Tensor, ObservedRange, str]] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def before(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
                values = arguments[0]
                # Once for a tensor that several linears read. The cache keeps it alive, so that its id stays its own.
                if id(values) not in cache:
                    cache[id(values)] = (values, ObservedRange.of(values, count=self.count), name)
                    if self.rows:
                        seen.rows[name] = _spread(values, self.rows)
                        sums = values.detach().double().abs().sum(0)
                        seen.sums[name] = torch.cat([sums, torch.tensor([float(values.shape[0])], dtype=torch.float64)])
                _, seen.ranges[f"{name}.input_amax"], first = cache[id(values)]
                if self.rows:
                    seen.readers.setdefault(first, []).append(name)

            return before

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
            tower = Tower.REASONER if options.get("is_causal") else Tower.GENERATOR
            for operand, values in (("q", q), ("k", k), ("v", v)):
                seen.ranges[f"attention.{tower}.{operand}_amax"] = ObservedRange.of(values, count=self.count)
            return published(q, k, v, **options)

        from diffusers.models.transformers import transformer_cosmos3

        published = transformer_cosmos3.dispatch_attention_fn
        handles = [
            module.register_forward_pre_hook(hook(name))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            with mock.patch(_ATTENTION, attention):
                yield seen
        finally:
            for handle in handles:
                handle.remove()


def _spread(values: torch.Tensor, count: int) -> torch.Tensor:
    """At most ``count`` rows of ``values``, evenly over all of them."""
    total = values.shape[0]
    index = torch.arange(min(count, total)) * total // min(count, total)
    return values.detach()[index].float()
