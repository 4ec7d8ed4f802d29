"""``cosmos-export build``: a checkpoint into a bundle."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_export import units
from cosmos_export.cli.tables import Column, Table, numbers
from cosmos_export.cli.verbs import Verbs
from cosmos_export.options import BuildCommand, BuildOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cosmos_export.bundle import Planned
    from cosmos_export.compiler.artifacts import Engine
    from cosmos_export.compiler.evidence import BuildResult
    from cosmos_export.compiler.job import Job


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "build",
        BuildCommand,
        "cosmos-export build Cosmos3-Nano -o nano.bundle --target rtx-pro-6000 --profile 480p-121f",
        "cosmos-export build Cosmos3-Nano -o fp8.bundle --target l40s --recipe fp8 --calibration scales/",
    )
    def build(asked: BuildCommand, as_json: bool) -> None:
        """Compile a checkpoint into a bundle: capture, passes, engines, checks.

        The bundle appears under its name when all of it is right.
        """
        from cosmos_export.cli import console
        from cosmos_export.compiler.cache import default_folder, default_graphs_folder
        from cosmos_export.compiler.document import build as run
        from cosmos_export.compiler.document import build_document

        options, cached = asked.options, not asked.no_cache
        options = replace(
            options,
            cache=options.cache or default_folder() if cached else None,
            graphs=options.cache or default_graphs_folder() if cached else None,
        )
        output = options.output

        def begins(job: Job) -> None:
            if output is not None:
                console.set_resume_command(_resume_command(options, job.memory_budget))

        def fails(left: Path | None) -> None:
            if left is None:
                console.set_resume_command(None)

        result = run(options, console.progress(), begins, fails)
        if as_json:
            console.emit_json("build", build_document(result, output))
        else:
            _print(result)
        failed = result.manifest is not None and any(v.verdict == "fail" for v in result.manifest.evaluation)
        console.verdict(_verdict(result, output), not failed)


def _resume_command(options: BuildOptions, memory_budget: int | None) -> str:
    """This command, as it would be continued: with the memory budget that was found, or engines would be cut in other
    places where the machine has less free by then."""
    arguments = [*sys.argv[1:], *([] if options.resume else ["--resume"])]
    if memory_budget is not None and options.memory_budget is None:
        arguments += ["--memory-budget", f"{memory_budget / 2**30:g}GiB"]
    return shlex.join(["cosmos-export", *arguments])


def _print(result: BuildResult) -> None:
    from cosmos_export.cli import console

    parts: list[Table | str] = [_passes(result)] if result.passes else []
    if result.parity:
        parts.append(_parity(result))
    for m in result.parity:
        parts += [f"{m.stage}: {what}: {units.number(value)}" for what, value in m.details.items()]
    for subject, note in result.not_compared.items():
        parts += ["", f"Parity of {subject} with diffusers: not measured: {note}"]
    if result.losses is not None:
        parts.append(_losses(result))
    if result.engines:
        parts.append(_engines(result))
    for note in result.notes:
        parts += ["", note]
    if result.manifest is not None:
        if result.manifest.volatile.planned:
            parts.append(_planned(result.manifest.volatile.planned))
        files = result.manifest.files
        size_bytes = sum(f.size_bytes for f in files)
        parts += [
            "",
            f"Components: {', '.join(('transformer', *result.job.components))}",
            f"{len(files)} files, {units.size(size_bytes)}; {units.seconds(result.costs.seconds)}, "
            f"peak memory {units.size(result.costs.peak_resident_bytes)}",
        ]
    console.show(*parts, *map(str, result.dumps))


def _passes(result: BuildResult) -> Table:
    columns = ("pass", Column("changed", wraps=True), Column("declined", wraps=True), *numbers("time"))
    table = Table(columns, "Passes")
    for report in result.passes:
        changes = ", ".join(f"{count} × {kind}" for kind, count in report.result.changes.items()) or "nothing"
        declined = ", ".join(f"{d.where}: {d.reason}" for d in report.result.declined)
        name = f"{report.name} ({report.form})" if report.form else report.name
        table.add(name, changes, declined, units.seconds(report.seconds, 2))
    return table


def _parity(result: BuildResult) -> Table:
    table = Table(("stage", "metric", *numbers("worst", "limit"), "case"), "Parity with diffusers")
    for m in result.parity:
        table.add(m.stage, m.metric, f"{m.value:.2g}", f"{m.limit:g}", m.case)
    return table


def _engines(result: BuildResult) -> Table:
    columns = (
        "engine", *numbers("size"), "attention", Column("GEMMs", wraps=True),
        *numbers("activations", "build", "memory"), Column("plan", wraps=True),
    )  # fmt: skip
    table = Table(columns, "Engines")
    for engine in result.engines:
        table.add(
            engine.graph,
            units.size(engine.report.size_bytes),
            f"{engine.fused_attention} of {engine.attention} fused" if engine.attention else None,
            _gemms(engine),
            units.size(engine.activation_bytes),
            engine.report.reused or units.seconds(engine.report.build_s),
            None if engine.report.reused else units.size(engine.report.peak_memory_bytes),
            "as planned" if engine.check.passed else engine.check.found,
        )
    return table


def _planned(planned: Mapping[str, Planned]) -> Table:
    table = Table(("prediction", *numbers("planned", "found", "difference")), "Plan")
    for name, one in planned.items():
        share = f"{one.planned / one.found - 1:+.1%}" if one.found else None
        table.add(name, units.size(one.planned, 2), units.size(one.found), share)
    return table


def _losses(result: BuildResult) -> Table:
    from cosmos_export.evaluation.ends import END_LIMIT

    losses, precision = result.losses, result.job.precision
    assert losses is not None
    note = "Relative errors: the five linears nearest to their limit, and the velocity of whole steps."
    columns = (Column("what", wraps=True), *numbers("loss", "limit"))
    table = Table(columns, f"Quantization by recipe {precision.recipe}", note)
    for loss in losses.worst_linears:
        table.add(f"{loss.site} ({loss.scheme})", f"{loss.relative:.4f}", f"{loss.limit:.4f}")
    for step in losses.steps:
        table.add(f"step {step.step + 1}", f"{step.relative:.4f}", f"{losses.limits.largest}")
        if step.share is not None:
            limit = f"{losses.limits.largest_share}"
            table.add(f"step {step.step + 1}, times what rounding alone loses", f"{step.share:.2f}", limit)
    for end in losses.ends:
        table.add(f"{end.modality} at the end of a request", f"{end.relative:.4f}", f"{END_LIMIT}")
        for column in end.columns:
            what = f"{column.name}, rms over the chunk (unquantized in its own precision: {column.floor:.3g})"
            table.add(what, f"{column.rms:.4g} {column.unit}", None)
    for m in result.quality:
        table.add(f"{m.stage}: {m.metric}", f"{m.value:.4f}", f"{m.limit}")
    return table


def _gemms(engine: Engine) -> str:
    """How many GEMMs one profile has, by type."""
    types = engine.graphs[0].gemm_types() if engine.graphs else {}
    return ", ".join(f"{count} × {kind}" for kind, count in types.items()) or "–"


def _verdict(result: BuildResult, output: Path | None) -> str:
    if result.manifest is None:
        from cosmos_export.passes.pipeline import CAPTURE

        # The program that all forms are made from ends before the passes of one form.
        last = result.passes[-1].name if result.passes else CAPTURE
        return f"stopped after {last}: {len(result.dumps)} dumps, no bundle"
    attention = sum(e.fused_attention for e in result.engines)
    proof = "parity not measured"
    if result.parity:
        proof = f"{len(result.parity)} stages within their limits of diffusers"
        if "transformer" in result.not_compared:
            proof += ", not the whole transformer"
    engines = f"{len(result.engines)} engines with {attention} fused attentions, " if result.engines else ""
    components = "".join(f" + {name}" for name in result.job.components)
    failed = [f"{v.stage} of {v.subject} failed: {v.note}" for v in result.manifest.evaluation if v.verdict == "fail"]
    if failed:
        return f"built {output}, with failures that were only to be reported: {'; '.join(failed)}"
    return f"built {output}: transformer{components}, {engines}{proof}"
