"""Gate G3: what a whole request loses, at the end of its sampling: frames, sound, and each column of actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cosmos_export.evaluation.gates import relative_loss, roll_out
from cosmos_export.evaluation.sampled import generated
from cosmos_export.ir.graph import spec_of
from cosmos_export.ir.interpreter import Tensors, Weights, run_program
from cosmos_export.ir.program import Program
from cosmos_export.sampling import Schedule

END_LIMIT = 0.2
"""Relative L2 of the end of a request to that of the unquantized model: as a cosine, `parity.LATENT_LIMIT`."""


@dataclass(frozen=True)
class ColumnLoss:
    """Loss of one column of actions over the chunk, in its ``unit``."""

    name: str
    unit: str
    rms: float
    """Root mean square of the error."""
    largest: float
    floor: float
    """Root mean square of the error of the unquantized model in its own precision."""
    share: float
    """``rms`` in shares of the root mean square of all columns, in the model's units."""


@dataclass(frozen=True)
class EndLoss:
    """How far the end of a quantized request is from that of the unquantized one, from the same noise."""

    modality: str
    relative: float
    floor: float
    """The relative loss of the unquantized model in its own precision."""
    frames: tuple[float, ...] = ()
    """The relative loss of each latent frame that is generated."""
    columns: tuple[ColumnLoss, ...] = ()

    @property
    def worst(self) -> float:
        """The largest of what is held to the limit: the whole, and each column by itself."""
        return max(self.relative, *(column.share for column in self.columns), 0.0)

    @property
    def problems(self) -> list[str]:
        """Losses beyond the limit, in words."""
        found = []
        if not self.relative <= END_LIMIT:
            found.append(f"{self.modality} at the end of a request is {self.relative:.1%} off, allowed {END_LIMIT:.0%}")
        for column in self.columns:
            if not column.share <= END_LIMIT:
                found.append(
                    f"{column.name} of the actions is {column.rms:.4g} {column.unit} off, {column.share:.1%} of an "
                    f"action, allowed {END_LIMIT:.0%}"
                )
        return found


@dataclass(frozen=True)
class Axis:
    """A column of actions as a reader knows it."""

    name: str
    unit: str
    scale: float = 1.0
    """``unit`` in one of the model's."""


def end_losses(
    plain: Program,
    quantized: Callable[[int], Program],
    expected: Tensors,
    inputs: Tensors,
    negative: torch.Tensor,
    schedule: Schedule,
    weights: Weights,
    axes: Sequence[Axis],
) -> list[EndLoss]:
    """The whole of ``schedule``, quantized as ``quantized`` says for each step and in the precision of ``plain``, from
    the noise in ``inputs``; ``expected`` is where the unquantized model ends. ``axes`` are the columns of an action."""
    specs = {name: spec_of(value).dtype for graph in plain.graphs.values() for name, value in graph.inputs.items()}

    def narrow(_: int, now: Tensors) -> Tensors:
        own = {name: value.to(specs[name]) for name, value in now.items() if name in specs}
        return {name: value.float() for name, value in run_program(plain, own, weights).items()}

    def lossy(step: int, now: Tensors) -> Tensors:
        return run_program(quantized(step), now, weights, compute=torch.float32)

    found = roll_out(plain, lossy, inputs, negative, schedule)
    floor = roll_out(plain, narrow, inputs, negative, schedule)
    losses = []
    for modality, wanted in expected.items():
        mask = generated(inputs, modality).expand(wanted.shape)
        if not bool(mask.any()):
            continue
        a, b, c = (one[modality].double() for one in (expected, found, floor))
        frames: tuple[float, ...] = ()
        columns: tuple[ColumnLoss, ...] = ()
        if modality == "vision":
            rows = mask[0, 0].flatten(1).any(dim=1)
            frames = tuple(relative_loss(a[:, :, i].flatten(), b[:, :, i].flatten()) for i in rows.nonzero().flatten())
        elif modality == "action":
            rows = mask.any(dim=1)
            columns = _columns(a[rows], b[rows], c[rows], axes)
        losses.append(
            EndLoss(modality, relative_loss(a[mask], b[mask]), relative_loss(a[mask], c[mask]), frames, columns)
        )
    return losses


def _columns(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, axes: Sequence[Axis]) -> tuple[ColumnLoss, ...]:
    """[rows, width] of the unquantized model, the quantized one, and the unquantized one in its own precision."""
    width = len(axes)
    whole = float(a[:, :width].square().mean().sqrt())
    found = []
    for index, axis in enumerate(axes):
        error, floor = (b - a)[:, index].abs() * axis.scale, (c - a)[:, index].abs() * axis.scale
        rms = float(error.square().mean().sqrt())
        share = rms / axis.scale / whole if whole > 0 else 0.0 if rms == 0 else float("inf")
        found.append(
            ColumnLoss(axis.name, axis.unit, rms, float(error.max()), float(floor.square().mean().sqrt()), share)
        )
    return tuple(found)
