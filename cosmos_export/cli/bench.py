"""``cosmos-export bench``: how fast a bundle or a published geometry is, beside the published times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_export import units
from cosmos_export.cli.tables import Table, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.option_fields import described
from cosmos_export.options import WORKLOAD
from cosmos_export.verb_options import BenchOptions

if TYPE_CHECKING:
    from cosmos_export.bench.bundle import BundleRequest
    from cosmos_export.bench.measure import GeometryRequest
    from cosmos_export.bench.result import Measurement


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "bench",
        BenchOptions,
        "cosmos-export bench nano.bundle --workload t2v -o nano.json",
        "cosmos-export bench --geometry nano --workload t2v-480p-189f --recipe fp8",
        "cosmos-export bench compare before.json after.json",
    )
    def bench(options: BenchOptions, as_json: bool) -> None:
        """Measure requests: every component with median and percentiles, card and versions, beside published times."""
        from cosmos_export.cli import console
        from cosmos_export.diagnostics import UserError

        if options.what[:1] == ("compare",):
            _compare(options, as_json)
            return
        if len(options.what) != (0 if options.geometry is not None else 1):
            raise UserError("CX672", "bench takes one bundle, or --geometry, or `compare A B`", "give one of them")
        from cosmos_export.bench.bundle import measure_bundle
        from cosmos_export.bench.measure import measure_geometry
        from cosmos_export.bench.result import require_output, write

        output = options.output
        if output is not None:
            require_output(output, options.force)
        _require_read(options)
        command = " ".join(["cosmos-export", *sys.argv[1:]])
        if options.geometry is not None:
            found = measure_geometry(_geometry(options, options.geometry), console.progress(), command)
        else:
            found = measure_bundle(_bundle(options), console.progress(), command)
        if found.verdicts is not None:
            console.log_open(found.verdicts)
        document = found.document()
        if output is not None:
            write(document, output)
        if as_json:
            console.emit_json("bench", document)
        else:
            _print(found, document)
        forward = f", {units.seconds(found.forward_s)} per forward" if found.forward_s is not None else ""
        extrapolated = f" ({found.extrapolated})" if found.extrapolated else ""
        where = found.card or found.device
        dry = "dry run, no measurement: " if found.dry_run else ""
        console.verdict(
            f"{dry}{found.workload} on {where}: {units.seconds(found.request_s)}{forward}{extrapolated}", True
        )


def _require_read(options: BenchOptions) -> None:
    """UserError CX672 for options of a bundle where a geometry is measured, and the reverse."""
    from cosmos_export.diagnostics import UserError

    other = "bundle" if options.geometry is not None else "geometry"
    unread = [
        option.flags[0]
        for option in described(BenchOptions)
        if option.cli.group == f"For a {other}" and getattr(options, option.name) != option.default
    ]
    if unread:
        raise UserError("CX672", f"{', '.join(unread)} applies only to a {other}", "leave it out")


def _geometry(options: BenchOptions, size: str) -> GeometryRequest:
    from cosmos_export.bench.measure import GeometryRequest
    from cosmos_export.precision.recipe import DEFAULT

    return GeometryRequest(
        size,
        options.workload or WORKLOAD,
        options.recipe or DEFAULT,
        options.device or ("cpu" if options.dry_run else "cuda"),
        options.runs,
        options.warm_up,
        graphs=options.graphs,
        attention=options.attention,
        places=options.places,
        kernels=frozenset(options.kernels),
        compiled=not (options.eager or options.dry_run),
        baselines=options.baselines,
        dry_run=options.dry_run,
    )


def _bundle(options: BenchOptions) -> BundleRequest:
    from cosmos_export.bench.bundle import BundleRequest

    return BundleRequest(
        Path(options.what[0]),
        options.workload,
        options.profile,
        options.prompt_tokens,
        options.backend,
        options.device,
        options.runs,
        options.warm_up,
        options.dry_run,
    )


def _print(found: Measurement, document: dict[str, Any]) -> None:
    from cosmos_export.cli import console

    title = f"{found.subject}: {found.workload}, {found.recipe}, {found.backend} on {found.card or found.device}"
    table = Table(("component", *numbers("calls", "median", "p5", "p95", "together")), title)
    for c in found.components:
        cells = (c.median_s, c.percentile_s(0.05), c.percentile_s(0.95), c.total_s)
        table.add(c.name, c.calls, *(units.seconds(value) for value in cells))
    parts: list[Table | str] = [
        table,
        "",
        f"request {units.seconds(found.request_s)}: {found.covers}; {found.forwards} forwards in {found.steps} steps",
    ]
    if document["baselines"]:
        parts.append(_baselines(document["baselines"]))
    if document["during"]:
        clock, power = document["during"]["sm_clock_mhz"], document["during"]["power_w"]
        parts.append(f"meanwhile: {_span(clock, 'MHz')}, {_span(power, 'W')}")
    parts += [f"not compared with {line}" for line in document["baselines_left_out"]]
    if document["published"]:
        columns = ("published by", "recipe", "card", *numbers("time", "measured / published"), "covers", "step cache")
        table = Table(columns, head=3)
        for cell in document["published"]:
            share = None if found.dry_run else f"{found.request_s / cell['seconds']:.2f}"
            row = (cell["engine"], cell["recipe"], cell["gpu"], units.seconds(cell["seconds"]), share, cell["measures"])
            table.add(*row, cell["step_cache"])
        parts.append(table)
    console.show(*parts)


def _span(found: dict[str, float] | None, unit: str) -> str:
    return f"{found['median']:.0f} {unit} ({found['min']:.0f} to {found['max']:.0f})" if found else f"{unit} unknown"


def _baselines(rows: list[dict[str, Any]]) -> Table:
    columns = numbers("request", "measured / it", "forward", "measured / its forward")
    table = Table(("in the same run", "recipe", *columns), head=2)
    for row in rows:
        forward, share = row["forward_s"], row["ours_over_forward"]
        both = forward is not None and share is not None
        cells = [units.seconds(forward), f"{share:.2f}"] if both else [None, None]
        recipe = row["recipe"] + ("" if row["same_precision"] else ", another precision")
        table.add(row["name"], recipe, units.seconds(row["request_s"]), f"{row['ours_over_request']:.2f}", *cells)
    return table


def _compare(options: BenchOptions, as_json: bool) -> None:
    from cosmos_export.bench.result import compare, incomparable, read_measurement, regressions
    from cosmos_export.cli import console
    from cosmos_export.diagnostics import FindingError, UserError

    paths, allowed = options.what[1:], options.max_regression
    if len(paths) != 2:
        raise UserError("CX672", f"compare takes two measurements, {len(paths)} given", "`bench compare A.json B.json`")
    before, after = (read_measurement(Path(path)) for path in paths)
    apart = incomparable(before, after)
    if apart and not options.allow_unlike:
        raise UserError(
            "CX674", f"these results are not comparable: {'; '.join(apart)}", "`--allow-unlike` compares them"
        )
    ratios, unlike = compare(before, after)
    slower = regressions(ratios, allowed)
    if as_json:
        rows = [{"name": r.name, "before_s": r.before_s, "after_s": r.after_s, "ratio": r.ratio} for r in ratios]
        console.emit_json("bench-compare", {"ratios": rows, "unlike": unlike, "regressions": [r.name for r in slower]})
    else:
        table = Table(("quantity", *numbers(paths[0], paths[1], "ratio")))
        for r in ratios:
            table.add(r.name, units.seconds(r.before_s), units.seconds(r.after_s), f"{r.ratio:.3f}")
        console.show(table, *(f"not alike: {line}" for line in unlike))
    if slower:
        worst = ", ".join(f"{r.name} {r.ratio - 1:+.1%}" for r in slower)
        raise FindingError("CX673", f"slower than allowed ({allowed:.0%}): {worst}", "measure both on one warm machine")
    console.verdict(f"{len(ratios)} quantities compared, none slower by more than {allowed:.0%}", True)
