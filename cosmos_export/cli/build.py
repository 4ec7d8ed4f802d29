"""``cosmos-export build``: a checkpoint into a bundle."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_export.kernels.description import PLUGINS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cosmos_export.bundle import Planned
    from cosmos_export.compiler.artifacts import Engine
    from cosmos_export.compiler.evidence import BuildResult
    from cosmos_export.compiler.job import Job


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("build")
    def build(
        checkpoint: Annotated[
            Path, typer.Argument(help="Checkpoint directory in the published layout.", show_default=False)
        ],
        output: Annotated[Path | None, typer.Option("--output", "-o", help="Bundle directory to create.")] = None,
        target: Annotated[str, typer.Option(help="What to build for; `cosmos-export targets` lists them.")] = "cpu",
        backend: Annotated[
            str | None, typer.Option(help="Another backend of the target than its first; `targets` lists them.")
        ] = None,
        profile: Annotated[
            list[str] | None,
            typer.Option(help="Name (480p-121f, 720p-189f+sound, policy-droid) and dim=min:opt:max items; may repeat."),
        ] = None,
        modalities: Annotated[
            str | None, typer.Option(help="Of vision,sound,action; default: all that the checkpoint generates.")
        ] = None,
        outputs: Annotated[
            str | None,
            typer.Option(help="Velocities to compute, e.g. action_velocity for inverse dynamics; default: all."),
        ] = None,
        components: Annotated[
            str | None,
            typer.Option(
                help="Beside the transformer, of vae-decoder,vae-encoder,sound-decoder,tokenizer; or none; "
                "default: all that the checkpoint has and the modalities use."
            ),
        ] = None,
        steps: Annotated[
            int | None, typer.Option(help="Denoising steps; default: the checkpoint's own, or the mode's.")
        ] = None,
        mode: Annotated[
            str, typer.Option(help="What the schedule's defaults are for: t2i, t2v, i2v, v2v, policy, …")
        ] = "t2v",
        schedule: Annotated[
            str | None, typer.Option(help="Grid of sigmas: karras, flow or native; default: the checkpoint's own.")
        ] = None,
        shift: Annotated[float | None, typer.Option(help="Shift of a flow or native grid.")] = None,
        guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 runs one branch.")] = None,
        guidance_interval: Annotated[
            str | None, typer.Option(help="Timesteps that are guided, LOW:HIGH; 0:1000 guides every step.")
        ] = None,
        loop: Annotated[
            str, typer.Option(help="host: one step a call; device: guidance, sampler and all steps in engines.")
        ] = "host",
        recipe: Annotated[
            str | None,
            typer.Option(
                help="What each product computes in: one of `recipes ls`, a FILE.toml, or auto. Default: as it is."
            ),
        ] = None,
        set_: Annotated[
            list[str] | None,
            typer.Option("--set", help="PLACE=SCHEME over the recipe's own rules, e.g. gen.mlp.down=fp8; may repeat."),
        ] = None,
        calibration: Annotated[
            Path | None, typer.Option(help="Scale table of `calibrate`, for recipes that quantize activations.")
        ] = None,
        weights: Annotated[
            str, typer.Option(help="embedded in the engines, or external: large ones are inputs, one copy for all.")
        ] = "embedded",
        kernels: Annotated[
            str | None,
            typer.Option(
                help=f"This project's kernels as TensorRT plugins (--backend tensorrt): of {','.join(PLUGINS)}."
            ),
        ] = None,
        quality: Annotated[
            str, typer.Option(help="A quantized step beyond its limits: enforce (no bundle) or report.")
        ] = "enforce",
        parity: Annotated[
            str, typer.Option(help="Compare every stage with diffusers: auto (if it fits in memory), always, never.")
        ] = "auto",
        until: Annotated[str | None, typer.Option(help="Stop after this pass; writes no bundle.")] = None,
        dump: Annotated[Path | None, typer.Option(help="Directory for the graphs as text, one file a pass.")] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on where an interrupted build of the same output stopped.")
        ] = False,
        memory_budget: Annotated[
            str | None,
            typer.Option(
                help="Memory the build may take, such as 16GiB: larger engines are cut into several. Default: what is "
                "free here."
            ),
        ] = None,
        cache: Annotated[
            Path | None,
            typer.Option(
                help="Where captured graphs are kept and engines of other bundles recorded; default: "
                "$COSMOS_EXPORT_CACHE or ~/.cache."
            ),
        ] = None,
        ignore_adapters: Annotated[
            bool, typer.Option("--ignore-adapters", help="Take the weights without the adapters beside them.")
        ] = False,
        no_cache: Annotated[
            bool, typer.Option("--no-cache", help="Capture every graph, build every engine, and record none.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Compile a checkpoint: capture, passes, ONNX, engines, checks. The output appears when all of it is right."""
        from cosmos_export.cli import console
        from cosmos_export.compiler.cache import default_folder, default_graphs_folder
        from cosmos_export.compiler.document import build as run
        from cosmos_export.compiler.document import build_document
        from cosmos_export.compiler.job import BuildOptions

        options = BuildOptions(
            checkpoint=checkpoint,
            output=output,
            target=target,
            backend=backend,
            profiles=tuple(profile or BuildOptions.profiles),
            modalities=_names(modalities),
            outputs=_names(outputs),
            components=_names(components),
            steps=steps,
            mode=mode,
            grid=schedule,
            shift=shift,
            guidance=guidance,
            guidance_interval=interval(guidance_interval),
            loop=loop,  # type: ignore[arg-type]
            recipe=recipe,
            weights=weights,  # type: ignore[arg-type]
            overrides=tuple(set_ or ()),
            kernels=_names(kernels) or (),
            calibration=calibration,
            quality=quality,  # type: ignore[arg-type]
            parity=parity,  # type: ignore[arg-type]
            until=until,
            dump=dump,
            force=force,
            resume=resume,
            memory_budget=memory_budget,
            ignore_adapters=ignore_adapters,
            cache=None if no_cache else cache or default_folder(),
            graphs=None if no_cache else cache or default_graphs_folder(),
        )

        def begins(job: Job) -> None:
            if output is not None:
                console.set_resume_command(_resume_command(job))

        def fails(left: Path | None) -> None:
            if left is None:
                console.set_resume_command(None)

        result = run(options, console.progress(), begins, fails)
        if as_json:
            console.emit_json(build_document(result, output))
        else:
            _print(result)
        failed = result.manifest is not None and any(v.verdict == "fail" for v in result.manifest.evaluation)
        console.verdict(_verdict(result, output), not failed)


