"""What is known of a value before it exists: its type, shape, binding time and where a weight lies on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from pathlib import Path

import torch

from cosmos_export.ir.dims import Shape, simplify_shape

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class TensorSpec:
    """Type and symbolic shape of a value."""

    dtype: torch.dtype
    shape: Shape

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", simplify_shape(self.shape))

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        return f"{DTYPE_NAMES.get(self.dtype, str(self.dtype))}[{', '.join(map(str, self.shape))}]"


class Rate(IntEnum):
    """How often a value changes (its binding time)."""

    CONSTANT = 0
    """Follows from weights and constants only."""
    PROMPT = 1
    """Follows from the token ids."""
    REQUEST = 2
    """Follows from the request: positions, masks, embodiment (and the prompt)."""
    STEP = 3
    """Follows from the position in the denoising schedule alone."""
    CARRIED = 4
    """Changes in every step of every request: follows from the latents, or from step and request together."""

    def join(self, other: Rate) -> Rate:
        """Rate of a value computed from values of both rates."""
        low, high = sorted((self, other))
        return Rate.CARRIED if high is Rate.STEP and low in (Rate.PROMPT, Rate.REQUEST) else high


class Transform(Enum):
    """How the bytes of a weight follow from its sources."""

    IDENTITY = "identity"
    CONCATENATE = "concatenate"
    """Along axis 0."""
    INTERLEAVE = "interleave"
    """Rows of the sources alternate along axis 0: a0, b0, a1, b1 …"""
    WEIGHT_NORM = "weight_norm"
    """Sources are magnitudes g and directions v: ``g · v / ‖v‖``, the norm over all axes but the first."""


@dataclass(frozen=True)
class WeightSource:
    """A tensor in the checkpoint. ``offset`` is absolute in ``file``, in bytes."""

    key: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightBinding:
    """What a weight placeholder stands for: tensors on disk and a transform. It never holds data."""

    sources: tuple[WeightSource, ...]
    transform: Transform
    dtype: torch.dtype
    """The type of the value in the graph; a cast from the stored type where they differ."""

    def __post_init__(self) -> None:
        if self.transform is Transform.IDENTITY and len(self.sources) != 1:
            raise ValueError("an identity binding has one source")
        if self.transform is Transform.INTERLEAVE and len({s.shape for s in self.sources}) != 1:
            raise ValueError("interleaved sources have one shape")
        if self.transform is Transform.WEIGHT_NORM and len(self.sources) != 2:
            raise ValueError("a normalised weight has two sources: magnitudes and directions")
        if self.transform is not Transform.IDENTITY and any(s.shape == () for s in self.sources):
            raise ValueError("scalars have no axis to merge along")

    @property
    def shape(self) -> tuple[int, ...]:
        if self.transform in (Transform.IDENTITY, Transform.WEIGHT_NORM):
            return self.sources[-1].shape
        return (sum(s.shape[0] for s in self.sources), *self.sources[0].shape[1:])

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(s.key for s in self.sources)

    def merged(self, others: tuple[WeightBinding, ...], transform: Transform) -> WeightBinding:
        """One binding for this and ``others``, all of them identities."""
        every = (self, *others)
        if any(b.transform is not Transform.IDENTITY for b in every):
            raise ValueError("only plain weights are merged")
        return replace(self, sources=tuple(b.sources[0] for b in every), transform=transform)

    def __str__(self) -> str:
        inner = ", ".join(self.keys)
        return inner if self.transform is Transform.IDENTITY else f"{self.transform.value}({inner})"
