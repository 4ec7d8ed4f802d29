"""``cosmos-export calibrate``: a checkpoint and data into a scale table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cosmos_export.compiler.calibrate_checkpoint import CalibrateResult


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("calibrate")
    def calibrate(
        checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory with bf16 weights.", show_default=False)],
        data: Annotated[
            list[str],
            typer.Option(
                help="PATH[,key=value…]: prompts (.txt, .jsonl, .json captions), pictures, clips or folders of them, "
                "LeRobot data sets, actions (.json), latents (.safetensors). Keys: licence, origin (real, synthetic), "
                "prompt, negative, mode, embodiment, video, fps, frames, limit, camera, actions. May repeat.",
                show_default=False,
            ),
        ],
        output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create.", show_default=False)],
        samples: Annotated[int, typer.Option(help="Forward passes, spread over items, steps and branches.")] = 128,
        frames: Annotated[
            int | None,
            typer.Option(help="Pixel frames of a clip, at most.", show_default="the profile's optimum, 17"),
        ] = None,
        profile: Annotated[
            str | None, typer.Option(help="Shape profile the requests must fit, as in build; its optimum is the size.")
        ] = None,
        modalities: Annotated[
            str | None, typer.Option(help="That must be covered; default: all that the checkpoint generates.")
        ] = None,
        rollout: Annotated[
            bool, typer.Option("--rollout", help="Latents of prompts from the model's own sampling; whole in memory.")
        ] = False,
        noise_latents: Annotated[
            bool, typer.Option("--noise-latents", help="Pure noise for prompts at every step: discouraged.")
        ] = False,
        negative: Annotated[str, typer.Option(help="Negative prompt, text or FILE.json, where an item has none.")] = "",
        observer: Annotated[str, typer.Option(help="absmax, percentile or mse.")] = "absmax",
        margin: Annotated[float, typer.Option(help="Factor on what was observed.")] = 1.1,
        percentile: Annotated[float, typer.Option(help="Of the percentile observer.")] = 99.999,
        algorithm: Annotated[
            str,
            typer.Option(help="Search besides: none, awq, modelopt-awq, modelopt-svdquant, modelopt-auto (a recipe)."),
        ] = "none",
        rank: Annotated[int | None, typer.Option(help="Of modelopt-svdquant; default 32.")] = None,
        bits: Annotated[float | None, typer.Option(help="Of modelopt-auto: an average weight's; default 6.")] = None,
        steps: Annotated[int | None, typer.Option(help="Denoising steps of the schedule that will run.")] = None,
        schedule: Annotated[str | None, typer.Option(help="Grid of sigmas: karras, flow or native.")] = None,
        shift: Annotated[float | None, typer.Option(help="Shift of a flow or native grid.")] = None,
        guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 runs one branch.")] = None,
        guidance_interval: Annotated[str | None, typer.Option(help="Timesteps that are guided, LOW:HIGH.")] = None,
        seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
        ignore_adapters: Annotated[
            bool, typer.Option("--ignore-adapters", help="Take the weights without the adapters beside them.")
        ] = False,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing scale table.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Find the ranges of all activations, one decoder layer in memory at a time. Run it again after a stop."""
        import logging
        import shlex
        import sys

        from cosmos_export.cli import console
        from cosmos_export.cli.build import interval
        from cosmos_export.compiler.calibrate_checkpoint import DEFAULT_PROFILE, CalibrateOptions
        from cosmos_export.compiler.calibrate_checkpoint import calibrate_checkpoint as run
        from cosmos_export.diagnostics import UserError
        from cosmos_export.sampling import Overrides

        if rollout and noise_latents:
            raise UserError("CX346", "--rollout and --noise-latents", "one of them")
        if noise_latents:
            console.log("pure noise at every step is not what the model sees: ranges will be off", logging.WARNING)
        options = CalibrateOptions(
            checkpoint=checkpoint,
            output=output,
            data=tuple(data),
            profile=profile or DEFAULT_PROFILE,
            modalities=None if modalities is None else tuple(p.strip() for p in modalities.split(",") if p.strip()),
            samples=samples,
            frames=frames,
            latents="rollout" if rollout else "noise" if noise_latents else "auto",
            negative=negative,
            overrides=Overrides(schedule, steps, shift, guidance, interval(guidance_interval)),
            observer=observer,
            margin=margin,
            percentile=percentile,
            algorithm=algorithm,
            rank=rank,
            bits=bits,
            seed=seed,
            ignore_adapters=ignore_adapters,
            force=force,
        )
        console.set_resume_command(shlex.join(["cosmos-export", *sys.argv[1:]]))
        result = run(options, console.progress())
        if as_json:
            console.emit_json(_document(result))
        else:
            _print(result)
        resumed = ", resumed" if result.resumed else ""
        console.verdict(f"{result.output}: {result.ranges} ranges from {len(result.job.samples)} passes{resumed}", True)


def _document(result: CalibrateResult) -> dict[str, Any]:
    from cosmos_export.calibration.calibrate import lineage

    return {
        "output": result.output,
        "ranges": result.ranges,
        "pre_scales": result.pre_scales,
        "resumed": result.resumed,
        "checkpoint": result.job.identity,
        "lineage": lineage(result.job),
    }


def _print(result: CalibrateResult) -> None:
    import logging

    from rich.table import Table

    from cosmos_export.calibration.calibrate import lineage
    from cosmos_export.cli import console

    document = lineage(result.job)
    sources = Table("source", "kind", "items", "modes", "latents", "origin", "licence", box=None)
    for source in document["sources"]:
        sources.add_row(
            source["name"],
            source["kind"],
            str(source["count"]),
            _counts(source["modes"]),
            _counts(source["latents"]),
            source["origin"] or "not stated",
            source["licence"] or "not stated",
        )
    passes = Table("passes", "steps", "cond", "uncond", box=None)
    for modality, parts in document["coverage"].items():
        for part, cells in sorted(parts.items(), key=lambda item: int(item[0].split("-")[0])):
            passes.add_row(modality, part, str(cells.get("cond", "")), str(cells.get("uncond", "")))
    console.out().print(sources)
    for source in document["sources"]:
        for note in source["notes"]:
            console.log(f"{source['name']}: {note}", logging.WARNING)
    console.out().print()
    console.out().print(passes)


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.items())
