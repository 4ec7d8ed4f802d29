"""The numbers ``inspect`` shows: sizes by tower, cost of a prompt token, what the checkpoint can do. Headers only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cosmos_export.checkpoint.converted import conversion_notes
from cosmos_export.checkpoint.layout import SCALES, ExpectedTensor, TensorPart, Tower
from cosmos_export.checkpoint.policy import read_policy
from cosmos_export.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Size:
    """Parameters and the bytes they have on disk."""

    parameters: int
    size_bytes: int


@dataclass(frozen=True)
class TowerSize:
    """One tower: decoder layers and final norm. ``linears``: the matrix products that a recipe may quantize."""

    parameters: int
    size_bytes: int
    linears: int
    linear_parameters: int


@dataclass(frozen=True)
class Summary:
    """Description of a checkpoint. Field names are those of the JSON output."""

    path: str
    variant: str
    repository: str | None
    revision: str | None
    family: str
    precision: str
    geometry: Mapping[str, Any]
    towers: Mapping[str, TowerSize]
    shared: Mapping[str, Size]
    """Embedding, language head and the heads of each modality."""
    transformer: Size
    transformer_tensors: int
    components: Mapping[str, Size]
    kv_bytes_per_prompt_token: int
    """Keys and values in BF16 that the generator reads for each token of the prompt."""
    modalities: tuple[str, ...]
    schedule: str
    scheduler: Mapping[str, Any]
    distilled_sigmas: tuple[float, ...] | None
    step_policy: Mapping[str, Any] | None
    policy: Mapping[str, Any] | None
    policy_unread: tuple[str, ...]
    """Fields of ``policy`` that nothing here reads."""
    wants_state: bool | None
    """Whether the policy is given the robot's state as its first action row; None: no policy, or it does not say."""
    unused_tensors: tuple[tuple[str, str], ...]
    ignored_files: tuple[tuple[str, str], ...]
    adapters: tuple[str, ...]
    """Files of adapters that are not merged."""
    unknown_config_keys: tuple[str, ...]
    conversions: tuple[str, ...]
    """Conversions of a build, in words."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(checkpoint: Checkpoint) -> Summary:
    geometry, expected = checkpoint.geometry, list(checkpoint.expected.values())
    quantization = checkpoint.quantization
    steps = quantization.step_policy if quantization is not None else None
    policy = read_policy(checkpoint.policy)
    return Summary(
        path=str(checkpoint.root),
        variant=checkpoint.variant,
        repository=checkpoint.origin.repository,
        revision=checkpoint.origin.revision,
        family=geometry.family,
        precision=checkpoint.precision,
        geometry=geometry.config,
        towers={tower.value: _tower(checkpoint, tower) for tower in Tower},
        shared={
            part.value: _size(checkpoint, (tensor for tensor in expected if tensor.part is part))
            for part in TensorPart
            if part is not TensorPart.LAYERS and any(tensor.part is part for tensor in expected)
        },
        transformer=_size(checkpoint, expected),
        transformer_tensors=len(expected),
        components={
            name: Size(sum(entry.elements for entry in tensors.values()), sum(e.size_bytes for e in tensors.values()))
            for name, tensors in checkpoint.component_tensors.items()
        },
        kv_bytes_per_prompt_token=geometry.kv_bytes_per_token(),
        modalities=_modalities(checkpoint),
        schedule=_schedule(checkpoint),
        scheduler=dict(checkpoint.scheduler),
        distilled_sigmas=checkpoint.distilled_sigmas,
        step_policy=None if steps is None else asdict(steps),
        policy=None if checkpoint.policy is None else dict(checkpoint.policy),
        policy_unread=() if policy is None else policy.unread,
        wants_state=None if policy is None else policy.state,
        unused_tensors=checkpoint.unused,
        ignored_files=tuple((str(path.relative_to(checkpoint.root)), why) for path, why in checkpoint.ignored_files),
        adapters=tuple(str(path.relative_to(checkpoint.root)) for path in checkpoint.adapters),
        unknown_config_keys=tuple(sorted(geometry.unknown_keys)),
        conversions=conversion_notes(checkpoint),
    )


def _tower(checkpoint: Checkpoint, tower: Tower) -> TowerSize:
    tensors = [
        tensor for tensor in checkpoint.expected.values() if tensor.tower is tower and tensor.part is TensorPart.LAYERS
    ]
    linears = [tensor for tensor in tensors if tensor.linear]
    size = _size(checkpoint, tensors)
    return TowerSize(size.parameters, size.size_bytes, len(linears), sum(tensor.elements for tensor in linears))


def _size(checkpoint: Checkpoint, tensors: Iterable[ExpectedTensor]) -> Size:
    """Scales count as bytes of the weight they belong to, not as parameters."""
    parameters = size_bytes = 0
    for tensor in tensors:
        parameters += tensor.elements
        module = tensor.name.removesuffix("weight")
        for name in (tensor.name, *(module + scale for scale in SCALES)):
            entry = checkpoint.tensors.get(name)
            size_bytes += 0 if entry is None else entry.size_bytes
    return Size(parameters, size_bytes)


def _modalities(checkpoint: Checkpoint) -> tuple[str, ...]:
    geometry = checkpoint.geometry
    present = {
        "image": True,
        "video": True,
        "sound": geometry.sound_gen,
        "action": geometry.action_gen,
        "text": "vision_encoder" in checkpoint.components,
    }
    return tuple(name for name, found in present.items() if found)


def _schedule(checkpoint: Checkpoint) -> str:
    """The sampler in words: which grid of noise levels the published pipeline walks."""
    if checkpoint.distilled_sigmas is not None:
        return f"stochastic Euler, {len(checkpoint.distilled_sigmas)} fixed steps, no guidance"
    if checkpoint.scheduler["_class_name"] != "UniPCMultistepScheduler":
        return str(checkpoint.scheduler["_class_name"])
    if checkpoint.model_index.get("use_native_flow_schedule"):
        return "UniPC, native flow grid"
    if checkpoint.scheduler.get("use_karras_sigmas"):
        return "UniPC, Karras grid (ignores flow_shift)"
    return "UniPC, flow grid"
