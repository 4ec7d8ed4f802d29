"""``cosmos-export cache``: the engines that later builds can take over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_export.cli.verbs import Verbs, require_verb

if TYPE_CHECKING:
    from cosmos_export.compiler.cache import Cache, Entry

_Folder = Annotated[
    Path | None, typer.Option("--cache", help="Its directory; default: $COSMOS_EXPORT_CACHE or ~/.cache.")
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to ``app``."""
    group = Verbs(
        name="cache",
        help="Engines of finished bundles, which a build of the same ones copies.",
        invoke_without_command=True,
        rich_markup_mode=None,
    )
    app.add_typer(group)

    @group.callback()
    def cache(context: typer.Context) -> None:
        require_verb(context)

    @group.command("ls")
    def ls(folder: _Folder = None, as_json: _Json = False) -> None:
        """List the engines that are recorded, and whether each is still where it was."""
        from cosmos_export.cli import console

        entries = _open(folder).entries()
        if as_json:
            console.emit_json({"entries": [_document(entry) for entry in entries]})
        elif entries:
            console.out().print(_table(entries))
        present = [entry for entry in entries if entry.present]
        size = sum(entry.size_bytes for entry in present) / 1e9
        console.verdict(
            f"{len(entries)} engines recorded, {len(present)} present, {size:.2f} GB in their bundles", True
        )

    @group.command("why")
    def why(
        first: Annotated[str, typer.Argument(help="Beginning of a key, as `ls` shows it.")],
        second: Annotated[str | None, typer.Argument(help="Another; default: the nearest of the same name.")] = None,
        folder: _Folder = None,
        as_json: _Json = False,
    ) -> None:
        """Why two engines are not the same one: what they were made from, and where that differs."""
        from cosmos_export.cli import console
        from cosmos_export.compiler.cache import differences, nearest
        from cosmos_export.diagnostics import UserError

        entries = _open(folder).entries()
        one = _entry(first, entries)
        others = [entry for entry in entries if entry.key != one.key]
        other = _entry(second, entries) if second is not None else nearest(one.name, one.components, others)
        if other is None:
            raise UserError("CX485", f"`{one.name}` is recorded once: there is nothing to compare", "give another key")
        differing = differences(one.components, other.components)
        if as_json:
            console.emit_json({"first": _document(one), "second": _document(other), "differ": differing})
        else:
            console.out().print(_comparison(one, other))
        console.verdict(f"{', '.join(differing) or 'nothing'} differ", True)

    @group.command("prune")
    def prune(
        everything: Annotated[bool, typer.Option("--all", help="Forget all of them.")] = False,
        folder: _Folder = None,
        as_json: _Json = False,
    ) -> None:
        """Forget engines whose file is gone or has another size. Bundles are not touched."""
        from cosmos_export.cli import console

        gone = _open(folder).prune(everything)
        if as_json:
            console.emit_json({"forgotten": [_document(entry) for entry in gone]})
        console.verdict(f"{len(gone)} engines forgotten", True)


def _open(folder: Path | None) -> Cache:
    from cosmos_export.compiler.cache import Cache, default_folder

    return Cache(folder or default_folder())


def _entry(beginning: str, entries: list[Entry]) -> Entry:
    from cosmos_export.diagnostics import UserError

    found = [entry for entry in entries if entry.key.startswith(beginning)]
    if len(found) != 1:
        raise UserError("CX485", f"{len(found)} keys begin with `{beginning}`", "`cosmos-export cache ls` shows them")
    return found[0]


def _document(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key, "name": entry.name, "path": entry.path, "size_bytes": entry.size_bytes,
        "sha256": entry.sha256, "created": entry.created, "present": entry.present,
        "components": dict(entry.components),
    }  # fmt: skip


def _table(entries: list[Entry]) -> Any:
    from rich.table import Table

    table = Table("key", "engine", "target", "size", "built", "in", box=None)
    for entry in entries:
        place = entry.path if entry.present else f"{entry.path} (gone)"
        size = f"{entry.size_bytes / 1e6:,.1f} MB"
        table.add_row(entry.key[:12], entry.name, entry.components.get("target", ""), size, entry.created, place)
    return table


def _comparison(one: Entry, other: Entry) -> Any:
    from rich.table import Table

    table = Table("", one.key[:12], other.key[:12], "", box=None)
    for name in {**one.components, **other.components}:
        values = [entry.components.get(name, "–") for entry in (one, other)]
        table.add_row(name, *(value[:40] for value in values), "same" if values[0] == values[1] else "DIFFERS")
    return table
