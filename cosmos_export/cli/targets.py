"""``cosmos-export targets``: the GPUs engines can be built for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cosmos_export.targets import Target


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("targets")
    def targets(
        name: Annotated[str | None, typer.Argument(help="Show this target only, with its traps and sources.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """List the targets: compute capability, memory, bandwidth, peak rates, precisions, backend."""
        from cosmos_export.cli import console
        from cosmos_export.targets import load_target, target_names

        chosen = [load_target(one) for one in ([name] if name else target_names())]
        if as_json:
            console.emit_json({"targets": [_document(target) for target in chosen]})
        elif name:
            console.out().print(_details(chosen[0]))
        else:
            console.out().print(_table(chosen))


def _document(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "title": target.title,
        "backend": target.backend,
        "other_backends": list(target.other_backends),
        "compute_capability": target.compute_capability,
        "memory_bytes": target.memory_bytes,
        "bandwidth_bytes_per_s": target.bandwidth_bytes_per_s,
        "unified_memory": target.unified_memory,
        "peak_flops": dict(target.peak_flops),
        "precisions": list(target.precisions),
        "also": {backend: list(schemes) for backend, schemes in target.also.items()},
        "refused": dict(target.refused),
        "traps": list(target.traps),
        "source": list(target.source),
    }


def _table(targets: list[Target]) -> Any:
    from rich import box
    from rich.table import Table

    from cosmos_export.precision.schemes import SCHEMES

    kinds = tuple(dict.fromkeys(scheme.computes for scheme in SCHEMES.values()))
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("target", "CC", "backend"):
        table.add_column(column, no_wrap=True)
    for column in ("GB", "GB/s", *kinds):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("precisions")
    for target in targets:
        rates = (target.peak_flops.get(kind) for kind in kinds)
        table.add_row(
            target.name,
            target.compute_capability or "–",
            ", ".join((target.backend, *target.other_backends)),
            _scaled(target.memory_bytes, 1e9),
            _scaled(target.bandwidth_bytes_per_s, 1e9),
            *(_scaled(rate, 1e12) for rate in rates),
            " ".join((*target.precisions, *(f"{s} ({b})" for b, own in target.also.items() for s in own))),
        )
    table.caption = f"{', '.join(kinds)}: dense TFLOP/s, FP32 accumulation; – where the sources give no figure"
    return table


def _details(target: Target) -> str:
    shared = " (shared)" if target.unified_memory else ""
    lines = [
        f"{target.name}: {target.title}",
        f"  compute capability  {target.compute_capability or '–'}",
        f"  backend             {', '.join((target.backend, *target.other_backends))}",
        f"  memory              {_scaled(target.memory_bytes, 1e9)} GB{shared}",
        f"  bandwidth           {_scaled(target.bandwidth_bytes_per_s, 1e9)} GB/s",
        *(f"  {kind:<18}  {_scaled(rate, 1e12)} TFLOP/s dense" for kind, rate in target.peak_flops.items()),
        f"  precisions          {' '.join(target.precisions)}",
        *(f"  with {backend:<13}  {' '.join(schemes)}" for backend, schemes in target.also.items()),
        *(f"  refused: {scheme}: {reason}" for scheme, reason in target.refused.items()),
        *(f"  trap: {trap}" for trap in target.traps),
        *(f"  source: {source}" for source in target.source),
    ]
    return "\n".join(lines)


def _scaled(value: float | None, unit: float) -> str:
    return "–" if value is None else f"{value / unit:,.0f}"
