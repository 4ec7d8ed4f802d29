"""``cosmos-export demo-checkpoint``: a checkpoint with random weights, to try everything else on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("demo-checkpoint")
    def demo_checkpoint(
        output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create.")],
        variant: Annotated[
            str | None, typer.Option(help="omni (Nano and Super; default) or edge.", metavar="omni|edge")
        ] = None,
        true_width: Annotated[
            str | None,
            typer.Option(
                help="Take the widths of a published size; 2 layers unless --layers.", metavar="nano|super|edge"
            ),
        ] = None,
        like: Annotated[
            str | None,
            typer.Option(
                help="A published size in full, codecs and vision encoder too, in bfloat16.", metavar="nano|super|edge"
            ),
        ] = None,
        sparse: Annotated[
            bool,
            typer.Option(
                "--sparse", help="Almost all zeros, as holes in the files: any size in seconds and a few MB on disk."
            ),
        ] = False,
        layers: Annotated[int | None, typer.Option(help="Layers of each tower.")] = None,
        hidden: Annotated[int | None, typer.Option(help="Model width.")] = None,
        heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
        kv_heads: Annotated[int | None, typer.Option(help="Key/value heads.")] = None,
        head_dim: Annotated[int | None, typer.Option(help="Width of a head.")] = None,
        intermediate: Annotated[int | None, typer.Option(help="Width of the MLP.")] = None,
        vocab: Annotated[int | None, typer.Option(help="Size of the vocabulary.")] = None,
        latent_channels: Annotated[int | None, typer.Option(help="Channels of the video latents.")] = None,
        action_dim: Annotated[int | None, typer.Option(help="Width of an action.")] = None,
        domains: Annotated[int | None, typer.Option(help="Embodiment domains.")] = None,
        sound_dim: Annotated[int | None, typer.Option(help="Channels of the sound latents (omni only).")] = None,
        dtype: Annotated[
            str | None,
            typer.Option(
                help="Default: float32, or with --like bfloat16.",
                metavar="float32|bfloat16|float16",
                show_default=False,
            ),
        ] = None,
        seed: Annotated[int, typer.Option(help="The same seed and options give the same bytes.")] = 0,
        shard_size: Annotated[int | None, typer.Option(help="Most bytes of one weight file.")] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint directory.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Write a random checkpoint in the published layout: seconds and a few MB at the default size."""
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
            console.emit_json(summary.to_json())
        else:
            size = summary.transformer
            console.out().print(
                f"{output}: {summary.family}, {size.parameters:,} parameters, {summary.precision}, "
                + f"seed {seed}{', sparse' if sparse else ''}",
                soft_wrap=True,
            )
