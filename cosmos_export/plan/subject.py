"""The subject of a plan: a checkpoint, or one of the published models without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from cosmos_export.checkpoint import Checkpoint, Tower
from cosmos_export.checkpoint.codecs import CODECS, codec_tensors
from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.layout import ExpectedTensor, TensorPart, expected_tensors
from cosmos_export.checkpoint.policy import read_policy
from cosmos_export.checkpoint.published import POLICIES, PUBLISHED
from cosmos_export.diagnostics import UserError
from cosmos_export.sampling import CheckpointSampling

GRAPHS = ("reasoner", "conditioning", "schedule", "generator")
"""The graphs a transformer is taken apart into. The schedule's becomes a table, the others become engines."""

PUBLISHED_CODECS: Mapping[str, int] = {
    "vae-decoder": 555_060_892, "vae-encoder": 149_639_440, "sound-decoder": 473_097_282,
}  # fmt: skip
"""Parameters of the published codecs, both halves of the autoencoder with the convolutions they share."""


@dataclass(frozen=True)
class Subject:
    """A model, as far as its cost depends on it."""

    name: str
    variant: str
    geometry: Geometry
    sampling: CheckpointSampling
    codecs: Mapping[str, int]
    """Parameters of each codec it has."""
    weight_norm: Mapping[str, int]
    """Parameters of each codec under weight normalization, which are folded in fp32."""
    tokenizer_bytes: int
    input_bytes: int
    """Bytes of the checkpoint's weight files."""

    def graphs(self) -> Mapping[str, Sequence[ExpectedTensor]]:
        """Tensors by the graph that computes with them. Tensors that generation never reads are left out."""
        return graph_tensors(self.geometry)


@cache
def graph_tensors(geometry: Geometry) -> Mapping[str, Sequence[ExpectedTensor]]:
    """See `Subject.graphs`."""
    found: dict[str, list[ExpectedTensor]] = {name: [] for name in GRAPHS}
    last = f"layers.{geometry.num_hidden_layers - 1}."
    for tensor in expected_tensors(geometry).values():
        graph = _graph(tensor, last, geometry)
        if graph is not None:
            found[graph].append(tensor)
    return MappingProxyType({name: tuple(tensors) for name, tensors in found.items() if tensors})


@cache
def graph_parameters(geometry: Geometry) -> Mapping[str, int]:
    """Parameters of each graph."""
    return MappingProxyType({n: sum(t.elements for t in own) for n, own in graph_tensors(geometry).items()})


_LAST_REASONER = ("self_attn.to_k.", "self_attn.to_v.", "input_layernorm.")
"""The reasoner's last layer is read for its keys and values alone, with the norm that its keys have."""


def _graph(tensor: ExpectedTensor, last: str, geometry: Geometry) -> str | None:
    match tensor.part:
        case TensorPart.EMBED:
            return "reasoner"
        case TensorPart.LM_HEAD:
            return None
        case TensorPart.TIME:
            return "schedule"
        case TensorPart.ACTION:
            return "conditioning" if tensor.name != "action_modality_embed" else "generator"
    if tensor.tower is Tower.GENERATOR:
        return "generator"
    if tensor.name == "norm.weight":
        return None
    if not tensor.name.startswith(last):
        return "reasoner"
    norm = "self_attn.norm_k." if geometry.qk_norm_for_text else "self_attn.k_norm_und_for_gen."
    return "reasoner" if tensor.name.removeprefix(last).startswith((*_LAST_REASONER, norm)) else None


def sampling_of(checkpoint: Checkpoint) -> CheckpointSampling:
    """Sampling settings of ``checkpoint``."""
    policy = read_policy(checkpoint.policy)
    return CheckpointSampling(
        scheduler=checkpoint.scheduler,
        native=bool(checkpoint.model_index.get("use_native_flow_schedule")),
        distilled_sigmas=checkpoint.distilled_sigmas,
        family=checkpoint.geometry.family,
        policy=None if policy is None else policy.domain,
    )


def from_checkpoint(checkpoint: Checkpoint) -> Subject:
    """The subject that ``checkpoint`` is."""
    present = [name for name, part in CODECS.items() if part.folder in checkpoint.component_tensors]
    tensors = {name: codec_tensors(checkpoint, name) for name in present}
    folder = checkpoint.components.get("text_tokenizer")
    tokenizer = None if folder is None else folder / "tokenizer.json"
    return Subject(
        name=str(checkpoint.root),
        variant=checkpoint.variant,
        geometry=checkpoint.geometry,
        sampling=sampling_of(checkpoint),
        codecs={name: sum(e.elements for e in found.values()) for name, found in tensors.items()},
        weight_norm={
            name: sum(e.elements for key, e in found.items() if key.endswith("weight_v"))
            for name, found in tensors.items()
        },
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer is not None and tokenizer.is_file() else 0,
        input_bytes=sum(e.size_bytes for e in checkpoint.tensors.values())
        + sum(e.size_bytes for found in checkpoint.component_tensors.values() for e in found.values()),
    )


_TOKENIZER_BYTES = 15_900_000
"""Approximate size of the published tokenizers."""
_ENCODER_PARAMETERS = {"nano": 576_388_080, "super": 595_266_800, "edge": 489_342_608}
"""Parameters of the reasoner's vision encoder, which is not compiled, but hashed with the rest of the checkpoint."""
_SOUND_ENCODER_PARAMETERS = 23_178_672
_FOLDED_PARAMETERS = 472_928_640
"""Parameters of the sound decoder under weight normalization."""


def published_subject(name: str) -> Subject:
    """Nano, Super or Edge, or a policy, as published, in bf16, without a checkpoint. UserError CX480 for another
    name."""
    if name not in PUBLISHED and name not in POLICIES:
        raise UserError("CX480", f"there is no published size `{name}`", f"one of {', '.join((*PUBLISHED, *POLICIES))}")
    size, policy = POLICIES.get(name, (name, None))
    geometry = PUBLISHED[size]
    codecs = {k: v for k, v in PUBLISHED_CODECS.items() if CODECS[k].modality != "sound" or geometry.sound_gen}
    facts = geometry.family.facts
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        **facts.scheduler,
    }
    weights = sum(t.elements for t in expected_tensors(geometry).values()) + _ENCODER_PARAMETERS[size]
    weights += _SOUND_ENCODER_PARAMETERS if geometry.sound_gen else 0
    return Subject(
        name=f"Cosmos3-{'-'.join(map(str.capitalize, name.split('-')))}",
        variant=name,
        geometry=geometry,
        sampling=CheckpointSampling(
            scheduler=scheduler, native=facts.native_grid, family=geometry.family, policy=policy
        ),
        codecs=codecs,
        weight_norm={name: _FOLDED_PARAMETERS for name in codecs if name == "sound-decoder"},
        tokenizer_bytes=_TOKENIZER_BYTES,
        input_bytes=2 * (weights + sum(codecs.values())),
    )
