"""``cosmos-export bench``: how fast a bundle or a published geometry is, beside the published times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cosmos_export import units
from cosmos_export.cli.options import Json, grouped
from cosmos_export.cli.tables import Table, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.kernels.description import KERNELS
from cosmos_export.options import WORKLOAD

if TYPE_CHECKING:
    from cosmos_export.bench.result import Measurement


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.command(
        "bench",
        "cosmos-export bench nano.bundle --workload t2v -o nano.json",
        "cosmos-export bench --geometry nano --workload t2v-480p-189f --recipe fp8",
        "cosmos-export bench compare before.json after.json",
    )
    @grouped(
        **dict.fromkeys(("profile", "prompt_tokens", "backend"), "For a bundle"),
        **dict.fromkeys(
            ("geometry", "recipe", "places", "attention", "kernels", "graphs", "eager", "baselines"), "For a geometry"
        ),
        **dict.fromkeys(("workload", "device", "runs", "warm_up", "dry_run"), "Measuring"),
        **dict.fromkeys(("allow_unlike", "max_regression"), "For compare"),
        **dict.fromkeys(("output", "force"), "Output"),
    )
    def bench(
        what: Annotated[
            list[str] | None,
            typer.Argument(
                help="A bundle; or `compare A.json B.json`; nothing with --geometry.",
                show_default=False,
                metavar="BUNDLE | compare A B",
            ),
        ] = None,
        geometry: Annotated[
            str | None,
            typer.Option(
                metavar="nano|super|edge", help="Measure random weights of the true size. No checkpoint is needed."
            ),
        ] = None,
        workload: Annotated[
            str | None,
            typer.Option(
                metavar="WORKLOAD",
                help="Request. For a geometry: t2i-720p, t2v-480p-189f, policy-droid, … as `plan` has them, or "
                "reasoner. For a bundle: a mode of `run`, av (video with sound) or reasoner, in its profile.",
                show_default=f"{WORKLOAD}; for a bundle what it was built for",
            ),
        ] = None,
        recipe: Annotated[
            str | None,
            typer.Option(metavar="RECIPE", help="Recipe, as `build` takes it.", show_default="bf16"),
        ] = None,
        places: Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="PLACE=SCHEME",
                help="Change of the recipe's rules, as in `build`. Repeat it for several.",
            ),
        ] = None,
        profile: Annotated[
            str | None, typer.Option(metavar="PROFILE", help="One of its profiles. Default: the first.")
        ] = None,
        prompt_tokens: Annotated[
            str | None, typer.Option(metavar="N[:NEGATIVE]", help="Tokens of its prompts. Default: the profile's.")
        ] = None,
        backend: Annotated[
            str | None, typer.Option(metavar="BACKEND", help="Backend. Default: the one it was built for.")
        ] = None,
        device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cuda, cuda:N or cpu.")] = None,
        attention: Annotated[
            Literal["sdpa", "triton"] | None, typer.Option(help="Attention where the recipe does not have it in FP8.")
        ] = None,
        kernels: Annotated[
            str | None,
            typer.Option(
                metavar="NAMES",
                help="This project's kernels in place of the compiler's code, with commas between them: "
                f"{', '.join(KERNELS)}.",
            ),
        ] = None,
        graphs: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Graphs of benchmarks/geometry.py that were captured elsewhere."),
        ] = None,
        eager: Annotated[
            bool, typer.Option("--eager", help="Run one operation after another, for comparison.")
        ] = False,
        baselines: Annotated[
            bool,
            typer.Option("--baselines", help="Measure diffusers too, eager and regionally compiled, in the same run."),
        ] = False,
        runs: Annotated[int, typer.Option(metavar="N", help="Measured runs. The median is taken.")] = 5,
        warm_up: Annotated[int, typer.Option(metavar="N", help="Runs before them, after the one that compiles.")] = 1,
        allow_unlike: Annotated[
            bool, typer.Option("--allow-unlike", help="Compare different models, workloads or dry runs too.")
        ] = False,
        max_regression: Annotated[
            float, typer.Option(metavar="SHARE", help="Share by which B may be slower than A.")
        ] = 0.05,
        dry_run: Annotated[
            bool,
            typer.Option(
                "--dry-run",
                help="Run a tiny geometry on the CPU, or a bundle too few times for a measurement, to try the command.",
            ),
        ] = False,
        output: Annotated[
            Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the measurement as JSON.")
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing measurement.")] = False,
        as_json: Json = False,
    ) -> None:
        """Measure requests: every component with median and percentiles, card and versions, beside published times."""
        from cosmos_export.cli import console
        from cosmos_export.diagnostics import UserError

        arguments = what or []
        if arguments[:1] == ["compare"]:
            _compare(arguments[1:], max_regression, allow_unlike, as_json)
            return
        if len(arguments) != (0 if geometry is not None else 1):
            raise UserError("CX672", "bench takes one bundle, or --geometry, or `compare A B`", "give one of them")
        from cosmos_export.bench.bundle import BundleRequest, measure_bundle
        from cosmos_export.bench.measure import GeometryRequest, measure_geometry
        from cosmos_export.bench.result import require_output, write

        if output is not None:
            require_output(output, force)
        of_geometry = {
            "--recipe": recipe, "--set": places, "--attention": attention, "--kernels": kernels, "--graphs": graphs,
            "--eager": eager, "--baselines": baselines,
        }  # fmt: skip
        of_bundle = {"--profile": profile, "--prompt-tokens": prompt_tokens, "--backend": backend}
        others, whose = (of_bundle, "a bundle") if geometry is not None else (of_geometry, "a geometry")
        unread = [option for option, value in others.items() if value]
        if unread:
            raise UserError("CX672", f"{', '.join(unread)} is of {whose}", "leave it out")
        command = " ".join(["cosmos-export", *sys.argv[1:]])
        if geometry is not None:
            where = device or ("cpu" if dry_run else "cuda")
            asked = GeometryRequest(
                geometry, workload or WORKLOAD, recipe or "bf16", where, runs, warm_up,
                graphs=graphs, attention=attention, places=tuple(places or ()),
                kernels=frozenset(filter(None, (kernels or "").split(","))), compiled=not (eager or dry_run),
                baselines=baselines, dry_run=dry_run,
            )  # fmt: skip
            found = measure_geometry(asked, console.progress(), command)
        else:
            tokens = _tokens(prompt_tokens)
            bundle = BundleRequest(
                Path(arguments[0]), workload, profile, tokens, backend, device, runs, warm_up, dry_run
            )  # fmt: skip
            found = measure_bundle(bundle, console.progress(), command)
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


def _tokens(text: str | None) -> tuple[int, int] | None:
    from cosmos_export.diagnostics import UserError

    if text is None:
        return None
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError("CX672", f"prompt tokens `{text}` are not N or N:NEGATIVE", "for example 1615:2863")
    return int(parts[0]), int(parts[-1])


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


def _compare(paths: list[str], allowed: float, allow_unlike: bool, as_json: bool) -> None:
    from cosmos_export.bench.result import compare, incomparable, read_measurement, regressions
    from cosmos_export.cli import console
    from cosmos_export.diagnostics import FindingError, UserError

    if len(paths) != 2:
        raise UserError("CX672", f"compare takes two measurements, {len(paths)} given", "`bench compare A.json B.json`")
    before, after = (read_measurement(Path(path)) for path in paths)
    apart = incomparable(before, after)
    if apart and not allow_unlike:
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