def interval(text: str | None) -> tuple[float, float] | None:
    """``LOW:HIGH`` as two numbers; CX463 for anything else."""
    from cosmos_export.diagnostics import UserError

    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise UserError("CX463", f"guidance interval `{text}` is not LOW:HIGH", "for example 400:1000") from error
    return low, high


def _resume_command(job: Job) -> str:
    """This command, as it would be continued: with the memory budget that was found, or engines would be cut in other
    places where the machine has less free by then."""
    arguments = [*sys.argv[1:], *([] if job.options.resume else ["--resume"])]
    if job.memory_budget is not None and job.options.memory_budget is None:
        arguments += ["--memory-budget", f"{job.memory_budget / 2**30:g}GiB"]
    return shlex.join(["cosmos-export", *arguments])


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _print(result: BuildResult) -> None:
    from rich.table import Table

    from cosmos_export.cli import console

    out = console.out()
    passes = Table("pass", "changed", "declined", "seconds", title="Passes", title_justify="left", box=None)
    for report in result.passes:
        changes = ", ".join(f"{count} × {kind}" for kind, count in report.result.changes.items()) or "nothing"
        declined = ", ".join(f"{d.where}: {d.reason}" for d in report.result.declined)
        name = f"{report.name} ({report.form})" if report.form else report.name
        passes.add_row(name, changes, declined or "–", f"{report.seconds:.2f}")
    out.print(passes)
    if result.parity:
        table = Table(
            "stage", "metric", "worst", "limit", "case", title="\nParity with diffusers", title_justify="left", box=None
        )
        for m in result.parity:
            table.add_row(m.stage, m.metric, f"{m.value:.2g}", f"{m.limit:g}", m.case)
        out.print(table)
    for m in result.parity:
        for what, value in m.details.items():
            out.print(f" {m.stage}: {what}: {value:.3g}" if value % 1 else f" {m.stage}: {what}: {value:,.0f}")
    for subject, note in result.not_compared.items():
        out.print(f"\nParity of {subject} with diffusers: not measured: {note}")
    if result.losses is not None:
        out.print(_losses(result))
    if result.engines:
        table = Table(
            "engine", "size", "attention", "GEMMs", "activations", "build", "peak memory", "plan",
            title="\nEngines", title_justify="left", box=None,
        )  # fmt: skip
        for engine in result.engines:
            table.add_row(
                engine.graph,
                _size(engine.report.size_bytes),
                f"{engine.fused_attention} fused of {engine.attention}" if engine.attention else "–",
                _gemms(engine),
                _size(engine.activation_bytes),
                engine.report.reused or f"{engine.report.build_s:.1f} s",
                "–" if engine.report.reused else _size(engine.report.peak_memory_bytes),
                "as planned" if engine.check.passed else engine.check.found,
            )
        out.print(table)
    for note in result.notes:
        out.print(f"\n{note}")
    if result.manifest is not None:
        _print_planned(result.manifest.volatile.planned)
        out.print(f"\nComponents: {', '.join(('transformer', *result.job.components))}")
        files = result.manifest.files
        out.print(
            f"{len(files)} files, {_size(sum(f.size_bytes for f in files))}; {result.costs.seconds:.1f} s, "
            f"peak memory {_size(result.costs.peak_resident_bytes)}"
        )
    for path in result.dumps:
        out.print(str(path), soft_wrap=True)


