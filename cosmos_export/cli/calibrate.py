"""``cosmos-export calibrate``: a checkpoint and data into a scale table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosmos_export.cli.tables import Table, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.options import CalibrateOptions

if TYPE_CHECKING:
    from cosmos_export.compiler.calibrate_checkpoint import CalibrateResult


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "calibrate",
        CalibrateOptions,
        "cosmos-export calibrate Cosmos3-Nano --data prompts.txt --data clips/ -o scales/",
        "cosmos-export calibrate Cosmos3-Nano --data robot-data/,embodiment=droid_lerobot --samples 256 -o scales/",
    )
    def calibrate(options: CalibrateOptions, as_json: bool) -> None:
        """Find the ranges of all activations, with one decoder layer in memory at a time.

        After an interruption the same command goes on where it stopped.
        """
        import logging
        import shlex
        import sys

        from cosmos_export.cli import console
        from cosmos_export.compiler.calibrate_checkpoint import calibrate_checkpoint as run

        if options.latents == "noise":
            console.log("pure noise at every step is not what the model sees: ranges will be off", logging.WARNING)
        console.set_resume_command(shlex.join(["cosmos-export", *sys.argv[1:]]))
        result = run(options, console.progress())
        if as_json:
            console.emit_json("calibrate", _document(result))
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

    from cosmos_export.calibration.calibrate import lineage
    from cosmos_export.cli import console

    document = lineage(result.job)
    sources = Table(("source", "kind", *numbers("items"), "modes", "latents", "origin", "licence"))
    for source in document["sources"]:
        sources.add(
            source["name"],
            source["kind"],
            str(source["count"]),
            _counts(source["modes"]),
            _counts(source["latents"]),
            source["origin"] or "not stated",
            source["licence"] or "not stated",
        )
    passes = Table(("passes", "steps", *numbers("cond", "uncond")), head=2)
    for modality, parts in document["coverage"].items():
        for part, cells in sorted(parts.items(), key=lambda item: int(item[0].split("-")[0])):
            passes.add(modality, part, str(cells.get("cond", "")), str(cells.get("uncond", "")))
    for source in document["sources"]:
        for note in source["notes"]:
            console.log(f"{source['name']}: {note}", logging.WARNING)
    console.show(sources, passes)


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.items())
