"""``cosmos-export recipes``: the precision recipes, and where each runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_export.cli.verbs import Verbs, require_verb

if TYPE_CHECKING:
    from cosmos_export.plan import Tried
    from cosmos_export.precision.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add the verbs to ``app``."""
    group = Verbs(name="recipes", help="Precision recipes.", invoke_without_command=True, rich_markup_mode=None)
    app.add_typer(group)

    @group.callback()
    def recipes(context: typer.Context) -> None:
        require_verb(context)

    @group.command("ls")
    def ls(
        target: Annotated[str | None, typer.Option(help="Only those that run on this target.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """List the recipes."""
        from cosmos_export.cli import console
        from cosmos_export.precision.recipe import load_recipe, recipe_names
        from cosmos_export.targets import load_target

        chosen = [load_recipe(name) for name in recipe_names()]
        if target is not None:
            chosen = [recipe for recipe in chosen if not _refusals(recipe, load_target(target).name)]
        if as_json:
            console.emit_json({"recipes": [_document(recipe) for recipe in chosen]})
        else:
            console.out().print(_table(chosen))

    @group.command("choose")
    def choose(
        checkpoint: Annotated[Path | None, typer.Argument(help="Checkpoint directory.", show_default=False)] = None,
        like: Annotated[
            str | None, typer.Option(help="A published size instead of a checkpoint.", metavar="nano|super|edge")
        ] = None,
        target: Annotated[str, typer.Option(help="What to build for.")] = "rtx-pro-6000",
        workload: Annotated[list[str] | None, typer.Option(help="MODE-PROFILE, as in plan; may repeat.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Choose the recipe for a model, a target and workloads: the fastest by prediction that fits.

        Times are predictions where the target's efficiency is measured, else multiples of the fastest.
        """
        from cosmos_export.cli import console

        found, tried = _choose(checkpoint, like, target, workload or ["t2v-480p-189f"])
        if as_json:
            rows = [
                {"recipe": one.recipe.name, "refusal": one.refusal, "weights_bytes": one.weights_bytes, "fit": one.fit,
                 "seconds": one.relative_s if one.measured else None}
                for one in tried
            ]  # fmt: skip
            console.emit_json({"chosen": found.name, "tried": rows})
        else:
            console.out().print(_tried(found, tried))

    @group.command("show")
    def show(
        name: Annotated[str, typer.Argument(help="A recipe of `recipes ls`.")],
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Show one recipe: its rules, where it runs, and where not and why."""
        from cosmos_export.cli import console
        from cosmos_export.precision.recipe import load_recipe

        recipe = load_recipe(name)
        if as_json:
            console.emit_json(_document(recipe))
        else:
            console.out().print(_details(recipe), soft_wrap=True)


def _choose(checkpoint: Path | None, like: str | None, target: str, workload: list[str]) -> tuple[Recipe, list[Tried]]:
    from cosmos_export.compiler.plan_checkpoint import subject_of
    from cosmos_export.plan import choose, offered_bytes, parse_workload
    from cosmos_export.sampling import Overrides, resolve_schedule
    from cosmos_export.targets import load_target

    subject, chosen = subject_of(checkpoint, like)[0], load_target(target)
    workloads = [parse_workload(text) for text in workload]
    schedules = [resolve_schedule(subject.sampling, w.mode, Overrides()) for w in workloads]
    return choose(subject, chosen, workloads, schedules, offered_bytes(chosen))


_FITS = {"resident": "all at once", "phases": "in phases", "no": "does not fit", None: ""}


def _tried(chosen: Recipe, tried: list[Tried]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("", "recipe", "weights", "fits", "time", "why not", box=box.SIMPLE, pad_edge=False)
    fastest = min((one.relative_s for one in tried if one.relative_s is not None), default=None)
    for one in tried:
        size = "" if one.weights_bytes is None else f"{one.weights_bytes / 1e9:.1f} GB"
        time = ""
        if one.relative_s is not None and fastest is not None:
            time = f"{one.relative_s:.2f} s" if one.measured else f"{one.relative_s / fastest:.2f} ×"
        mark = "→" if one.recipe.name == chosen.name else ""
        table.add_row(mark, one.recipe.name, size, _FITS[one.fit], time, one.refusal)
    if fastest is None:
        table.caption = "no times: the target's rates are not published; of what fits, the one with the most bits"
    return table


def _refusals(recipe: Recipe, target: str) -> dict[str, str]:
    """Scheme → why ``target`` does not run it."""
    from cosmos_export.precision.recipe import refusal
    from cosmos_export.targets import load_target

    reasons = {scheme: refusal(scheme, load_target(target)) for scheme in recipe.schemes}
    return {scheme: reason for scheme, reason in reasons.items() if reason is not None}


def _by_target(recipe: Recipe) -> dict[str, dict[str, str]]:
    from cosmos_export.targets import target_names

    return {target: _refusals(recipe, target) for target in target_names()}


def _document(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "title": recipe.title,
        "summary": " ".join(recipe.summary.split()),
        "experimental": recipe.experimental,
        "not_for": list(recipe.not_for),
        "warning": recipe.warning,
        "schemes": list(recipe.schemes),
        "rules": [{"where": rule.place.text, "scheme": rule.scheme} for rule in recipe.rules],
        "refused": {target: reasons for target, reasons in _by_target(recipe).items() if reasons},
        "source": list(recipe.source),
    }


def _table(recipes: list[Recipe]) -> Any:
    from rich import box
    from rich.table import Table

    from cosmos_export.precision.schemes import UNQUANTIZED

    table = Table("recipe", "title", "schemes", "runs on", box=box.SIMPLE, pad_edge=False)
    for recipe in recipes:
        runs = [target for target, reasons in _by_target(recipe).items() if not reasons]
        title = recipe.title + (" (experimental)" if recipe.experimental else "")
        table.add_row(recipe.name, title, " ".join(recipe.schemes) or UNQUANTIZED, " ".join(runs))
    return table


def _details(recipe: Recipe) -> str:
    by_target = _by_target(recipe)
    lines = [
        f"{recipe.name}: {recipe.title}" + (" (experimental)" if recipe.experimental else ""),
        "",
        recipe.summary.strip(),
        "",
        *(f"  {rule.place.text:<28} {rule.scheme}" for rule in recipe.rules),
        f"  {'everything else':<28} as in the checkpoint",
        "",
        "  runs on: " + ", ".join(target for target, reasons in by_target.items() if not reasons),
        *(
            f"  not on {target}: {scheme}: {reason}"
            for target, reasons in by_target.items()
            for scheme, reason in reasons.items()
        ),
        *([f"  not chosen for: {', '.join(recipe.not_for)}"] if recipe.not_for else []),
        *([f"  warning: {recipe.warning}"] if recipe.warning else []),
        *(f"  source: {source}" for source in recipe.source),
    ]
    return "\n".join(lines)
