"""``quantize`` from a user's words: everything that can be refused is, before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
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


def quantize_checkpoint(
    checkpoint: Path,
    calibration: Path,
    output: Path,
    *,
    kind: str = "fp8",
    towers: Sequence[str] = tuple(Tower),
    rounding: str = "exact",
    policy: bool = True,
    link: bool = False,
    ignore_adapters: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write the quantized checkpoint ``output``. CX332: an option; CX310–CX313 the table; CX330–CX334 the writing."""
    require_compiler()
    from cosmos_export.calibration.formats import FORMATS, Rounding
    from cosmos_export.calibration.write_quantized import QuantizeOptions, require_output, write_quantized_checkpoint

    for name, value, allowed in (
        ("format", kind, FORMATS),
        ("FP8 rounding", rounding, get_args(Rounding)),
        *(("tower", tower, tuple(Tower)) for tower in towers),
    ):
        if value not in allowed:
            raise UserError("CX332", f"{name} `{value}`; known: {', '.join(allowed)}")
    require_output(output, force)
    table = read_scale_table(calibration)
    source = open_checkpoint(checkpoint)
    require_no_adapters(source.root, source.adapters, ignore_adapters)
    with unchanged("quantization", source.inputs):
        require_checkpoint(table, source, progress)
    options = QuantizeOptions(
        kind=kind,  # type: ignore[arg-type]
        towers=tuple(Tower(tower) for tower in towers),
        rounding=rounding,  # type: ignore[arg-type]
        policy=policy,
        link=link,
    )
    return write_quantized_checkpoint(source, table, output, options, force=force, progress=progress)
