"""``quantize`` from a user's words: everything that can be refused is, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cosmos_export.calibration.table import read_scale_table, require_checkpoint
from cosmos_export.checkpoint import Tower, open_checkpoint
from cosmos_export.checkpoint.adapters import require_no_adapters
from cosmos_export.compiler.options import require_compiler
from cosmos_export.diagnostics import UserError
from cosmos_export.progress import Progress
from cosmos_export.stamps import unchanged

if TYPE_CHECKING:
    from cosmos_export.calibration.write_quantized import QuantizeResult


@dataclass(frozen=True)
class QuantizeRequest:
    """A quantization as the user asks for it."""

    checkpoint: Path
    """Checkpoint directory with bf16 weights."""
    calibration: Path
    """Scale table of `calibrate`."""
    output: Path
    """Directory to create."""
    format: str = "fp8"
    """``fp8``, ``int4`` (weights only) or ``nvfp4``."""
    towers: tuple[str, ...] = tuple(Tower)
    """Towers whose linears are quantized."""
    fp8_rounding: str = "exact"
    """``exact``: once, from float32. ``modelopt``: twice, as in NVIDIA's files."""
    step_policy: bool = True
    """Record 16-bit activations in the reasoner and in the first and last three steps, as published."""
    link: bool = False
    """Hard links to unchanged files in place of copies."""
    ignore_adapters: bool = False
    """Take the weights without the adapters beside them."""
    force: bool = False
    """Replace an existing checkpoint directory."""


def quantize_checkpoint(request: QuantizeRequest, progress: Progress | None = None) -> QuantizeResult:
    """Write the quantized checkpoint ``output``. CX332: an option; CX310–CX313 the table; CX330–CX334 the writing."""
    require_compiler()
    from cosmos_export.calibration.formats import FORMATS
    from cosmos_export.calibration.write_quantized import QuantizeOptions, require_output, write_quantized_checkpoint
    from cosmos_export.precision.layout import Rounding

    for name, value, allowed in (
        ("format", request.format, FORMATS),
        ("FP8 rounding", request.fp8_rounding, get_args(Rounding)),
        *(("tower", tower, tuple(Tower)) for tower in request.towers),
    ):
        if value not in allowed:
            raise UserError("CX332", f"{name} `{value}`; known: {', '.join(allowed)}")
    require_output(request.output, request.force)
    table = read_scale_table(request.calibration)
    source = open_checkpoint(request.checkpoint)
    require_no_adapters(source.root, source.adapters, request.ignore_adapters)
    with unchanged("quantization", source.inputs):
        require_checkpoint(table, source, progress)
    options = QuantizeOptions(
        kind=request.format,
        towers=tuple(Tower(tower) for tower in request.towers),
        rounding=request.fp8_rounding,  # type: ignore[arg-type]
        policy=request.step_policy,
        link=request.link,
    )
    return write_quantized_checkpoint(source, table, request.output, options, force=request.force, progress=progress)
