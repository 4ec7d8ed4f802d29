"""``quantize`` from a user's words: everything that can be refused is, before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from cosmos_export.calibration.table import read_scale_table, require_checkpoint
from cosmos_export.checkpoint import Tower, open_checkpoint
from cosmos_export.checkpoint.adapters import require_no_adapters
from cosmos_export.checkpoint.converted import converted
from cosmos_export.checkpoint.folded import fold, left_out
from cosmos_export.checkpoint.read_adapter import read_adapter
from cosmos_export.compiler.options import require_compiler
from cosmos_export.diagnostics import UserError
from cosmos_export.options import QuantizeRequest
from cosmos_export.progress import Progress
from cosmos_export.stamps import unchanged

if TYPE_CHECKING:
    from cosmos_export.calibration.write_quantized import QuantizeResult


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
            known = ", ".join(allowed)
            raise UserError("CX332", f"{name} `{value}` is not known; known: {known}", f"choose one of {known}")
    require_output(request.output, request.force)
    table = read_scale_table(request.calibration)
    source = open_checkpoint(request.checkpoint)
    adapters = tuple(read_adapter(text, source) for text in request.adapters)
    require_no_adapters(source.root, left_out(source, adapters), request.ignore_adapters)
    source = fold(converted(source, request.output, progress), adapters, request.output, progress)
    with unchanged("quantization", source.inputs):
        require_checkpoint(table, source, progress)
    options = QuantizeOptions(
        kind=request.format,
        towers=tuple(Tower(tower) for tower in request.towers),
        rounding=request.fp8_rounding,
        policy=request.step_policy,
        link=request.link,
    )
    return write_quantized_checkpoint(source, table, request.output, options, force=request.force, progress=progress)
