"""Code that every kernel module shares: tiles, checks of operands, and the forms compiled ahead of time. No kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from cosmos_export.kernels.description import CAPABILITIES

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite E4M3 value."""
SMALLEST_AMAX = 1e-12
"""A row of zeros has this as its largest magnitude, so that its scale is not zero."""


@dataclass(frozen=True)
class Tile:
    """How much of the problem one program takes, and with how many warps and pipeline stages."""

    sizes: tuple[int, ...]
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Variant:
    """One form of a kernel: its argument types, compile-time constants and tile."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Argument → Triton type (``*bf16``, ``i32``, ``fp32``) in the kernel's order, constants left out."""
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    divisible: frozenset[str] = field(default_factory=frozenset)
    """Integer arguments that are multiples of 16; pointers always are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", MappingProxyType(dict(self.signature)))
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))


def require(condition: bool, message: str) -> None:
    """ValueError with ``message`` where an operand breaks a contract."""
    if not condition:
        raise ValueError(message)


def require_rows(name: str, tensor: torch.Tensor, rank: int) -> None:
    """``tensor`` has ``rank`` axes and its last is contiguous."""
    require(tensor.dim() == rank, f"{name} has {tensor.dim()} axes, expected {rank}")
    require(tensor.stride(-1) == 1, f"{name}: its last axis is not contiguous")


def require_reach(name: str, tensor: torch.Tensor) -> None:
    """A 32-bit product of index and stride reaches every element along each axis of ``tensor``."""
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        require((size - 1) * stride < 2**31, f"{name} {tuple(tensor.shape)}, strides {tensor.stride()}: beyond 2³¹")


def capability_of(tensor: torch.Tensor) -> int:
    """Compute capability of the tensor's device, for example 90; on the CPU (Triton's interpreter) that of Hopper."""
    if tensor.device.type != "cuda":
        return CAPABILITIES[0]
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def tile_for(tiles: Mapping[int, Tile], tensor: torch.Tensor) -> Tile:
    """The tile for the tensor's device."""
    return tile_of(tiles, capability_of(tensor))


def tile_of(tiles: Mapping[int, Tile], capability: int) -> Tile:
    """The tile of the nearest capability at or below ``capability``; the first where there is none."""
    known = [key for key in sorted(tiles) if key <= capability]
    return tiles[known[-1] if known else min(tiles)]


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``cast(clamp(x / scale, ±448))`` to E4M3 in fp32 arithmetic: the published layout's rounding."""
    return (x.to(torch.float32) / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
