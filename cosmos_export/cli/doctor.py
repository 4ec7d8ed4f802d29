"""``cosmos-export doctor``: whether this machine can build and run, and what to do where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosmos_export.cli.options import Json
from cosmos_export.cli.verbs import Verbs


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.command(
        "doctor",
        "cosmos-export doctor",
        "cosmos-export doctor --target rtx-pro-6000 --folder /data",
    )
    def doctor(
        target: Annotated[str | None, typer.Option(help="Check for this one; default: for the GPUs there are.")] = None,
        folder: Annotated[Path, typer.Option(help="Where bundles go: its disk is looked at.")] = Path(),
        as_json: Json = False,
    ) -> None:
        """Look at driver, GPUs, packages, memory, disk and environment; exit 1 where something stands in the way."""
        from cosmos_export.cli import console
        from cosmos_export.diagnostics import ExitCode, UserError
        from cosmos_export.doctor import CheckState, examine, facts
        from cosmos_export.targets import load_target

        chosen = load_target(target) if target is not None else None
        if not folder.is_dir():
            raise UserError("CX810", f"{folder} is not a directory", "name one that exists")
        findings = list(examine(facts(folder), chosen))
        blockers = [f for f in findings if f.state is CheckState.BLOCKER]
        if as_json:
            rows = [{"check": f.check, "state": f.state.value, "found": f.found, "hint": f.hint} for f in findings]
            console.emit_json("doctor", {"findings": rows, "blockers": len(blockers)})
        else:
            marks = {CheckState.OK: "✓", CheckState.NOTE: "!", CheckState.BLOCKER: "✗"}
            for f in findings:
                console.show(f"{marks[f.state]} {f.check}: {f.found}")
                if f.hint:
                    console.show(f"    hint: {f.hint}")
        console.verdict(f"{len(blockers)} of {len(findings)} checks stand in the way", not blockers)
        if blockers:
            raise typer.Exit(int(ExitCode.FINDING))
