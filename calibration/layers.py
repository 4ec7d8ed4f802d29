"""The published modules of a checkpoint, one decoder layer at a time, and the part before the layers.

Modules are diffusers' own, built without memory for their parameters and filled from the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cosmos_export.calibration.weights import RowsOf, read_tensor, torch_dtype
from cosmos_export.capture.adapter import JointStep
from cosmos_export.capture.model import compute_dtypes, real_buffers
from cosmos_export.checkpoint import Checkpoint, TensorEntry

Rotary = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""cos and sin of the prompt's rows, cos and sin of the generated rows."""
_EMBEDDING = "embed_tokens"
"""Name of the vocabulary's table, which is as large as a layer and of which a prompt reads few rows."""
_NOT_READ = (f"{_EMBEDDING}.", "lm_head.", "norm.", "norm_moe_gen.", "proj_out.", "audio_proj_out.", "action_proj_out.")


_WITHOUT_NARROW_PRODUCTS = ("AVX2",)
"""PyTorch's name of a CPU on which it multiplies narrow matrices one element at a time."""


class WideLinear(nn.Linear):
    """A linear that multiplies in float32 whatever its type, and rounds its result once.

    That is what hardware does that has the type, and what PyTorch does too, but on a CPU without instructions for
    bfloat16 five times slower (2-core AVX2 machine, 540 × 4096 × 12288: 7.0 s and 1.4 s).
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(values.float(), self.weight.float(), bias).to(values.dtype)


@dataclass(frozen=True)
class Hidden:
    """The inputs of a decoder layer: rows of both towers, [rows, hidden], and their rotations."""

    und: torch.Tensor
    gen: torch.Tensor
    rotary: Rotary


class LayerSource:
    """Decoder layers of ``checkpoint``; at most one has memory at a time if the caller drops the one before."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors, self.geometry = checkpoint.tensors, checkpoint.geometry
        self.count = checkpoint.geometry.num_hidden_layers
        model = _empty(checkpoint.geometry.config | {"num_hidden_layers": 1, "vocab_size": 1})
        self._layer = model.layers[0]
        if torch.backends.cpu.get_cpu_capability() in _WITHOUT_NARROW_PRODUCTS:
            for module in self._layer.modules():
                if type(module) is nn.Linear:
                    module.__class__ = WideLinear
        self._names = [name for name, _ in self._layer.named_parameters()]

    def size_bytes(self, index: int) -> int:
        """Bytes of layer ``index`` in the files."""
        return sum(entry.size_bytes for entry in self._entries(index).values())

    def load(self, index: int) -> nn.Module:
        """Layer ``index``, in the type of its weights. The module is one and the same; its parameters are replaced."""
        state = {name: read_tensor(entry) for name, entry in self._entries(index).items()}
        self._layer.load_state_dict(state, assign=True, strict=True)
        layer: nn.Module = self._layer.requires_grad_(False)
        return layer

    def drop(self) -> None:
        """Give the memory of the loaded layer back."""
        self._layer.to("meta")

    def _entries(self, index: int) -> Mapping[str, TensorEntry]:
        return {name: self._tensors[f"layers.{index}.{name}"] for name in self._names}


class Entrance:
    """Everything before the first decoder layer: embeddings, projections, time, positions."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.geometry.config | {"num_hidden_layers": 0}
        model = _empty(config)
        stored = {name: checkpoint.tensors[name] for name, _ in model.named_parameters()}
        read = {name: entry for name, entry in stored.items() if not name.startswith(_NOT_READ)}
        loaded = {name: read_tensor(entry) for name, entry in read.items()}
        dtypes = compute_dtypes(model, {name: torch_dtype(entry) for name, entry in stored.items()})
        model.load_state_dict({n: t.to(dtypes[n]) for n, t in loaded.items()}, assign=True, strict=False)
        embedding = f"{_EMBEDDING}.weight"
        model.embed_tokens = RowsOf(stored[embedding], dtypes[embedding])
        for name, buffer in real_buffers(config).items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer
        model._run_decoder_stack = _enter
        self.dtype = dtypes["proj_in.weight"]
        self._step = JointStep(model)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Hidden:
        """The inputs of the first layer for those of one step, as `JointStep` takes them."""
        with torch.no_grad():
            try:
                self._step(**inputs)
            except _EnteredError as entered:
                return entered.hidden
        raise AssertionError("the published forward did not reach its layers")


class _EnteredError(Exception):
    def __init__(self, hidden: Hidden) -> None:
        super().__init__()
        self.hidden = hidden


def _enter(und_seq: torch.Tensor, gen_seq: torch.Tensor, rotary_emb: Rotary) -> Any:
    """Stands in for the stack of layers."""
    raise _EnteredError(Hidden(und_seq, gen_seq, rotary_emb))


def _empty(config: Mapping[str, Any]) -> Any:
    from diffusers import Cosmos3OmniTransformer

    with torch.device("meta"):
        return Cosmos3OmniTransformer(**config).eval()
