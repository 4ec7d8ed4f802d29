"""``cosmos-export demo-checkpoint``: a checkpoint with random weights, to try everything else on."""

from __future__ import annotations

from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import DemoOptions


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "demo-checkpoint",
        DemoOptions,
        "cosmos-export demo-checkpoint -o demo/checkpoint --dtype bfloat16",
        "cosmos-export demo-checkpoint -o nano --like nano --sparse",
        "cosmos-export demo-checkpoint -o policy --policy droid_lerobot --use-state",
    )
    def demo_checkpoint(options: DemoOptions, as_json: bool) -> None:
        """Write a random checkpoint in the published layout: seconds and a few MiB at the default size."""
        from cosmos_export.checkpoint import open_checkpoint
        from cosmos_export.checkpoint.demo import write_demo
        from cosmos_export.checkpoint.describe import describe
        from cosmos_export.cli import console
        from cosmos_export.embodiments import policy_embodiment

        if options.policy is not None:
            policy_embodiment(options.policy)  # CX610: there is none
        write_demo(options, console.progress())
        summary = describe(open_checkpoint(options.output))
        if as_json:
            console.emit_json("inspect", summary.to_json())
        else:
            size = summary.transformer
            console.show(
                f"{options.output}: {summary.family}, {size.parameters:,} parameters, {summary.precision}, "
                + f"seed {options.seed}{', sparse' if options.sparse else ''}",
            )
