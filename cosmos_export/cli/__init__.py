"""The command line. One module per verb; no logic here.

Exit codes: 0 ok, 1 a check found something, 2 usage or input, 3 unsupported, 4 another tool failed, 128 + N ended by
signal N.
Verb modules import what they need inside their functions, so that ``--help`` starts at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, ClassVar

import typer

import cosmos_export
from cosmos_export import streams
from cosmos_export.cli import (
    audit,
    bench,
    build,
    bundle,
    cache,
    calibrate,
    console,
    demo_checkpoint,
    doctor,
    explain,
    inspect,
    meanings,
    plan,
    quantize,
    recipes,
    run,
    serve,
    targets,
    verbs,
    version,
)
from cosmos_export.diagnostics import ExitCode, ToolError, UserError

__all__ = ["app", "main"]


class _Root(verbs.Group):
    headings: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("doctor", "targets", "recipes", "inspect", "plan", "demo-checkpoint"), "Before a build"),
        **dict.fromkeys(("calibrate", "quantize", "build", "bundle", "cache"), "Build"),
        **dict.fromkeys(("run", "serve", "audit", "bench"), "Run"),
        **dict.fromkeys(("explain", "version"), "Help"),
    }


app = verbs.Verbs(
    name="cosmos-export",
    cls=_Root,
    help="Ahead-of-time compiler for NVIDIA Cosmos 3: checkpoint in, engines and the proof that they are right out.",
    epilog="Exit codes: 0 ok, 1 a check found something, 2 usage or input, 3 unsupported, 4 another tool failed, "
    "129, 130 and 143 ended by SIGHUP, Ctrl-C and SIGTERM. Data goes to stdout, everything else to stderr.",
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings=verbs.CONTEXT,
)
VERBS = (
    inspect, demo_checkpoint, plan, calibrate, quantize, build, bundle, cache, run, serve, audit, bench, doctor,
    targets, recipes, explain, version,
)  # fmt: skip
for verb in VERBS:
    verb.register(app)


@app.callback()
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and exit.")] = False,
    quiet: verbs.Quiet = False,
    verbose: verbs.Verbose = False,
    no_progress: verbs.NoProgress = False,
) -> None:
    console.set_before(console.SharedOptions(quiet, verbose, no_progress))
    if show_version:
        typer.echo(f"cosmos-export {cosmos_export.__version__}")
        raise typer.Exit()
    verbs.require_verb(context)


def main() -> None:
    """Run the command line and exit."""
    streams.guard()
    verbs.end_in_order()
    console.configure()
    # What typer itself refuses is reported here; the verb that would know about --json was never reached.
    as_json = "--json" in sys.argv[1:]
    try:
        try:
            status = app(prog_name="cosmos-export", standalone_mode=False)
        except typer.TyperException as error:
            verbs.fail(UserError("CX100", *meanings.explained(error)), as_json)
        except (Exception, KeyboardInterrupt) as error:
            verbs.fail_unexpected(error, as_json)
    except typer.Exit as ending:
        status = ending.exit_code
    sys.exit(_final(status if isinstance(status, int) else ExitCode.OK))


def _final(status: int) -> int:
    """``status``, unless all went well and its data did not get out. A reader that leaves early changes nothing."""
    error = streams.lost()
    if error is None or status != ExitCode.OK:
        return status
    ending = ToolError("CX803", f"the command did its work, but stdout could not be written: {error.strerror}")
    sys.stderr.write(verbs.message(ending))
    sys.stderr.flush()
    return ExitCode.TOOL
