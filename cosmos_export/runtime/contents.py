"""Checks of the contents of a bundle's files against its manifest, beyond their bytes. Needs no engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cosmos_export.bundle import BundleFiles, Check, Status, VerifyReport
from cosmos_export.bundle.manifest import MANIFEST_NAME
from cosmos_export.runtime.engine_files import engine_problems
from cosmos_export.runtime.facts import fact_problems
from cosmos_export.runtime.model_files import model_problems
from cosmos_export.runtime.provenance_file import provenance_problems
from cosmos_export.runtime.report_file import report_problems
from cosmos_export.runtime.schedule_table import schedule_problems


def content_problems(files: BundleFiles) -> Iterator[tuple[str, str]]:
    """Path of each file that does not hold what the manifest says of it, and why; the manifest's own where it
    contradicts what it says elsewhere, or what this version knows."""
    for problem in fact_problems(files.manifest):
        yield MANIFEST_NAME, problem
    yield from engine_problems(files)
    yield from model_problems(files)
    yield from schedule_problems(files)
    yield from report_problems(files)
    yield from provenance_problems(files)


def with_contents(report: VerifyReport) -> VerifyReport:
    """``report`` of a bundle that verifies, with what is wrong with the contents of its files."""
    if not report.ok or report.files is None:
        return report
    wrong: dict[str, str] = {}
    for name, problem in content_problems(report.files):
        wrong.setdefault(name, problem)
    checks = (Check(c.path, Status.FAIL, wrong[c.path]) if c.path in wrong else c for c in report.checks)
    return replace(report, checks=tuple(checks))
