"""``cosmos-export bundle verify``: is a bundle what its build wrote?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_export.cli.verbs import Verbs, require_verb

if TYPE_CHECKING:
    from cosmos_export.bundle import VerifyReport


def register(app: typer.Typer) -> None:
    """Add the verbs to ``app``."""
    group = Verbs(name="bundle", help="Look after bundles.", invoke_without_command=True, rich_markup_mode=None)
    app.add_typer(group)

    @group.callback()
    def bundle(context: typer.Context) -> None:
        require_verb(context)

    @group.command("verify")
    def verify(
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle.", show_default=False)],
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ) -> None:
        """Check every file of a bundle against its manifest: PASS, FAIL or SKIP for each, exit code 1 on any mismatch.

        It says that the bundle is complete and unchanged since its build. It does not say who built it: the hashes lie
        beside the files. docs/bundle.md has the details.
        """
        from cosmos_export.bundle import verify_bundle
        from cosmos_export.cli import console
        from cosmos_export.diagnostics import ExitCode

        report = verify_bundle(directory, console.progress())
        if as_json:
            console.emit_json(_document(report))
        else:
            for line in _lines(report):
                typer.echo(line)
        console.verdict(_verdict(report), report.ok)
        if not report.ok:
            raise typer.Exit(int(ExitCode.FINDING))


_LABELS = {"pass": "PASS", "fail": "FAIL", "skipped": "SKIP"}


def _lines(report: VerifyReport) -> list[str]:
    return [
        f"{_LABELS[check.status.value]}  {_printable(check.path)}" + (f": {check.detail}" if check.detail else "")
        for check in report.checks
    ]


def _verdict(report: VerifyReport) -> str:
    if report.ok and report.manifest is not None:
        size = sum(record.size_bytes for record in report.manifest.files)
        return f"PASS: {report.bundle}: {_files(len(report.manifest.files))}, {size:,} bytes, as the manifest says"
    failed = f"{len(report.failures)} of {len(report.checks)} checks failed"
    return f"FAIL: {report.bundle}: {failed}; do not use this bundle"


def _document(report: VerifyReport) -> dict[str, Any]:
    return {
        "bundle": str(report.bundle),
        "ok": report.ok,
        "checks": [
            {"path": check.path, "status": check.status.value, "detail": check.detail} for check in report.checks
        ],
    }


def _printable(path: str) -> str:
    """A name found on disk may hold anything, escape sequences of the terminal included."""
    return path if path.isprintable() else ascii(path)


def _files(count: int) -> str:
    return f"{count} file" + ("" if count == 1 else "s")
