"""``cosmos-export plan``: what a build and its bundle would cost, before there is either."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cosmos_export.plan import Estimate
    from cosmos_export.plan.estimate import Fit, Load


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("plan")
    def plan(
        checkpoint: Annotated[
            Path | None, typer.Argument(help="Checkpoint directory; headers only are read.", show_default=False)
        ] = None,
        like: Annotated[
            str | None,
            typer.Option(help="A published size instead of a checkpoint.", metavar="nano|super|edge"),
        ] = None,
        target: Annotated[
            str, typer.Option(help="What to build for, T or T,T…; `cosmos-export targets` lists them.")
        ] = "rtx-pro-6000",
        workload: Annotated[
            list[str] | None,
            typer.Option(help="MODE-SIZE: t2v-480p-189f, i2v-720p-121f+sound, t2i-720p, policy-droid; may repeat."),
        ] = None,
        recipe: Annotated[
            str | None,
            typer.Option(help="Precision; `cosmos-export recipes ls` lists them. Default: as it is."),
        ] = None,
        settings: Annotated[
            list[str] | None, typer.Option("--set", help="Change of the recipe, PLACE=SCHEME; may repeat.")
        ] = None,
        prompt_tokens: Annotated[
            str | None, typer.Option(help="N or N:NEGATIVE; default: the official prompts' lengths.")
        ] = None,
        steps: Annotated[int | None, typer.Option(help="Denoising steps; default: as `build`.")] = None,
        guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 runs one branch.")] = None,
        guidance_interval: Annotated[
            str | None, typer.Option(help="Timesteps that are guided, LOW:HIGH; 0:1000 guides every step.")
        ] = None,
        loop: Annotated[
            str, typer.Option(help="host: one branch of a step a call; device: both branches and all steps in engines.")
        ] = "host",
        memory_budget: Annotated[
            str | None, typer.Option(help="Of the build, such as 16GiB: larger engines are cut; default: none is.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Plan a build: sizes, memory, disk and time of the build, work and predicted time of a request, what fits.

        Ends with 1 if nothing fits.
        """
        from cosmos_export.cli import console
        from cosmos_export.cli.build import interval
        from cosmos_export.compiler.plan_checkpoint import PlanOptions, plan_checkpoint

        found = plan_checkpoint(
            PlanOptions(
                checkpoint=checkpoint,
                like=like,
                targets=tuple(target.split(",")),
                workloads=tuple(workload or PlanOptions.workloads),
                recipe=recipe,
                overrides=tuple(settings or ()),
                prompt_tokens=_tokens(prompt_tokens),
                steps=steps,
                guidance=guidance,
                guidance_interval=interval(guidance_interval),
                loop=loop,  # type: ignore[arg-type]
                memory_budget=memory_budget,
            )
        )
        if as_json:
            console.emit_json(found.to_json())
        else:
            for part in _report(found):
                console.out().print(part)
        console.verdict(_verdict(found), found.something_fits)
        if not found.something_fits:
            raise typer.Exit(1)


def _tokens(text: str | None) -> tuple[int, int] | None:
    from cosmos_export.diagnostics import UserError

    if text is None:
        return None
    numbers = text.split(":")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise UserError("CX481", f"prompt tokens `{text}` are neither N nor N:NEGATIVE", "for example 512 or 1615:2863")
    return int(numbers[0]), int(numbers[-1])


def _report(found: Estimate) -> list[Any]:
    return [_components(found), _builds(found), _loads(found), _fits(found), *_hints(found)]


def _table(*columns: str, title: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _components(found: Estimate) -> Any:
    table = _table(
        "component", "parameters", "weights", "engine", "activations", "in", title=f"Engines, {found.recipe}"
    )
    for part in found.components:
        pieces = " or ".join(str(count) for count in sorted({len(form) for form in part.forms}))
        table.add_row(
            part.name, _count(part.parameters), _gb(part.weight_bytes),
            _gb(part.engine_bytes) + (f" in {pieces}" if part.cut else ""),
            _gb(part.activation_bytes), part.scheme,
        )  # fmt: skip
    return table


def _builds(found: Estimate) -> Any:
    table = _table("target", "peak host memory", "of it for", "disk", "time", title="\nBuild")
    for name, host in found.builds.items():
        low, high = (f"{seconds / 60:.0f}" for seconds in host.seconds)
        table.add_row(
            name, _gb(host.peak_anonymous_bytes), host.largest or "–", _gb(host.disk_bytes), f"{low} to {high} min"
        )
    return table


def _loads(found: Estimate) -> Any:
    table = _table(
        "workload", "rows", "prompts", "steps", "passes", "linear/step", "attention/step", "attention", "reasoner",
        "K/V", title="\nWork, in TFLOP",
    )  # fmt: skip
    for load in found.loads:
        prompts = f"{load.prompt_tokens}+{load.negative_tokens}" if load.negative_tokens else str(load.prompt_tokens)
        table.add_row(
            load.workload, f"{load.rows:,}", prompts, str(load.steps), str(load.passes),
            _tera(load.step.linear), _tera(load.step.attention), f"{load.step.attention / load.step.total:.0%}",
            _tera(load.reasoner.total), _gb(load.device.cache_bytes),
        )  # fmt: skip
    return table


def _fits(found: Estimate) -> Any:
    table = _table(
        "target", "workload", "memory", "all resident", "in phases", "verdict", "reasoner", "linear", "attention",
        "codecs", "predicted", title="\nOn the device",
    )  # fmt: skip
    for fit in found.fits:
        table.add_row(
            fit.target, fit.workload, "–" if fit.memory_bytes is None else _gb(fit.memory_bytes),
            _gb(fit.resident_bytes), _gb(fit.phased_bytes), fit.verdict, *_times(fit),
        )  # fmt: skip
    return table


def _times(fit: Fit) -> list[str]:
    found = fit.latency
    if found is None:
        return ["", "", "", "", "–"]
    parts = (found.reasoner_s, found.linear_s, found.attention_s, found.codec_s, found.total_s)
    return [f"{seconds:.2f} s" for seconds in parts]


def _hints(found: Estimate) -> list[str]:
    lines = [f"{fit.workload} on {fit.target}: {advice}" for fit in found.fits for advice in fit.advice]
    missing = dict.fromkeys((fit.target, fit.no_latency) for fit in found.fits if fit.no_latency)
    lines += [f"{target}: no time predicted: {why}" for target, why in missing]
    guided = [load for load in found.loads if load.passes > load.steps]
    lines += [_interval_hint(load) for load in guided[:1]]
    return ["", *lines] if lines else []


def _interval_hint(load: Load) -> str:
    share = (load.passes - load.steps) / load.passes
    return f"{load.workload}: {load.steps} steps in {load.passes} passes; without guidance {share:.0%} fewer"


def _verdict(found: Estimate) -> str:
    fitting = sum(fit.verdict != "does not fit" for fit in found.fits)
    return f"{found.variant} {found.recipe}: {fitting} of {len(found.fits)} fit; predictions, nothing was run"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.0f} MB"


def _tera(operations: float) -> str:
    return f"{operations / 1e12:,.1f}"
