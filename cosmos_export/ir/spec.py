"""Facts known of a value before it exists: its type, shape and binding time, and the place of a weight on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from pathlib import Path

import torch

from cosmos_export.ir.dims import Shape, simplify_shape, size_text
from cosmos_export.ir.formats import Format

INT4: torch.dtype = vars(torch)["int4"]  # a type without tensors, which torch's stubs do not name
E2M1 = torch.float4_e2m1fn_x2

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    E2M1: "float4_e2m1",
    INT4: "int4",
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
        return f"{DTYPE_NAMES.get(self.dtype, str(self.dtype))}[{', '.join(map(size_text, self.shape))}]"


class Rate(IntEnum):
    """How often a value changes (its binding time)."""

    CONSTANT = 0
    """Follows from weights and constants only."""
    PROMPT = 1
    """Follows from the token ids."""
    REQUEST = 2
    """Follows from the request without its prompts: positions, masks, embodiment."""
    BRANCH = 3
    """Follows from the token ids and the rest of the request: a guided request has two, one for each prompt."""
    STEP = 4
    """Follows from the position in the denoising schedule alone."""
    CARRIED = 5
    """Changes in every step of every request: follows from the latents, or from step and request together."""

    @property
    def follows_prompt(self) -> bool:
        """Known before the loop, and different for the prompt and the negative prompt."""
        return self in (Rate.PROMPT, Rate.BRANCH)

    def join(self, other: Rate) -> Rate:
        """Rate of a value computed from values of both rates."""
        low, high = sorted((self, other))
        if (low, high) == (Rate.PROMPT, Rate.REQUEST):
            return Rate.BRANCH
        return Rate.CARRIED if high is Rate.STEP and low not in (Rate.CONSTANT, Rate.STEP) else high


class Transform(Enum):
    """How the bytes of a weight follow from its sources."""

    IDENTITY = "identity"
    CONCATENATE = "concatenate"
    """Sources are joined along axis 0."""
    INTERLEAVE = "interleave"
    """Rows of the sources alternate along axis 0: a0, b0, a1, b1 …"""
    WEIGHT_NORM = "weight_norm"
    """Sources are magnitudes g and directions v: ``g · v / ‖v‖``, the norm over all axes but the first."""
    SCALE = "scale"
    """Sources are a vector and factors of its elements, multiplied in float32."""


class Part(Enum):
    """The tensors of a packed weight."""

    VALUES = "values"
    """[N, K]; two 4-bit numbers are one byte where they are stored."""
    SCALE = "scale"
    """float32 [], or [N] of merged weights that keep their own and where each row has one; of groups [N, K / group] in
    the type that the weight is dequantized to."""
    BLOCK_SCALE = "block_scale"
    """E4M3 [N, K / block]."""


def parts_of(format: Format) -> tuple[Part, ...]:
    """The tensors of ``format``, in the order in which they are widened."""
    return (Part.VALUES, Part.BLOCK_SCALE, Part.SCALE) if format.block else (Part.VALUES, Part.SCALE)


@dataclass(frozen=True)
class WeightSource:
    """A tensor in the checkpoint. ``offset`` is absolute in ``file``, in bytes.

    ``scale`` is the number that a tensor stored in FP8 is to be multiplied by.
    """

    key: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: WeightSource | None = None


@dataclass(frozen=True)
class LowRank:
    """The part of a weight that is not packed but multiplied separately (SVDQuant): ``up · down``."""

    down: WeightSource
    """[rank, K], of all sources of the weight."""
    up: tuple[WeightSource, ...]
    """[N, rank] of each source."""


@dataclass(frozen=True)
class Packing:
    """One tensor of the low-precision form of a weight."""

    format: Format
    part: Part
    dtype: torch.dtype
    """The type that the weight is dequantized to."""
    group: int = 0
    """Columns with one scale, where there are groups."""
    divisor: WeightSource | None = None
    """[K]: what the columns are divided by before they are packed; the input is multiplied by it (AWQ)."""
    low_rank: LowRank | None = None
    """The part that is subtracted from the weight once it is divided."""

    @property
    def stored(self) -> torch.dtype:
        """The type of this tensor."""
        if self.part is Part.VALUES:
            values: torch.dtype = vars(torch)[self.format.values]
            return values
        if self.part is Part.BLOCK_SCALE:
            return torch.float8_e4m3fn
        return self.dtype if self.format.groups else torch.float32


@dataclass(frozen=True)
class WeightBinding:
    """The value of a weight placeholder: tensors on disk and a transform. It never holds data."""

    sources: tuple[WeightSource, ...]
    transform: Transform
    dtype: torch.dtype
    """The type of the value in the graph; a cast from the stored type where they differ."""
    packing: Packing | None = None
    """Where the value is one tensor of a low-precision form of what sources and transform give."""

    def __post_init__(self) -> None:
        if self.transform is Transform.IDENTITY and len(self.sources) != 1:
            raise ValueError("an identity binding has one source")
        if self.transform is Transform.INTERLEAVE and len({s.shape for s in self.sources}) != 1:
            raise ValueError("interleaved sources have one shape")
        if self.transform is Transform.WEIGHT_NORM and len(self.sources) != 2:
            raise ValueError("a normalised weight has two sources: magnitudes and directions")
        if self.transform is Transform.SCALE and len({s.shape for s in self.sources}) != 1:
            raise ValueError("factors have the shape of what they multiply")
        if self.packing is not None and self.dtype != self.packing.stored:
            raise ValueError(f"a packed weight's {self.packing.part.value} are {self.packing.stored}")
        if self.transform is not Transform.IDENTITY and any(s.shape == () for s in self.sources):
            raise ValueError("scalars have no axis to merge along")

    @property
    def shape(self) -> tuple[int, ...]:
        whole = self.unpacked_shape
        if self.packing is None or self.packing.part is Part.VALUES:
            return whole
        if self.packing.part is Part.BLOCK_SCALE:
            return (whole[0], whole[1] // self.packing.format.block)
        if self.packing.format.groups:
            return (whole[0], whole[1] // self.packing.group)
        return whole[:1] if self.packing.format.local or (self.keeps_bytes and len(self.sources) > 1) else ()

    @property
    def keeps_bytes(self) -> bool:
        """Whether it is the FP8 form of what is stored in FP8: the bytes and scales as they are, nothing rounded."""
        packing = self.packing
        if packing is None or not packing.format.one_e4m3_scale or packing.divisor is not None:
            return False
        return all(source.scale is not None for source in self.sources)

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        """Shape of what sources and transform give, before packing."""
        if self.transform in (Transform.IDENTITY, Transform.WEIGHT_NORM, Transform.SCALE):
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
        text = inner if self.transform is Transform.IDENTITY else f"{self.transform.value}({inner})"
        return text if self.packing is None else f"{self.packing.format.name}_{self.packing.part.value}({text})"

    def packed(
        self,
        format: Format,
        part: Part,
        *,
        group: int = 0,
        divisor: WeightSource | None = None,
        low_rank: LowRank | None = None,
    ) -> WeightBinding:
        """One tensor of the low-precision form of this weight."""
        packing = Packing(format, part, self.dtype, group, divisor, low_rank)
        return replace(self, dtype=packing.stored, packing=packing)
