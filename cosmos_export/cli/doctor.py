"""``cosmos-export doctor``: whether this machine can build and run, and what to do where it cannot."""

from __future__ import annotations

import typer

from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import DoctorOptions


def register(app: Verbs) -> None:
    """Add the verb to ``app``."""

    @app.verb(
        "doctor",
        DoctorOptions,
        "cosmos-export doctor",
        "cosmos-export doctor --target rtx-pro-6000 --folder /data",
    )
    def doctor(options: DoctorOptions, as_json: bool) -> None:
        """Look at driver, GPUs, packages, memory, disk and environment; exit 1 where something stands in the way."""
        from cosmos_export.cli import console
        from cosmos_export.diagnostics import ExitCode, UserError
        from cosmos_export.doctor import CheckState, examine, facts
        from cosmos_export.targets import load_target

        folder = options.folder
        chosen = load_target(options.target) if options.target is not None else None
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
