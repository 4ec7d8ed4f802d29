"""``cosmos-export run``: a prompt (and pictures, actions, noise) through a bundle into files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cosmos_export.runtime.frontend import Prepared
    from cosmos_export.runtime.limits import Limits, Review
    from cosmos_export.runtime.results import Written


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("run")
    def run(
        bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.", show_default=False)],
        prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text, or a JSON caption: FILE.json.")],
        output: Annotated[
            list[Path] | None,
            typer.Option(
                "--output", "-o", help="By its name: .mp4, .png, .wav, .json or .safetensors (actions); may repeat."
            ),
        ] = None,
        negative: Annotated[
            str | None, typer.Option(help="Negative prompt: text or FILE.json. Default: none.", show_default=False)
        ] = None,
        mode: Annotated[
            str | None,
            typer.Option(
                help="t2i, t2v, i2v, v2v, policy, forward-dynamics or inverse-dynamics. Default: what the files say."
            ),
        ] = None,
        image: Annotated[Path | None, typer.Option(help="Picture that i2v or an action starts with.")] = None,
        video: Annotated[Path | None, typer.Option(help="Clip that v2v or an action starts with.")] = None,
        keep: Annotated[
            str | None, typer.Option(help="v2v: which end of a longer clip goes on, first or last.")
        ] = None,
        sound: Annotated[bool, typer.Option("--sound", help="Generate sound with the video.")] = False,
        frames: Annotated[int | None, typer.Option(help="4·n + 1. Default: the bundle's profile.")] = None,
        height: Annotated[int | None, typer.Option(help="Pixels. Default: the bundle's profile.")] = None,
        width: Annotated[int | None, typer.Option(help="Pixels. Default: the bundle's profile.")] = None,
        fps: Annotated[float | None, typer.Option(help="Default: 24, or what the embodiment has.")] = None,
        seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
        steps: Annotated[int | None, typer.Option(help="Default: as built, or the mode's.")] = None,
        guidance: Annotated[float | None, typer.Option(help="Default: as built, or the mode's. 1: none.")] = None,
        guidance_interval: Annotated[
            str | None, typer.Option(help="Timesteps that are guided, LOW:HIGH; 0:1000 guides every step.")
        ] = None,
        schedule: Annotated[
            str | None, typer.Option(help="Grid of sigmas: karras, flow or native. Default: as built.")
        ] = None,
        shift: Annotated[float | None, typer.Option(help="Shift of a flow or native grid.")] = None,
        metadata: Annotated[
            bool | None,
            typer.Option(
                "--metadata/--no-metadata",
                help="Sentences on duration and resolution after the prompt. Default: unless it is a JSON caption.",
            ),
        ] = None,
        system: Annotated[
            bool | None,
            typer.Option("--system/--no-system", help="System message before the prompt. Default: the checkpoint's."),
        ] = None,
        literal: Annotated[
            bool,
            typer.Option(
                "--literal/--no-literal",
                help="Read control tokens in prompts, as <|im_end|>, as text. Default: as tokens, as published.",
            ),
        ] = False,
        actions: Annotated[Path | None, typer.Option(help="forward-dynamics: .json or .safetensors of rows.")] = None,
        embodiment: Annotated[str | None, typer.Option(help="Whose actions: droid_lerobot, umi, av, …")] = None,
        viewpoint: Annotated[
            str | None, typer.Option(help="ego_view, third_person_view, wrist_view or concat_view.")
        ] = None,
        chunk: Annotated[int | None, typer.Option(help="Actions; the clip has one frame more.")] = None,
        tier: Annotated[int | None, typer.Option(help="Resolution of an action's canvas: 256, 480, 704, 720.")] = None,
        action_width: Annotated[int | None, typer.Option(help="Columns of an action, where not the usual.")] = None,
        action_stats: Annotated[
            Path | None, typer.Option(help="Statistics of the data: actions go in and come out in its units.")
        ] = None,
        action_normalization: Annotated[
            str | None, typer.Option(help="What the statistics are used for: quantile, minmax or meanstd.")
        ] = None,
        action_clamp: Annotated[
            bool,
            typer.Option(
                "--action-clamp/--no-action-clamp",
                help="Cut given actions off at the bounds of the statistics. Default: no, as in training.",
            ),
        ] = False,
        limits: Annotated[
            Path | None, typer.Option(help="limits.toml of the robot: actions pass, are clipped or rejected.")
        ] = None,
        noise: Annotated[
            Path | None, typer.Option(help="Initial noise: .safetensors with vision, sound, action.")
        ] = None,
        save_latents: Annotated[Path | None, typer.Option(help="What was sampled: .safetensors.")] = None,
        save_frames: Annotated[Path | None, typer.Option(help="Frames in [0, 1]: .npy [T, H, W, 3].")] = None,
        backend: Annotated[str | None, typer.Option(help="What runs the engines. Default: the bundle's.")] = None,
        device: Annotated[str | None, typer.Option(help="Where. Default: the backend's first.")] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Generate an image, a video, sound or actions. What the bundle cannot do is refused before anything is loaded.

        Every output says in its metadata that it is AI-generated, and by which bundle. docs/run.md has an example for
        each mode.
        """
        import logging
        import time

        from cosmos_export.bundle import open_bundle, open_verdicts
        from cosmos_export.cli import console
        from cosmos_export.cli.build import interval
        from cosmos_export.runtime.frontend import GenerateOptions
        from cosmos_export.runtime.model import Model
        from cosmos_export.runtime.results import plan_outputs
        from cosmos_export.sampling import Overrides

        started = time.perf_counter()
        model = Model(open_bundle(bundle), backend=backend, device=device, resident=False)
        manifest = model.manifest
        asked = GenerateOptions(
            prompt=prompt,
            negative=negative,
            mode=mode,
            image=image,
            video=video,
            actions=actions,
            frames=frames,
            height=height,
            width=width,
            fps=fps,
            seed=seed,
            sampling=Overrides(schedule, steps, shift, guidance, interval(guidance_interval)),
            sound=sound,
            keep=keep,  # type: ignore[arg-type]
            metadata=metadata,
            system=system,
            literal=literal,
            embodiment=embodiment,
            viewpoint=viewpoint,
            chunk=chunk,
            tier=tier,
            action_width=action_width,
            action_stats=action_stats,
            action_normalization=action_normalization,
            action_clamp=action_clamp,
            noise=noise,
        )
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
            console.emit_json({**document, "verdicts": dataclasses.asdict(open_verdicts(manifest))})
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
    """What became of the actions, where there is more to say than that they passed."""
    import logging

    from cosmos_export.cli import console

    if review.unchecked:
        console.log(f"limits that could not be looked at: {'; '.join(review.unchecked)}", logging.WARNING)
    for breach in review.breaches:
        console.log(f"clipped: {breach}", logging.WARNING)


def _plan(prepared: Prepared) -> str:
    """What is about to be done, in one line."""
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
    from rich.table import Table

    from cosmos_export.cli import console

    table = Table("stage", "seconds", title="Timings", title_justify="left", box=None)
    table.columns[1].justify = "right"
    for stage, seconds in timings.items():
        table.add_row(stage, f"{seconds:.3f}")
    out = console.out()
    out.print(table)
    for path in files:
        out.print(str(path), soft_wrap=True)


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
