"""``cosmos-export audit verify``: is an audit trail of `serve` or `run` complete and unchanged?"""

from __future__ import annotations

import dataclasses

import typer

from cosmos_export.cli import verbs
from cosmos_export.cli.verbs import Verbs
from cosmos_export.verb_options import AuditVerifyOptions


def register(app: Verbs) -> None:
    """Add the verbs to ``app``."""
    group = verbs.group("audit", "Verify audit trails.")
    app.add_typer(group)

    @group.callback()
    def audit(context: typer.Context) -> None:
        verbs.require_verb(context)

    @group.verb(
        "verify",
        AuditVerifyOptions,
        "cosmos-export audit verify robot.jsonl",
        "cosmos-export audit verify robot.jsonl --anchor 5d41402a --json",
    )
    def verify(options: AuditVerifyOptions, as_json: bool) -> None:
        """Check that every line of an audit trail follows from the line before it; exit code 1 where one does not.

        Lines that are missing at the end are found with --anchor alone. docs/serve.md says what the lines hold.
        """
        from cosmos_export.audit import verify_trail
        from cosmos_export.cli import console

        file = options.file
        found = verify_trail(file, options.anchor)
        if as_json:
            console.emit_json("audit-verify", {"file": str(file), **dataclasses.asdict(found)})
        else:
            console.out().print(f"{'lines':<8}{found.lines}")
            console.out().print(
                f"{'events':<8}{', '.join(f'{name} {count}' for name, count in found.events.items()) or 'none'}"
            )
            console.out().print(f"{'from':<8}{found.first or '-'}")
            console.out().print(f"{'to':<8}{found.last or '-'}")
            console.out().print(f"{'anchor':<8}{found.head}")
        console.verdict(f"{file}: {found.lines} lines follow from each other", True)
