"""Low-precision forms of a weight, as declarations: the tensors of a form, and the functions that make and widen them.

Which forms there are is said above the IR, by those who declare one. A declaration imports nothing heavy: its
functions import what they need when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

E4M3 = "float8_e4m3fn"
"""PyTorch's name of the FP8 type with four bits of exponent."""

Value = Any
"""A node of a graph. Graphs know weights, and weights know this module."""
Call = Callable[..., Value]
"""Adds an operation to a graph: target and arguments as `Graph.call` takes them."""
RowScales = Callable[["torch.Tensor", "torch.Tensor", int, "torch.dtype"], "torch.Tensor"]
"""Takes float32 rows [n, K], the scale of the whole weight, columns of a group, and the type that the weight is
dequantized to."""
Numbers = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Takes float32 rows [n, K], the scale of the whole weight, and the rows' own scales (that scale where they have none).
"""
Widen = Callable[[Call, Sequence[Value], "torch.dtype"], Value]
"""The dequantized weight from its parts, in the order of `spec.parts_of`, in the type that it is dequantized to."""


@dataclass(frozen=True, repr=False)
class Format:
    """A low-precision form of a weight [N, K]: its numbers, and one scale per tensor, row, group or block."""

    name: str
    values: str
    """PyTorch's name of the type of the numbers."""
    value_bits: int
    numbers: Numbers
    """Rounds rows to numbers [n, K]."""
    widen: Widen
    tensor_scale: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The float32 scale [] of a weight from its largest magnitude; None: every scale follows from its own row."""
    row_scales: RowScales | None = None
    """Scales that follow from the rows: of rows [n], groups [n, K / group] or blocks [n, K / block]; None: there are
    none."""
    groups: tuple[int, ...] = ()
    """Numbers of columns that may share a scale, the preferred one first; the scale has the type that the weight is
    dequantized to. Empty: no groups."""
    block: int = 0
    """Columns that share a second scale in E4M3 besides that of the tensor; 0: no blocks."""

    @property
    def bits(self) -> float:
        """Bits of a stored number, with its share of the scales of groups or blocks."""
        return self.value_bits + (16 / self.groups[0] if self.groups else 8 / self.block if self.block else 0)

    @property
    def local(self) -> bool:
        """Whether rows can be packed without having seen the others."""
        return self.tensor_scale is None

    @property
    def one_e4m3_scale(self) -> bool:
        """Whether it is E4M3 with one scale per tensor: the form in which published checkpoints store FP8."""
        return self.values == E4M3 and not self.local and not self.block

    def __repr__(self) -> str:
        return f"Format({self.name!r})"
