"""``cosmos-export run``: a prompt (and pictures, actions, noise) through a bundle into files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_export import units
from cosmos_export.cli.options import Json, takes
from cosmos_export.cli.tables import Table, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.options import GenerateOptions

if TYPE_CHECKING:
    from cosmos_export.runtime.frontend import Prepared
    from cosmos_export.runtime.limits import Limits, Review
    from cosmos_export.runtime.results import Written

_OUTPUT, _MACHINE = "Output", "Machine and files"
_OUTPUTS = dict.fromkeys(("output", "save_latents", "save_frames"), _OUTPUT)


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.command(
        "run",
        'cosmos-export run nano.bundle -p "A robot folds a towel." -o towel.mp4',
        'cosmos-export run nano.bundle -p "The robot waves." --image robot.jpg --frames 121 --seed 7 -o wave.mp4',
    )
    @takes(
        GenerateOptions,
        bundle="Arguments",
        device=_MACHINE,
        backend=_MACHINE,
        force=_OUTPUT,
        limits="Robots",
        **_OUTPUTS,
    )
    def run(
        asked: GenerateOptions,
        bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to run.", show_default=False)],
        output: Annotated[
            list[Path] | None,
            typer.Option(
                "--output",
                "-o",
                metavar="FILE",
                help="File to write, by its name: .mp4, .png, .wav, .json or .safetensors (actions). Repeat it for "
                "several.",
            ),
        ] = None,
        save_latents: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Write what was sampled: .safetensors.")
        ] = None,
        save_frames: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Write frames in [0, 1]: .npy [frames, height, width, 3].")
        ] = None,
        backend: Annotated[
            str | None, typer.Option(metavar="BACKEND", help="What runs the engines. Default: the bundle's own.")
        ] = None,
        device: Annotated[
            str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N. Default: the backend's first.")
        ] = None,
        limits: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="limits.toml of the robot: actions pass, are clipped or rejected."),
        ] = None,
        require_signature: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Public key (PEM): a bundle that it did not sign is refused."),
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
        as_json: Json = False,
    ) -> None:
        """Generate an image, a video, sound or actions. What the bundle cannot do is refused before anything is loaded.

        Every output says in its metadata that it is AI-generated, and by which bundle. docs/run.md has an example for
        each mode.
        """
        import logging
        import time

        from cosmos_export import bundle as bundles
        from cosmos_export.bundle import open_verdicts
        from cosmos_export.cli import console
        from cosmos_export.runtime.model import Model
        from cosmos_export.runtime.results import plan_outputs

        started = time.perf_counter()
        files = bundles.open_bundle(bundle)
        if require_signature is not None:
            bundles.require_signature(files, require_signature)
        model = Model(files, backend=backend, device=device, resident=False)
        manifest = model.manifest
        prepared = model.prepare(asked)
        outputs = plan_outputs(output or [], prepared, manifest, latents=save_latents, frames=save_frames, force=force)
        allowed = None if limits is None else _limits(limits, prepared)
        for note in prepared.notes:
            console.log(note, logging.WARNING)
        console.log_open(open_verdicts(manifest))
        console.log(_plan(prepared))
        timings = {"prepare": time.perf_counter() - started}
        loading = time.perf_counter()
        model.load(console.progress())
        timings["verify"] = time.perf_counter() - loading
        generated = model.run(prepared, progress=console.progress())
        written = generated.write(outputs, console.progress(), allowed)
        if allowed is not None and written.review is not None:
            _say(written.review)
        timings |= generated.timings
        for stage, seconds in written.timings.items():
            timings.setdefault(stage, seconds)
        timings["total"] = time.perf_counter() - started
        if as_json:
            document = _document(bundle, model.bundle_id, prepared, written, timings)
            console.emit_json("run", {**document, "verdicts": dataclasses.asdict(open_verdicts(manifest))})
        else:
            _print(written.files, timings)
        console.verdict(f"{', '.join(map(str, written.files))}: AI-generated by bundle {model.bundle_id[:12]}", True)


def _limits(path: Path, prepared: Prepared) -> Limits:
    """The limits in ``path``, which are those of the actions that are about to be made."""
    from cosmos_export.diagnostics import UserError
    from cosmos_export.runtime.limits import read_limits

    found, action = read_limits(path), prepared.request.action
    if action is None or action.given is not None:
        raise UserError("CX604", f"--limits in mode {prepared.request.mode}, which makes no actions", "leave it out")
    found.require(action.raw_dim, "model" if prepared.scale is None else "raw")
    return found


def _say(review: Review) -> None:
    """The review of the actions, where there is more to say than that they passed."""
    import logging

    from cosmos_export.cli import console

    if review.unchecked:
        console.log(f"limits that could not be looked at: {'; '.join(review.unchecked)}", logging.WARNING)
    for breach in review.breaches:
        console.log(f"clipped: {breach}", logging.WARNING)


def _plan(prepared: Prepared) -> str:
    """The request in one line."""
    request = prepared.request
    pictures = "an image" if request.frames == 1 else f"{request.frames} frames at {request.fps:g} a second"
    parts = [f"{pictures} of {_pixels(prepared)}"]
    if request.sound:
        parts.append("sound")
    if request.action is not None and prepared.embodiment is not None:
        parts.append(f"{request.action.rows} actions of {prepared.embodiment.name}{_beyond(prepared)}")
    plan = request.schedule
    guided = sum(plan.guided)
    guidance = f"guidance {plan.guidance:g} in {guided}" if guided else "no guidance"
    tokens = f"{len(request.input_ids)} tokens"
    if request.negative_ids is not None:
        tokens += f" and {len(request.negative_ids)} negative"
    return (
        f"{request.mode}: {', '.join(parts)}; {plan.steps} steps ({plan.grid}), {guidance}; {tokens}; seed "
        f"{request.seed}; profile `{prepared.profile}`"
    )


def _beyond(prepared: Prepared) -> str:
    found = prepared.beyond
    if found is None or not found.count:
        return ""
    return f" ({found.count} of {found.of} values beyond the statistics{', cut off' if found.clamped else ''})"


def _pixels(prepared: Prepared) -> str:
    return f"{prepared.size[1]} × {prepared.size[0]} pixels"


def _print(files: list[Path], timings: Mapping[str, float]) -> None:
    from cosmos_export.cli import console

    table = Table(("stage", *numbers("time")))
    for stage, seconds in timings.items():
        table.add(stage, units.seconds(seconds))
    console.show(table, *map(str, files))


def _document(
    bundle: Path, bundle_id: str, prepared: Prepared, written: Written, timings: Mapping[str, float]
) -> dict[str, Any]:
    request, plan = prepared.request, prepared.request.schedule
    return {
        "bundle": str(bundle),
        "bundle_id": f"sha256:{bundle_id}",
        "mode": request.mode,
        "profile": prepared.profile,
        "frames": request.frames,
        "height": prepared.size[0],
        "width": prepared.size[1],
        "fps": request.fps,
        "sound": request.sound,
        "embodiment": None if prepared.embodiment is None else prepared.embodiment.name,
        "actions_beyond_statistics": None if prepared.beyond is None else dataclasses.asdict(prepared.beyond),
        "seed": request.seed,
        "grid": plan.grid,
        "steps": plan.steps,
        "guidance": plan.guidance,
        "prompt_tokens": len(request.input_ids),
        "negative_tokens": None if request.negative_ids is None else len(request.negative_ids),
        "notes": list(prepared.notes),
        "outputs": [{"path": str(path), "size_bytes": path.stat().st_size} for path in written.files],
        "review": None if written.review is None else written.review.document,
        "timings_s": {stage: round(seconds, 4) for stage, seconds in timings.items()},
    }
