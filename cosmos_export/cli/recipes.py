"""``cosmos-export recipes``: the precision recipes, and where each runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_export.cli.verbs import Verbs, require_verb

if TYPE_CHECKING:
    from cosmos_export.targets.recipe import Recipe


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
        from cosmos_export.targets import load_target
        from cosmos_export.targets.recipe import load_recipe, recipe_names

        chosen = [load_recipe(name) for name in recipe_names()]
        if target is not None:
            chosen = [recipe for recipe in chosen if not _refusals(recipe, load_target(target).name)]
        if as_json:
            console.emit_json({"recipes": [_document(recipe) for recipe in chosen]})
        else:
            console.out().print(_table(chosen))

    @group.command("show")
    def show(
        name: Annotated[str, typer.Argument(help="A recipe of `recipes ls`.")],
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Show one recipe: its rules, where it runs, and where not and why."""
        from cosmos_export.cli import console
        from cosmos_export.targets.recipe import load_recipe

        recipe = load_recipe(name)
        if as_json:
            console.emit_json(_document(recipe))
        else:
            console.out().print(_details(recipe), soft_wrap=True)


def _refusals(recipe: Recipe, target: str) -> dict[str, str]:
    """Scheme → why ``target`` does not run it."""
    from cosmos_export.targets import load_target
    from cosmos_export.targets.recipe import refusal

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
        "warning": recipe.warning,
        "schemes": list(recipe.schemes),
        "rules": [{"where": rule.place.text, "scheme": rule.scheme} for rule in recipe.rules],
        "refused": {target: reasons for target, reasons in _by_target(recipe).items() if reasons},
        "source": list(recipe.source),
    }


def _table(recipes: list[Recipe]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("recipe", "title", "schemes", "runs on", box=box.SIMPLE, pad_edge=False)
    for recipe in recipes:
        runs = [target for target, reasons in _by_target(recipe).items() if not reasons]
        title = recipe.title + (" (experimental)" if recipe.experimental else "")
        table.add_row(recipe.name, title, " ".join(recipe.schemes) or "bf16", " ".join(runs))
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
        *([f"  warning: {recipe.warning}"] if recipe.warning else []),
        *(f"  source: {source}" for source in recipe.source),
    ]
    return "\n".join(lines)
