"""``cosmos-export recipes``: the precision recipes, and where each runs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import typer

from cosmos_export import units
from cosmos_export.cli import verbs
from cosmos_export.cli.tables import Column, Table, facts, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import RecipesChooseOptions, RecipesLsOptions, RecipesShowOptions

if TYPE_CHECKING:
    from cosmos_export.plan import Tried
    from cosmos_export.precision.recipe import Recipe


def register(app: Verbs) -> None:
    """Add the verbs to ``app``."""
    group = verbs.group("recipes", "Precision recipes: what each product computes in.")
    app.add_typer(group)

    @group.callback()
    def recipes(context: typer.Context) -> None:
        verbs.require_verb(context)

    @group.verb(
        "ls",
        RecipesLsOptions,
        "cosmos-export recipes ls",
        "cosmos-export recipes ls --target l40s",
    )
    def ls(options: RecipesLsOptions, as_json: bool) -> None:
        """List the recipes."""
        from cosmos_export.cli import console
        from cosmos_export.precision.recipe import load_recipe, recipe_names
        from cosmos_export.targets import load_target

        chosen = [load_recipe(name) for name in recipe_names()]
        if options.target is not None:
            chosen = [recipe for recipe in chosen if not _refusals(recipe, load_target(options.target).name)]
        if as_json:
            console.emit_json("recipes-ls", {"recipes": [_document(recipe) for recipe in chosen]})
        else:
            console.show(_table(chosen))

    @group.verb(
        "choose",
        RecipesChooseOptions,
        "cosmos-export recipes choose --like nano --target l40s",
        "cosmos-export recipes choose Cosmos3-Nano --target h100 --workload policy-droid",
    )
    def choose(options: RecipesChooseOptions, as_json: bool) -> None:
        """Choose the recipe for a model, a target and workloads: the fastest by prediction that fits.

        Times are predictions where the target's efficiency is measured, else multiples of the fastest.
        """
        from cosmos_export.cli import console

        found, tried = _choose(options)
        if as_json:
            rows = [
                {"recipe": one.recipe.name, "refusal": one.refusal, "weights_bytes": one.weights_bytes, "fit": one.fit,
                 "seconds": one.relative_s if one.measured else None}
                for one in tried
            ]  # fmt: skip
            console.emit_json("recipes-choose", {"chosen": found.name, "tried": rows})
        else:
            console.show(_tried(found, tried))

    @group.verb(
        "show",
        RecipesShowOptions,
        "cosmos-export recipes show fp8",
        "cosmos-export recipes show int4 --json",
    )
    def show(options: RecipesShowOptions, as_json: bool) -> None:
        """Show one recipe: its rules, where it runs, and where not and why."""
        from cosmos_export.cli import console
        from cosmos_export.precision.recipe import load_recipe

        recipe = load_recipe(options.name)
        if as_json:
            console.emit_json("recipes-show", {"recipe": _document(recipe)})
        else:
            console.show(*_details(recipe, console.out().width))


def _choose(options: RecipesChooseOptions) -> tuple[Recipe, list[Tried]]:
    from cosmos_export.compiler.plan_checkpoint import subject_of
    from cosmos_export.plan import choose, offered_bytes, parse_workload
    from cosmos_export.sampling import Overrides, resolve_schedule
    from cosmos_export.targets import load_target

    subject, chosen = subject_of(options.checkpoint, options.like)[0], load_target(options.target)
    workloads = [parse_workload(text) for text in options.workloads]
    schedules = [resolve_schedule(subject.sampling, w.mode, Overrides()) for w in workloads]
    return choose(subject, chosen, workloads, schedules, offered_bytes(chosen))


_FITS = {"resident": "all at once", "phases": "in phases", "no": "does not fit", None: ""}


def _tried(chosen: Recipe, tried: list[Tried]) -> Table:
    fastest = min((one.relative_s for one in tried if one.relative_s is not None), default=None)
    none = "No times: the target's rates are not published. Of what fits, the recipe with the most bits is chosen."
    columns = ("recipe", *numbers("weights"), "fits", *numbers("time"), Column("why not", wraps=True))
    table = Table(columns, note="" if fastest is not None else none)
    for one in tried:
        size = "" if one.weights_bytes is None else units.size(one.weights_bytes, 2)
        time = ""
        if one.relative_s is not None and fastest is not None:
            time = units.seconds(one.relative_s, 2) if one.measured else f"{one.relative_s / fastest:.2f} ×"
        mark = " (chosen)" if one.recipe.name == chosen.name else ""
        table.add(one.recipe.name + mark, size, _FITS[one.fit], time, one.refusal)
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


def _table(recipes: list[Recipe]) -> Table:
    from cosmos_export.precision.schemes import UNQUANTIZED

    table = Table(("recipe", Column("title", wraps=True), "schemes", Column("runs on", wraps=True)))
    for recipe in recipes:
        runs = [target for target, reasons in _by_target(recipe).items() if not reasons]
        title = recipe.title + (" (experimental)" if recipe.experimental else "")
        table.add(recipe.name, title, " ".join(recipe.schemes) or UNQUANTIZED, " ".join(runs))
    return table


def _details(recipe: Recipe, width: int) -> list[Table | str]:
    by_target = _by_target(recipe)
    rules = Table(("place", "scheme"))
    for rule in recipe.rules:
        rules.add(rule.place.text, rule.scheme)
    rules.add("everything else", "as in the checkpoint")
    values: list[tuple[str, object]] = [
        ("runs on", ", ".join(target for target, reasons in by_target.items() if not reasons)),
        *(
            (f"not on {target}", f"{scheme}: {reason}")
            for target, reasons in by_target.items()
            for scheme, reason in reasons.items()
        ),
        *([("not chosen for", ", ".join(recipe.not_for))] if recipe.not_for else []),
        *([("warning", recipe.warning)] if recipe.warning else []),
        ("source", list(recipe.source)),
    ]
    title = f"{recipe.name}: {recipe.title}" + (" (experimental)" if recipe.experimental else "")
    summary = textwrap.fill(" ".join(recipe.summary.split()), width)
    return [title, "", summary, rules, "", facts([one for one in values if one[1]], width)]
