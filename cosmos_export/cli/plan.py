"""``cosmos-export plan``: what a build and its bundle would cost, before there is either."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from cosmos_export import units
from cosmos_export.cli.tables import Table, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.options import PlanOptions

if TYPE_CHECKING:
    from cosmos_export.plan import Estimate
    from cosmos_export.plan.estimate import Load


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "plan",
        PlanOptions,
        "cosmos-export plan Cosmos3-Nano --target rtx-pro-6000,l40s --workload t2v-480p-189f",
        "cosmos-export plan --like super --target h200 --recipe fp8 --workload t2i-720p --workload i2v-720p-121f",
    )
    def plan(options: PlanOptions, as_json: bool) -> None:
        """Predict what a build and its bundle cost, before there is either: sizes, memory, disk, time, and what fits.

        Nothing is built and nothing is run. The exit code is 1 where nothing fits.
        """
        from cosmos_export.cli import console
        from cosmos_export.compiler.plan_checkpoint import plan_checkpoint

        found = plan_checkpoint(options)
        if as_json:
            console.emit_json("plan", found.to_json())
        else:
            console.show(*_report(found))
        console.verdict(_verdict(found), found.something_fits)
        if not found.something_fits:
            raise typer.Exit(1)


def _report(found: Estimate) -> list[Table | str]:
    times = [_times(found)] if any(fit.latency is not None for fit in found.fits) else []
    return [_components(found), _builds(found), _loads(found), _memory(found), *times, *_hints(found)]


def _components(found: Estimate) -> Table:
    columns = ("component", *numbers("parameters", "weights", "engine", "activations"), "in")
    table = Table(columns, f"Engines, {found.recipe}")
    for part in found.components:
        pieces = " or ".join(str(count) for count in sorted({len(form) for form in part.forms}))
        table.add(
            part.name, units.count(part.parameters), _size(part.weight_bytes),
            _size(part.engine_bytes) + (f" in {pieces}" if part.cut else ""),
            _size(part.activation_bytes), part.scheme,
        )  # fmt: skip
    return table


def _builds(found: Estimate) -> Table:
    table = Table(("target", *numbers("peak host memory"), "for", *numbers("disk", "time")), "Build")
    for name, host in found.builds.items():
        low, high = (f"{seconds / 60:.0f}" for seconds in host.seconds)
        span = f"{low} to {high} min" if low != high else f"{low} min"
        table.add(name, _size(host.peak_anonymous_bytes), host.largest or None, _size(host.disk_bytes), span)
    return table


def _loads(found: Estimate) -> Table:
    columns = numbers("rows", "prompt tokens", "steps", "passes", "linear", "attention", "reasoner", "K/V")
    table = Table(("workload", *columns), "Work in TFLOP: linear and attention per step, reasoner per request")
    for load in found.loads:
        prompts = f"{load.prompt_tokens}+{load.negative_tokens}" if load.negative_tokens else str(load.prompt_tokens)
        table.add(
            load.workload, f"{load.rows:,}", prompts, load.steps, load.passes,
            _tera(load.step.linear), _tera(load.step.attention), _tera(load.reasoner.total),
            _size(load.device.cache_bytes),
        )  # fmt: skip
    return table


def _memory(found: Estimate) -> Table:
    columns = ("target", "workload", *numbers("memory", "all at once", "in phases"), "verdict")
    table = Table(columns, "Memory of the device", head=2)
    for fit in found.fits:
        memory = None if fit.memory_bytes is None else _size(fit.memory_bytes)
        table.add(fit.target, fit.workload, memory, _size(fit.resident_bytes), _size(fit.phased_bytes), fit.verdict)
    return table


def _times(found: Estimate) -> Table:
    columns = numbers("reasoner", "linear", "attention", "codecs", "total")
    table = Table(("target", "workload", *columns), "Predicted time of a request", head=2)
    for fit in found.fits:
        if fit.latency is not None:
            parts = (fit.latency.reasoner_s, fit.latency.linear_s, fit.latency.attention_s, fit.latency.codec_s)
            cells = (units.seconds(seconds, 2) for seconds in (*parts, fit.latency.total_s))
            table.add(fit.target, fit.workload, *cells)
    return table


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


def _size(size_bytes: int) -> str:
    return units.size(size_bytes, 2)


def _tera(operations: float) -> str:
    return units.number(operations / 1e12, 2)
