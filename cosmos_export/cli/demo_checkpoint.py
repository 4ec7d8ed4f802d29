"""``cosmos-export demo-checkpoint``: a checkpoint with random weights, to try everything else on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cosmos_export.cli.options import Json, grouped
from cosmos_export.cli.verbs import Verbs


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.command(
        "demo-checkpoint",
        "cosmos-export demo-checkpoint -o demo/checkpoint --dtype bfloat16",
        "cosmos-export demo-checkpoint -o nano --like nano --sparse",
    )
    @grouped(
        **dict.fromkeys(("variant", "true_width", "like", "sparse"), "What is made"),
        **dict.fromkeys(
            ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "latent_channels",
             "action_dim", "domains", "sound_dim"), "Sizes",
        ),
        **dict.fromkeys(("dtype", "seed"), "Weights"),
        **dict.fromkeys(("output", "shard_size", "force"), "Output"),
    )  # fmt: skip
    def demo_checkpoint(
        output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to create.")],
        variant: Annotated[
            str | None, typer.Option(metavar="omni|edge", help="Family: omni (Nano and Super; the default) or edge.")
        ] = None,
        true_width: Annotated[
            str | None,
            typer.Option(
                metavar="nano|super|edge",
                help="Take the widths of a published size; 2 layers unless --layers says otherwise.",
            ),
        ] = None,
        like: Annotated[
            str | None,
            typer.Option(
                metavar="nano|super|edge",
                help="Make a published size in full, with codecs and vision encoder, in bfloat16.",
            ),
        ] = None,
        sparse: Annotated[
            bool,
            typer.Option(
                "--sparse", help="Almost all zeros, as holes in the files: any size in seconds and a few MiB of disk."
            ),
        ] = False,
        layers: Annotated[int | None, typer.Option(metavar="N", help="Layers of each tower.")] = None,
        hidden: Annotated[int | None, typer.Option(metavar="N", help="Model width.")] = None,
        heads: Annotated[int | None, typer.Option(metavar="N", help="Query heads.")] = None,
        kv_heads: Annotated[int | None, typer.Option(metavar="N", help="Key/value heads.")] = None,
        head_dim: Annotated[int | None, typer.Option(metavar="N", help="Width of a head.")] = None,
        intermediate: Annotated[int | None, typer.Option(metavar="N", help="Width of the MLP.")] = None,
        vocab: Annotated[int | None, typer.Option(metavar="N", help="Size of the vocabulary.")] = None,
        latent_channels: Annotated[int | None, typer.Option(metavar="N", help="Channels of the video latents.")] = None,
        action_dim: Annotated[int | None, typer.Option(metavar="N", help="Width of an action.")] = None,
        domains: Annotated[int | None, typer.Option(metavar="N", help="Embodiment domains.")] = None,
        sound_dim: Annotated[
            int | None, typer.Option(metavar="N", help="Channels of the sound latents (omni only).")
        ] = None,
        dtype: Annotated[
            Literal["float32", "bfloat16", "float16"] | None,
            typer.Option(help="Type of the weights. Default: float32, or bfloat16 with --like."),
        ] = None,
        seed: Annotated[
            int, typer.Option(metavar="N", help="Seed. The same seed and options give the same bytes.")
        ] = 0,
        shard_size: Annotated[
            int | None, typer.Option(metavar="BYTES", help="Bytes of one weight file at most.")
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint directory.")] = False,
        as_json: Json = False,
    ) -> None:
        """Write a random checkpoint in the published layout: seconds and a few MiB at the default size."""
        from cosmos_export.checkpoint import open_checkpoint
        from cosmos_export.checkpoint.demo import DEFAULT_SHARD_SIZE, write_demo_checkpoint
        from cosmos_export.checkpoint.describe import describe
        from cosmos_export.cli import console

        write_demo_checkpoint(
            output,
            variant,
            force=force,
            progress=console.progress(),
            true_width=true_width,
            like=like,
            sparse=sparse,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=intermediate,
            vocab=vocab,
            latent_channels=latent_channels,
            action_dim=action_dim,
            domains=domains,
            sound_dim=sound_dim,
            dtype=dtype,
            seed=seed,
            shard_size=DEFAULT_SHARD_SIZE if shard_size is None else shard_size,
        )
        summary = describe(open_checkpoint(output))
        if as_json:
            console.emit_json("inspect", summary.to_json())
        else:
            size = summary.transformer
            console.show(
                f"{output}: {summary.family}, {size.parameters:,} parameters, {summary.precision}, "
                + f"seed {seed}{', sparse' if sparse else ''}",
            )
