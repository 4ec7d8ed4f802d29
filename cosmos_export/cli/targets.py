"""``cosmos-export targets``: the GPUs engines can be built for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosmos_export import units
from cosmos_export.cli.tables import Column, Table, facts, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import TargetsOptions

if TYPE_CHECKING:
    from cosmos_export.targets import Target


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "targets",
        TargetsOptions,
        "cosmos-export targets",
        "cosmos-export targets h100",
    )
    def targets(options: TargetsOptions, as_json: bool) -> None:
        """List the targets: compute capability, memory, bandwidth, peak rates, precisions, backend."""
        from cosmos_export.cli import console
        from cosmos_export.targets import load_target, target_names

        name = options.name
        chosen = [load_target(one) for one in ([name] if name else target_names())]
        if as_json:
            console.emit_json("targets", {"targets": [_document(target) for target in chosen]})
        elif name:
            console.show(facts(_details(chosen[0]), console.out().width))
        else:
            console.show(_table(chosen))


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


def _table(targets: list[Target]) -> Table:
    from cosmos_export.precision.schemes import SCHEMES

    kinds = tuple(dict.fromkeys(scheme.computes for scheme in SCHEMES.values()))
    columns = ("target", "CC", *numbers("memory", "GiB/s", *kinds), Column("backends", wraps=True))
    note = f"CC: compute capability; {', '.join(kinds)}: dense TFLOP/s with FP32 accumulation; –: no published figure"
    table = Table(columns, note=note)
    for target in targets:
        rates = (target.peak_flops.get(kind) for kind in kinds)
        table.add(
            target.name,
            target.compute_capability,
            None if target.memory_bytes is None else units.size(target.memory_bytes),
            _scaled(target.bandwidth_bytes_per_s, 2**30),
            *(_scaled(rate, 1e12) for rate in rates),
            ", ".join((target.backend, *target.other_backends)),
        )
    return table


def _details(target: Target) -> list[tuple[str, object]]:
    shared = " (shared with the CPU)" if target.unified_memory else ""
    memory = "–" if target.memory_bytes is None else units.size(target.memory_bytes)
    return [
        ("target", f"{target.name}: {target.title}"),
        ("compute capability", target.compute_capability or "–"),
        ("backends", ", ".join((target.backend, *target.other_backends))),
        ("memory", memory + shared),
        ("bandwidth", f"{_scaled(target.bandwidth_bytes_per_s, 2**30) or '–'} GiB/s"),
        *((kind, f"{_scaled(rate, 1e12)} TFLOP/s dense") for kind, rate in target.peak_flops.items()),
        ("precisions", " ".join(target.precisions)),
        *((f"with {backend}", " ".join(schemes)) for backend, schemes in target.also.items()),
        *(("refused", f"{scheme}: {reason}") for scheme, reason in target.refused.items()),
        *(("trap", trap) for trap in target.traps),
        *(("source", source) for source in target.source),
    ]


def _scaled(value: float | None, unit: float) -> str | None:
    return None if value is None else f"{value / unit:,.0f}"
