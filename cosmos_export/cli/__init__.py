"""The command line. One module a verb; no logic here.

Exit codes: 0 ok, 1 a check found something, 2 usage or input, 3 unsupported, 4 another tool failed, 128 + N ended by
signal N.
Verb modules import what they need inside their functions, so that ``--help`` starts at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

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
    inspect,
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

app = verbs.Verbs(
    name="cosmos-export",
    help="Ahead-of-time compiler for NVIDIA Cosmos 3: checkpoint in, engines and the proof that they are right out.",
    epilog="Exit codes: 0 ok, 1 a check found something, 2 usage or input, 3 unsupported, 4 another tool failed, "
    "129, 130 and 143 ended by SIGHUP, Ctrl-C and SIGTERM. Data goes to stdout, everything else to stderr.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = (
    inspect, demo_checkpoint, plan, calibrate, quantize, build, bundle, cache, run, serve, audit, bench, doctor,
    targets, recipes, version,
)  # fmt: skip
for verb in VERBS:
    verb.register(app)


@app.callback()
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
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
            verbs.fail(UserError("CX100", error.format_message(), _usage_hint(error)), as_json)
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


def _usage_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f"`{context.command_path if context else 'cosmos-export'} --help` lists what there is"