def _print_planned(planned: Mapping[str, Planned]) -> None:
    from rich.table import Table

    from cosmos_export.cli import console

    if planned:
        table = Table("", "planned", "found", "", title="\nPlan", title_justify="left", box=None)
        for name, one in planned.items():
            share = f"{one.planned / one.found - 1:+.1%}" if one.found else "–"
            table.add_row(name, _size(one.planned), _size(one.found), share)
        console.out().print(table)


def _losses(result: BuildResult) -> Any:
    from rich.table import Table

    losses, precision = result.losses, result.job.precision
    assert losses is not None
    table = Table(
        "what", "loss", "limit", title=f"\nQuantization by recipe {precision.recipe}", title_justify="left", box=None
    )
    for loss in losses.worst_linears:
        table.add_row(f"{loss.site} ({loss.scheme})", f"{loss.relative:.4f}", f"{loss.limit:.4f}")
    for step in losses.steps:
        table.add_row(f"step {step.step + 1}", f"{step.relative:.4f}", f"{losses.limits.largest}")
        if step.share is not None:
            limit = f"{losses.limits.largest_share}"
            table.add_row(f"step {step.step + 1}, times what rounding alone loses", f"{step.share:.2f}", limit)
    for m in result.quality:
        table.add_row(f"{m.stage}: {m.metric}", f"{m.value:.4f}", f"{m.limit}")
    table.caption = "relative errors: the five linears nearest to their limit, and the velocity of whole steps"
    return table


def _gemms(engine: Engine) -> str:
    """How many GEMMs one profile has, by type."""
    types = engine.graphs[0].gemm_types() if engine.graphs else {}
    return ", ".join(f"{count} × {kind}" for kind, count in types.items()) or "–"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _verdict(result: BuildResult, output: Path | None) -> str:
    if result.manifest is None:
        last = result.program.history[-1] if result.program else "nothing"
        return f"stopped after {last}: {len(result.dumps)} dumps, no bundle"
    attention = sum(e.fused_attention for e in result.engines)
    proof = "parity not measured"
    if result.parity:
        proof = f"{len(result.parity)} stages within their limits of diffusers"
        if "transformer" in result.not_compared:
            proof += ", not the whole transformer"
    engines = f"{len(result.engines)} engines with {attention} fused attentions, " if result.engines else ""
    components = "".join(f" + {name}" for name in result.job.components)
    failed = [f"{v.stage} of {v.subject} failed: {v.note}" for v in result.manifest.evaluation if v.verdict == "fail"]
    if failed:
        return f"built {output}, with failures that were only to be reported: {'; '.join(failed)}"
    return f"built {output}: transformer{components}, {engines}{proof}"
