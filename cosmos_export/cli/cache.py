"""``cosmos-export cache``: the engines that later builds can take over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cosmos_export import units
from cosmos_export.cli import verbs
from cosmos_export.cli.tables import Table, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import CacheOptions, CachePruneOptions, CacheWhyOptions

if TYPE_CHECKING:
    from cosmos_export.compiler.cache import Cache, Entry


def register(app: Verbs) -> None:
    """Add the verbs to ``app``."""
    group = verbs.group("cache", "Engines of finished bundles and captured graphs, which later builds take over.")
    app.add_typer(group)

    @group.callback()
    def cache(context: typer.Context) -> None:
        verbs.require_verb(context)

    @group.verb(
        "ls",
        CacheOptions,
        "cosmos-export cache ls",
        "cosmos-export cache ls --cache /data/engines --json",
    )
    def ls(options: CacheOptions, as_json: bool) -> None:
        """List the engines and graphs that are recorded, and whether each is still where it was."""
        from cosmos_export.cli import console

        entries = _entries(options.cache)
        if as_json:
            console.emit_json("cache-ls", {"entries": [_document(entry) for entry in entries]})
        elif entries:
            console.show(_table(entries))
        present = [entry for entry in entries if entry.present]
        graphs = [entry for entry in entries if entry.kind == "graphs"]
        size = units.size(sum(entry.size_bytes for entry in present if entry.kind == "engine"))
        engines = len(entries) - len(graphs)
        console.verdict(
            f"{engines} engines and {len(graphs)} captures recorded, {len(present)} of them present, {size} in bundles",
            True,
        )

    @group.verb(
        "why",
        CacheWhyOptions,
        "cosmos-export cache why 3f2a",
        "cosmos-export cache why 3f2a 9b01",
    )
    def why(options: CacheWhyOptions, as_json: bool) -> None:
        """Show why two engines or captures are not the same: what they were made from, and where that differs."""
        from cosmos_export.cli import console
        from cosmos_export.compiler.cache import differences, nearest
        from cosmos_export.diagnostics import UserError

        entries, second = _entries(options.cache), options.second
        one = _entry(options.first, entries)
        others = [entry for entry in entries if entry.key != one.key]
        other = _entry(second, entries) if second is not None else nearest(one.name, one.components, others)
        if other is None:
            raise UserError("CX485", f"`{one.name}` is recorded once: there is nothing to compare", "give another key")
        differing = differences(one.components, other.components)
        if as_json:
            console.emit_json("cache-why", {"first": _document(one), "second": _document(other), "differ": differing})
        else:
            console.show(_comparison(one, other))
        console.verdict(f"{', '.join(differing) or 'nothing'} differ", True)

    @group.verb(
        "prune",
        CachePruneOptions,
        "cosmos-export cache prune",
        "cosmos-export cache prune --all",
    )
    def prune(options: CachePruneOptions, as_json: bool) -> None:
        """Forget engines and graphs whose file is gone or has another size. Bundles are not touched."""
        from cosmos_export.cli import console

        gone = [entry for one in _caches(options.cache) for entry in one.prune(options.everything)]
        if as_json:
            console.emit_json("cache-prune", {"forgotten": [_document(entry) for entry in gone]})
        console.verdict(f"{len(gone)} entries forgotten", True)


def _caches(folder: Path | None) -> list[Cache]:
    """The cache in ``folder``; by default that of engines and, if it is another one, that of graphs."""
    from cosmos_export.compiler.cache import Cache, default_folder, default_graphs_folder

    folders = [folder] if folder is not None else [default_folder(), default_graphs_folder()]
    return [Cache(one) for one in dict.fromkeys(folders)]


def _entries(folder: Path | None) -> list[Entry]:
    return [entry for one in _caches(folder) for entry in one.entries()]


def _entry(beginning: str, entries: list[Entry]) -> Entry:
    from cosmos_export.diagnostics import UserError

    found = [entry for entry in entries if entry.key.startswith(beginning)]
    if len(found) != 1:
        raise UserError("CX485", f"{len(found)} keys begin with `{beginning}`", "`cosmos-export cache ls` shows them")
    return found[0]


def _document(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key, "kind": entry.kind, "name": entry.name, "path": entry.path, "size_bytes": entry.size_bytes,
        "sha256": entry.sha256, "created": entry.created, "present": entry.present,
        "components": dict(entry.components),
    }  # fmt: skip


def _table(entries: list[Entry]) -> Table:
    table = Table(("key", "what", "target", *numbers("size"), "made", "in"), head=2)
    for entry in entries:
        place = entry.path if entry.present else f"{entry.path} (gone)"
        target, size = entry.components.get("target", ""), units.size(entry.size_bytes)
        table.add(entry.key[:12], entry.name, target, size, entry.created, place)
    return table


def _comparison(one: Entry, other: Entry) -> Table:
    table = Table(("made from", one.key[:12], other.key[:12], "is"))
    for name in {**one.components, **other.components}:
        values = [entry.components.get(name, "–") for entry in (one, other)]
        table.add(name, *values, "same" if values[0] == values[1] else "DIFFERENT")
    return table
