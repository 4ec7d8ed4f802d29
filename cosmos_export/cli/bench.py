"""``cosmos-export bench``: how fast a bundle or a published geometry is, beside the published times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_export.kernels.description import KERNELS

if TYPE_CHECKING:
    from cosmos_export.bench.result import Measurement


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command("bench")
    def bench(
        what: Annotated[
            list[str] | None,
            typer.Argument(help="A bundle; or `compare A.json B.json`; nothing with --geometry.", show_default=False),
        ] = None,
        geometry: Annotated[
            str | None, typer.Option(help="nano, super or edge: random weights of the true size, no checkpoint.")
        ] = None,
        workload: Annotated[
            str | None,
            typer.Option(
                help="Of a geometry: t2i-720p, t2v-480p-189f, policy-droid, … as `plan` has them, or reasoner. Of a "
                "bundle: a mode of `run`, av (video with sound) or reasoner, at the sizes of its profile.",
                show_default="t2v-480p-189f; of a bundle what it was built for",
            ),
        ] = None,
        recipe: Annotated[
            str | None,
            typer.Option(
                help="Of a geometry: a recipe as `build` takes it (`cosmos-export recipes ls`).", show_default="bf16"
            ),
        ] = None,
        places: Annotated[
            list[str] | None,
            typer.Option("--set", help="Of a geometry: PLACE=SCHEME, a change to the recipe as in `build`; repeat it."),
        ] = None,
        profile: Annotated[
            str | None, typer.Option(help="Of a bundle: one of its profiles; default: the first.")
        ] = None,
        prompt_tokens: Annotated[
            str | None, typer.Option(help="N or N:NEGATIVE tokens of a bundle's prompts; default: the profile's.")
        ] = None,
        backend: Annotated[str | None, typer.Option(help="Of a bundle: another backend than it was built for.")] = None,
        device: Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu.")] = None,
        attention: Annotated[
            str | None, typer.Option(help="Of a geometry: sdpa or triton, where the recipe has it not in FP8.")
        ] = None,
        kernels: Annotated[
            str | None,
            typer.Option(
                help="For a geometry: this project's kernels in place of the compiler's code, of "
                f"{', '.join(KERNELS)}; several with commas."
            ),
        ] = None,
        graphs: Annotated[
            Path | None, typer.Option(help="Graphs of the geometry, from benchmarks/geometry.py, captured elsewhere.")
        ] = None,
        eager: Annotated[
            bool, typer.Option("--eager", help="Of a geometry: one operation after another, for comparison.")
        ] = False,
        baselines: Annotated[
            bool,
            typer.Option(
                "--baselines", help="Of a geometry: also diffusers, eager and regionally compiled, in the same run."
            ),
        ] = False,
        runs: Annotated[int, typer.Option(help="Measured runs; a median is taken.")] = 5,
        warm_up: Annotated[int, typer.Option(help="Runs before them, after the one that compiles.")] = 1,
        allow_unlike: Annotated[
            bool, typer.Option("--allow-unlike", help="compare: also of different models, workloads or dry runs.")
        ] = False,
        max_regression: Annotated[float, typer.Option(help="compare: share by which B may be slower than A.")] = 0.05,
        dry_run: Annotated[
            bool,
            typer.Option(
                "--dry-run", help="A geometry of tiny size on the CPU; of a bundle fewer runs than say anything."
            ),
        ] = False,
        output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the measurement as JSON.")] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing measurement.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Measure requests: every component, the median and percentiles, what card and versions, published times."""
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
                geometry, workload or "t2v-480p-189f", recipe or "bf16", where, runs, warm_up,
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
            console.emit_json(document)
        else:
            _print(found, document)
        forward = f", {found.forward_s:.4g} s a forward" if found.forward_s is not None else ""
        extrapolated = f" ({found.extrapolated})" if found.extrapolated else ""
        where = found.card or found.device
        dry = "dry run, no measurement: " if found.dry_run else ""
        console.verdict(f"{dry}{found.workload} on {where}: {found.request_s:.4g} s{forward}{extrapolated}", True)


def _tokens(text: str | None) -> tuple[int, int] | None:
    from cosmos_export.diagnostics import UserError

    if text is None:
        return None
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError("CX672", f"prompt tokens `{text}` are not N or N:NEGATIVE", "for example 1615:2863")
    return int(parts[0]), int(parts[-1])


