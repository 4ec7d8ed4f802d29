"""``cosmos-export quantize``: a checkpoint and a scale table into a quantized checkpoint."""

from __future__ import annotations

from cosmos_export import units
from cosmos_export.cli.verbs import Verbs
from cosmos_export.options import QuantizeRequest


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "quantize",
        QuantizeRequest,
        "cosmos-export quantize Cosmos3-Nano --calibration scales/ -o nano-fp8/",
        "cosmos-export quantize Cosmos3-Nano --calibration scales/ --format int4 --towers generator -o nano-int4/",
    )
    def quantize(request: QuantizeRequest, as_json: bool) -> None:
        """Write a quantized checkpoint in the published ModelOpt layout, with one linear in memory at a time."""
        import logging

        from cosmos_export.cli import console
        from cosmos_export.compiler.quantize_checkpoint import quantize_checkpoint

        result = quantize_checkpoint(request, console.progress())
        if as_json:
            console.emit_json(
                "quantize",
                {
                    "output": request.output,
                    "format": request.format,
                    "fp8_rounding": request.fp8_rounding,
                    **vars(result),
                },
            )
        if not result.buildable:
            console.log(
                f"`build` does not read checkpoints in {request.format}; it is for other programs. `build --recipe` "
                "with the same scale table makes a bundle of the same numbers",
                logging.WARNING,
            )
        mixed = ", steps mixed as published" if result.policy else ""
        what = f"{result.quantized} linears in {request.format}{mixed}"
        console.verdict(f"{request.output}: {what}, transformer {units.size(result.size_bytes)}", True)
