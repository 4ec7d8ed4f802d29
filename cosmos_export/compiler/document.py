"""The report of a build: the document that ``--json`` prints, and the files beside the bundle."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_export.compiler import driver
from cosmos_export.compiler.job import Job
from cosmos_export.diagnostics import FindingError
from cosmos_export.documents import labelled
from cosmos_export.options import BuildOptions
from cosmos_export.progress import Progress

if TYPE_CHECKING:
    from cosmos_export.compiler.evidence import BuildResult

_log = logging.getLogger("cosmos_export")


def build(
    options: BuildOptions,
    progress: Progress | None = None,
    begins: Callable[[Job], None] = lambda job: None,
    fails: Callable[[Path | None], None] = lambda left: None,
) -> BuildResult:
    """`driver.build`, with the report ``OUTPUT.build.json`` beside the bundle; where a finding ends the build, what was
    measured until then."""
    output = options.output

    def found(result: BuildResult, error: FindingError) -> None:
        if output is not None and (written := _write_evidence(output, result, error)):
            _log.warning("what was measured: %s", ", ".join(map(str, written)))

    result = driver.build(options, progress, begins, fails, found)
    if output is not None:
        _write_beside(output, "build.json", _json(build_document(result, output)))
        for name in _EVIDENCE:  # of an earlier build, which failed
            with suppress(OSError):
                _beside(output, name).unlink(missing_ok=True)
    return result


def _gates(result: BuildResult) -> dict[str, Any] | None:
    if result.losses is None:
        return None
    from cosmos_export.compiler.losses import loss_values

    worst = [
        {"site": w.site, "scheme": w.scheme, "relative": w.relative if isfinite(w.relative) else None}
        for w in result.losses.worst_linears
    ]
    problems = [f"{f.site}: {f.relative:.4f} > {f.limit:.4f}" for f in result.losses.failed_linears]
    quality = {
        m.stage: {"metric": m.metric, "value": m.value if isfinite(m.value) else None, "limit": m.limit}
        for m in result.quality
    }
    problems += [*result.losses.step_problems, *result.losses.end_problems]
    return {**loss_values(result.losses), "worst": worst, "problems": problems, "loops": quality}


_EVIDENCE = ("quantization.json", "quantization.html")
"""File that a build leaves beside `build.json` where a gate ended it: the report that would be in its bundle."""


def _write_evidence(output: Path, result: BuildResult, error: FindingError) -> list[Path]:
    """Write the measurements of a build that ``error`` ended, beside the place of its bundle; the paths."""
    from cosmos_export.compiler.losses import loss_texts

    failed = {"code": error.code, "message": error.message, "hint": error.hint}
    texts = {"build.json": _json({**build_document(result, None), "failed": failed})}
    if result.losses is not None:
        texts |= dict(zip(_EVIDENCE, loss_texts(result.losses, result.job.precision), strict=True))
    return [path for name, text in texts.items() if (path := _write_beside(output, name, text)) is not None]


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _beside(output: Path, name: str) -> Path:
    output = Path(os.path.abspath(output))  # noqa: PTH100 - as the bundle's writer sees it
    return output.with_name(f"{output.name}.{name}")


def _write_beside(output: Path, name: str, text: str) -> Path | None:
    """``text`` beside the bundle. ``build.json`` is what ``--json`` prints, with seconds, bytes and peak memory of each
    stage: the bundle itself has nothing that differs between two builds of the same inputs but for a part of its
    manifest. None, and a warning, where it cannot be written."""
    path = _beside(output, name)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:  # the bundle is there, and whole; or there is none, and the command says why
        _log.warning("the report %s was not written: %s", path, error)
        return None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def build_document(result: BuildResult, output: Path | None) -> dict[str, Any]:
    """The document of ``result``: plain values, without NaN."""
    from cosmos_export.compiler.record import verdicts

    content = {
        "output": None if output is None else str(output),
        "passes": [
            {
                "name": r.name,
                "form": r.form,
                "changes": dict(r.result.changes),
                "declined": [{"where": d.where, "reason": d.reason} for d in r.result.declined],
                "seconds": round(r.seconds, 3),
            }
            for r in result.passes
        ],
        "parity": [
            {
                "stage": m.stage,
                "subject": m.subject,
                "metric": m.metric,
                "value": m.value if isfinite(m.value) else None,
                "limit": m.limit,
                "case": m.case,
                "passed": m.passed,
                **({"details": dict(m.details)} if m.details else {}),
            }
            for m in result.parity
        ],
        "parity_note": result.not_compared.get("transformer", ""),
        "recipe": result.job.precision.recipe,
        "precision": result.job.precision.table(),
        "gates": _gates(result),
        "components": list(result.job.components),
        "not_compared": dict(result.not_compared),
        "notes": list(result.notes),
        "verdicts": [asdict(verdict) for verdict in verdicts(result)],
        "engines": [
            {
                "graph": e.graph,
                "size_bytes": e.report.size_bytes,
                "attention": e.attention,
                "fused_attention": e.fused_attention,
                "attention_types": sorted({a.type for g in e.graphs for a in g.attention}),
                "gemms": dict(e.graphs[0].gemm_types()) if e.graphs else {},
                "narrow_share": round(e.narrow_share, 4),
                "dequantize_kernels": sorted({name for g in e.graphs for name in g.dequantize}),
                "activation_bytes": e.activation_bytes,
                "profiles": list(e.profiles),
                "reused": e.report.reused,
                "build_s": round(e.report.build_s, 3),
                "peak_memory_bytes": e.report.peak_memory_bytes,
                "peak_anonymous_bytes": e.report.peak_anonymous_bytes,
                "check": {"expected": e.check.expected, "found": e.check.found, "passed": e.check.passed},
            }
            for e in result.engines
        ],
        "dumps": [str(p) for p in result.dumps],
        "seconds": round(result.costs.seconds, 3),
        "peak_memory_bytes": result.costs.peak_resident_bytes,
        "peak_anonymous_bytes": result.costs.peak_anonymous_bytes,
        "stages": {
            name: {**asdict(cost), "seconds": round(cost.seconds, 3)} for name, cost in result.costs.stages.items()
        },
    }
    return labelled("build", content)