def _print(found: Measurement, document: dict[str, Any]) -> None:
    from rich.table import Table

    from cosmos_export.cli import console

    out = console.out()
    table = Table("component", "calls", "median", "p5", "p95", "together", box=None, title_justify="left")
    table.title = f"{found.subject}: {found.workload}, {found.recipe}, {found.backend} on {found.card or found.device}"
    for c in found.components:
        cells = (c.median_s, c.percentile_s(0.05), c.percentile_s(0.95), c.total_s)
        table.add_row(c.name, str(c.calls), *(f"{1e3 * value:.2f} ms" for value in cells))
    out.print(table)
    out.print(f"\nrequest {found.request_s:.4g} s: {found.covers}; {found.forwards} forwards in {found.steps} steps")
    if document["baselines"]:
        out.print(_baselines(document["baselines"]))
    if document["during"]:
        clock, power = document["during"]["sm_clock_mhz"], document["during"]["power_w"]
        out.print(f"meanwhile: {_span(clock, 'MHz')}, {_span(power, 'W')}")
    for line in document["baselines_left_out"]:
        out.print(f"not compared with {line}")
    if document["published"]:
        table = Table("published by", "recipe", "card", "seconds", "ours over it", "covers", "step cache", box=None)
        for cell in document["published"]:
            share = "–" if found.dry_run else f"{found.request_s / cell['seconds']:.2f}"
            row = (cell["engine"], cell["recipe"], cell["gpu"], f"{cell['seconds']:g}", share, cell["measures"])
            table.add_row(*row, cell["step_cache"])
        out.print(table)


def _span(found: dict[str, float] | None, unit: str) -> str:
    return f"{found['median']:.0f} {unit} ({found['min']:.0f} to {found['max']:.0f})" if found else f"{unit} unknown"


def _baselines(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("in the same run", "recipe", "request", "ours over it", "forward", "ours over it", box=None)
    for row in rows:
        forward, share = row["forward_s"], row["ours_over_forward"]
        cells = [f"{1e3 * forward:.2f} ms", f"{share:.2f}"] if forward is not None and share is not None else ["–", "–"]
        recipe = row["recipe"] + ("" if row["same_precision"] else ", not ours")
        table.add_row(row["name"], recipe, f"{row['request_s']:.4g} s", f"{row['ours_over_request']:.2f}", *cells)
    return table


def _compare(paths: list[str], allowed: float, allow_unlike: bool, as_json: bool) -> None:
    from rich.table import Table

    from cosmos_export.bench.result import compare, incomparable, read_measurement, regressions
    from cosmos_export.cli import console
    from cosmos_export.diagnostics import FindingError, UserError

    if len(paths) != 2:
        raise UserError("CX672", f"compare takes two measurements, {len(paths)} given", "`bench compare A.json B.json`")
    before, after = (read_measurement(Path(path)) for path in paths)
    apart = incomparable(before, after)
    if apart and not allow_unlike:
        raise UserError(
            "CX674", f"these say nothing of each other: {'; '.join(apart)}", "`--allow-unlike` compares them"
        )
    ratios, unlike = compare(before, after)
    slower = regressions(ratios, allowed)
    if as_json:
        rows = [{"name": r.name, "before_s": r.before_s, "after_s": r.after_s, "ratio": r.ratio} for r in ratios]
        console.emit_json({"ratios": rows, "unlike": unlike, "regressions": [r.name for r in slower]})
    else:
        table = Table("", paths[0], paths[1], "ratio", box=None)
        for r in ratios:
            table.add_row(r.name, f"{1e3 * r.before_s:.2f} ms", f"{1e3 * r.after_s:.2f} ms", f"{r.ratio:.3f}")
        console.out().print(table)
        for line in unlike:
            console.out().print(f"not alike: {line}")
    if slower:
        worst = ", ".join(f"{r.name} {r.ratio - 1:+.1%}" for r in slower)
        raise FindingError("CX673", f"slower than allowed ({allowed:.0%}): {worst}", "measure both on one warm machine")
    console.verdict(f"{len(ratios)} quantities compared, none slower by more than {allowed:.0%}", True)
