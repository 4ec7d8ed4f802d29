"""The families of Cosmos 3: what follows from a checkpoint's backbone and cannot be read off its widths.

A checkpoint belongs to the family that its activation names (`family_of`). Everything else asks the family for a fact,
and nothing outside this file compares with a family's name: a new family is a new row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


@dataclass(frozen=True)
class FamilyFacts:
    """One row: the architecture, what the published checkpoints of the family say, and where their files differ."""

    activation: str
    """``hidden_act`` of the transformer's configuration, which decides the family."""
    backbone: str
    """``backbone_type`` of the transformer's configuration."""
    states_backbone: bool
    """Whether published configurations have ``backbone_type`` and ``rope_axes_dim``; the others have neither."""
    reasoner: str
    """Prefix of ``model_type`` in transformers' configurations of the reasoner."""
    mlp_inputs: tuple[str, ...]
    """Linears of the MLP that read its input, in their order: gate and up (SwiGLU), or up alone (squared ReLU)."""
    mlp_activations: int
    """Values of the MLP's width that a row holds at the widest point: gate, up and their product, or up alone."""
    stream_width: float
    """Further values, of the model's width, that a row holds at that point. Measured on engines of true size."""
    max_position: int
    """Rotary positions that the published models were trained for."""
    native_grid: bool
    """``use_native_flow_schedule`` of the published model index."""
    scheduler: Mapping[str, Any]
    """Settings of the published scheduler besides UniPC with flow sigmas."""
    system_prompt: bool
    """``default_use_system_prompt`` of the published model index."""
    root_lists_generator: bool
    """Whether ``model.safetensors.index.json`` lists the generator's tensors besides the reasoner's."""
    vision: Mapping[str, Any]
    """Published widths of the reasoner's vision encoder."""
    preset: str
    """Published size that small checkpoints of the family are derived from."""
    recorded_as_edge: bool
    """``edge`` of a bundle's sampling record, which tells the families apart by this flag."""


class Family(StrEnum):
    """The backbone of both towers of a checkpoint."""

    OMNI = "omni"
    """Qwen3-VL: Nano, Super and their variants."""
    EDGE = "edge"
    """Nemotron dense: Edge and its variants."""

    @property
    def facts(self) -> FamilyFacts:
        """The family's row."""
        return _FACTS[self]


_FACTS: Mapping[Family, FamilyFacts] = {
    Family.OMNI: FamilyFacts(
        activation="silu",
        backbone="qwen3_vl_dense",
        states_backbone=False,
        reasoner="qwen3_vl",
        mlp_inputs=("gate_proj", "up_proj"),
        mlp_activations=3,
        stream_width=2.65,
        max_position=262_144,
        native_grid=False,
        scheduler={"use_karras_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.147},
        system_prompt=True,
        root_lists_generator=True,
        vision={
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
        },
        preset="nano",
        recorded_as_edge=False,
    ),
    Family.EDGE: FamilyFacts(
        activation="relu2",
        backbone="cosmos3_edge_nemotron_dense",
        states_backbone=True,
        reasoner="cosmos3_edge",
        mlp_inputs=("up_proj",),
        mlp_activations=1,
        stream_width=4.5,
        max_position=131_072,
        native_grid=True,
        scheduler={"flow_shift": 3.0},
        system_prompt=False,
        root_lists_generator=False,
        vision={
            "num_hidden_layers": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
            "num_patches": 256,
        },
        preset="edge",
        recorded_as_edge=True,
    ),
}  # fmt: skip

ACTIVATIONS: Mapping[str, Family] = {family.facts.activation: family for family in Family}
"""The family of each ``hidden_act`` that is compiled."""


def family_of(activation: str) -> Family:
    """The family of a checkpoint with this ``hidden_act``. KeyError for one that is not in `ACTIVATIONS`."""
    return ACTIVATIONS[activation]


def recorded_family(edge: bool) -> Family:
    """The family that a bundle's sampling record means by ``edge``."""
    return next(family for family in Family if family.facts.recorded_as_edge == edge)
