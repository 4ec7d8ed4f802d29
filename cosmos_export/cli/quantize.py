"""``cosmos-export quantize``: a checkpoint and a scale table into a quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("quantize")
    def quantize(
        checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory with bf16 weights.", show_default=False)],
        calibration: Annotated[
            Path, typer.Option("--calibration", help="Scale table of `cosmos-export calibrate`.", show_default=False)
        ],
        output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create.", show_default=False)],
        kind: Annotated[str, typer.Option("--format", help="fp8, int4 (weights only) or nvfp4.")] = "fp8",
        towers: Annotated[str, typer.Option(help="Whose linears: reasoner,generator.")] = "reasoner,generator",
        fp8_rounding: Annotated[
            str, typer.Option(help="exact: once, from float32; modelopt: twice, as NVIDIA's files.")
        ] = "exact",
        step_policy: Annotated[
            bool,
            typer.Option(help="16-bit activations in the reasoner and the first and last three steps, as published."),
        ] = True,
        link: Annotated[bool, typer.Option("--link", help="Hard links to unchanged files, not copies.")] = False,
        ignore_adapters: Annotated[
            bool, typer.Option("--ignore-adapters", help="Take the weights without the adapters beside them.")
        ] = False,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint directory.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Write a checkpoint in the published ModelOpt layout, one linear in memory at a time."""
        from cosmos_export.cli import console
        from cosmos_export.compiler.quantize_checkpoint import QuantizeRequest, quantize_checkpoint

        request = QuantizeRequest(
            checkpoint=checkpoint,
            output=output,
            calibration=calibration,
            format=kind,
            towers=tuple(part.strip() for part in towers.split(",") if part.strip()),
            fp8_rounding=fp8_rounding,
            step_policy=step_policy,
            link=link,
            ignore_adapters=ignore_adapters,
            force=force,
        )
        result = quantize_checkpoint(request, console.progress())
        if as_json:
            console.emit_json({"output": output, "format": kind, "fp8_rounding": fp8_rounding, **vars(result)})
        mixed = ", steps mixed as published" if result.policy else ""
        console.verdict(
            f"{output}: {result.quantized} linears in {kind}{mixed}, transformer {result.size_bytes / 1e9:.2f} GB", True
        )
