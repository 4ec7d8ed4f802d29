"""Options and errors of all verbs: `--quiet`, `--verbose`, `--no-progress`, and how an error ends the process.

A verb is a plain function of its options, registered on a `Verbs`; it raises `CosmosExportError` and knows nothing of
exit codes.
"""

from __future__ import annotations

import errno
import inspect
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

import typer
import typer.core

from cosmos_export import files
from cosmos_export.arguments import MOST
from cosmos_export.cli import choices, console, options
from cosmos_export.diagnostics import CosmosExportError, ExitCode, ToolError, UserError
from cosmos_export.option_fields import flat
from cosmos_export.printable import printable

Options = TypeVar("Options")
Verb = Callable[[Options, bool], None]
"""A verb: a function of its options and of whether it prints JSON."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print debug lines, and tracebacks of errors.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Print no bars and no progress lines.")]
SHARED: dict[str, Any] = {"as_json": Json, "quiet": Quiet, "verbose": Verbose, "no_progress": NoProgress}
"""Options of every verb. All but the first are options of the program before the verb, too."""
WIDTH = 120
"""Columns of help at most; a narrower terminal decides otherwise."""
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}
_REPORT = "this is a bug: please report it with the output of the same command under `--verbose`"


class _Command(typer.core.TyperCommand):
    """A command whose help has its options under headings, and examples at the end."""

    record: ClassVar[type]
    """The options of the verb."""
    groups: ClassVar[Mapping[str, str]] = {}
    """Parameter → heading."""
    names: ClassVar[Mapping[str, str]] = {}
    """Parameter → registry of its values (`choices`)."""
    examples: ClassVar[tuple[str, ...]] = ()

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        sections |= {group: [] for group in self.groups.values() if group != "Output"}
        sections |= {"Output": [], "Common options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            name = parameter.name or ""
            argument = parameter.param_type_name == "argument"
            group = "Common options" if name in (*SHARED, "help") else self.groups.get(name, "Options")
            group = "Arguments" if argument else "Output" if name == "as_json" else group
            text = _listing(record[1], self.names.get(name))
            sections[group].append((_names(record[0], name, argument), _whole(text)))
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _hyphens(formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(_command_lines(example, formatter.current_indent, formatter.width))


_HYPHEN = "\u2011"
"""A hyphen that no line ends at: names such as rtx-pro-6000 stay on one line."""


def _whole(text: str) -> str:
    return text.replace("-", _HYPHEN)


def _hyphens(formatter: Any) -> None:
    formatter.buffer[:] = [part.replace(_HYPHEN, "-") for part in formatter.buffer]


def _command_lines(command: str, indent: int, width: int) -> str:
    """``command`` as it can be pasted into a shell, on several lines where it is wider than ``width``."""
    lines = [""]
    for part in re.split(r" (?=-)", command):
        if lines[-1] and indent + len(lines[-1]) + len(part) + 3 > width:
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip()
    return " \\\n".join(f"{'':{indent + 2 * bool(i)}}{line}" for i, line in enumerate(lines)) + "\n"


class Group(typer.core.TyperGroup):
    """A group whose help has the whole first sentence of every command, under headings."""

    headings: ClassVar[Mapping[str, str]] = {}
    """Command → heading."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _hyphens(formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in self.headings.values()}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                sentence = (command.help or "").split("\n\n")[0].replace("\n", " ")
                sections.setdefault(self.headings.get(name, "Commands"), []).append((name, _whole(sentence)))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def group(name: str, text: str) -> Verbs:
    """A group of verbs, whose help begins with ``text``."""
    return Verbs(name=name, help=text, cls=Group, invoke_without_command=True, rich_markup_mode=None)


_LISTED = ("targets", "backends", "recipes", "modes", "formats", "own-kernels")
"""Registries whose names help shows. The others are long, or in the text: asking them would import what is heavy."""


def _listing(text: str, registry: str | None) -> str:
    """``text`` of an option, with the names of its ``registry`` where help shows those."""
    if registry not in _LISTED or registry is None:
        return text
    sentence = re.split(r" Default: |  \[", text, maxsplit=1)[0]
    return f"{sentence.rstrip('.')}: {', '.join(choices.names(registry))}.{text[len(sentence) :]}"


_PLACEHOLDERS = {"int": "N", "float": "X", "path": "PATH"}


def _names(flags: str, parameter: str, argument: bool) -> str:
    """``flags`` of the help with a name in place of a type; an argument has its own name already."""
    if argument:
        return re.sub(r" <\w+(\[\w+\])?>", "", flags)
    return re.sub(r"<(str|int|float|path)>", lambda m: _PLACEHOLDERS.get(m[1], parameter.upper()), flags)


class Verbs(typer.Typer):
    """A `typer.Typer` whose verbs take a record of options and the shared options, and whose errors are messages and
    exit codes."""

    def verb(self, name: str, record: type[Options], *examples: str) -> Callable[[Verb[Options]], Verb[Options]]:
        """Register a verb that takes ``record`` and whether it prints JSON; ``examples`` are command lines that its
        help shows."""
        given = list(flat(record))
        about = {
            "record": record,
            "groups": {option.name: option.cli.group for option in given},
            "names": {option.name: option.cli.names for option in given if option.cli.names is not None},
            "examples": examples,
        }
        kind = type("Command", (_Command,), about)

        def decorate(verb: Verb[Options]) -> Verb[Options]:
            self.command(name, cls=kind)(_Called(verb, record))
            return verb

        return decorate


def require_verb(context: typer.Context) -> None:
    """Show the help and end as wrong usage where a group is called without a verb."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(int(ExitCode.USAGE))


def fail(error: CosmosExportError, as_json: bool) -> NoReturn:
    """Report ``error`` and end the command with its exit code."""
    console.close()
    if as_json and not console.json_emitted():
        console.emit_json("error", {"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    text = message(error, colour=console.has_colour(sys.stderr))
    command = console.resume_command()
    if command and isinstance(error, ToolError):
        text += f"hint: what is finished is kept; when that is solved, continue with `{command}`\n"
    sys.stderr.write(text)
    raise typer.Exit(int(error.exit_code))


def fail_unexpected(error: BaseException, as_json: bool) -> NoReturn:
    """Report any other exception: what the system said, an interruption, or a bug of this program."""
    console.close()
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _interrupted(error, as_json)
    if console.is_verbose():
        import traceback

        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    if (cause := _lack_of_memory(error)) is not None:
        hint = "free memory, or raise the limit of this process (`ulimit -v`, its container's memory)"
        fail(ToolError("CX804", f"not enough memory: {_one_line(cause)}", hint), as_json)
    if isinstance(error, OSError):
        hint = "free some space" if error.errno == errno.ENOSPC else "run again with `--verbose` to see where"
        fail(ToolError("CX801", str(error), hint), as_json)
    fail(ToolError("CX000", f"unexpected {_one_line(error)}", _REPORT), as_json)


def _one_line(error: BaseException) -> str:
    """Kind and text of ``error``."""
    return " ".join(f"{type(error).__name__}: {error}".split())


_NO_MEMORY = (
    "cannot allocate memory", "can't allocate memory", "failed to map segment", "out of memory", "bad_alloc",
    "can't start new thread", "failed to allocate memory",
)  # fmt: skip
"""Texts of errors of other kinds where no memory is left; loaders and threads need it too."""


def _lack_of_memory(error: BaseException | None) -> BaseException | None:
    """The one of ``error`` and what it came from that says that there is no memory; None where none does."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return error
        if any(words in str(error).lower() for words in _NO_MEMORY):
            return error
        error = error.__cause__ or error.__context__
    return None


def message(error: CosmosExportError, colour: bool = False) -> str:
    """``error`` as it is written to stderr: without the console, whatever state the terminal is in."""
    red, cyan, end = ("\033[1;31m", "\033[36m", "\033[0m") if colour else ("", "", "")
    text = f"{red}error[{error.code}]{end}: {printable(error.message)}\n"
    return text + (f"\n{cyan}hint{end}: {printable(error.hint)}\n" if error.hint else "")


class Interrupted(CosmosExportError):
    """The user stopped the command."""

    exit_code = ExitCode.INTERRUPTED


class Terminated(Interrupted):
    """SIGTERM stopped it."""

    exit_code = ExitCode.TERMINATED


class HungUp(Interrupted):
    """SIGHUP stopped it."""

    exit_code = ExitCode.HUNG_UP


class SignalledError(KeyboardInterrupt):
    """A signal that ends the process has come: whatever cleans up after an interruption cleans up now."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_ENDINGS: dict[int, type[Interrupted]] = {signal.SIGTERM: Terminated, signal.SIGHUP: HungUp}


def end_in_order() -> None:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, unless whoever started it has them ignored (`nohup`)."""
    for number in _ENDINGS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _signalled)


def _signalled(number: int, _: object) -> NoReturn:
    for other in _ENDINGS:  # a second one must not cut the cleaning up short: SIGKILL does
        signal.signal(other, signal.SIG_IGN)
    raise SignalledError(number)


OUTPUTS = ("output", "dump")
"""Options of the verbs that name what is written. `run` looks at its own, which may be several, before it generates."""


def _require_writable(given: Any) -> None:
    """UserError CX004 for a name that nothing can be written to, before a verb does any work."""
    if isinstance(given, Path) and (why := files.output_problem(given)):
        raise UserError("CX004", f"{str(given)[:300]} cannot be written: {why}", "choose another name")


def _require_numbers(given: Mapping[str, Any]) -> None:
    """UserError CX100 for a number that is too large for any verb; its own limits are the verb's to say."""
    for name, value in given.items():
        if isinstance(value, int) and abs(value) > MOST:
            raise UserError("CX100", f"the value of --{name.replace('_', '-')} is not a number up to {MOST:,}")


class _Called:
    """A verb as typer calls it, with an argument per option. No exception but typer's own gets out."""

    def __init__(self, verb: Callable[[Any, bool], None], record: type) -> None:
        self._verb, self._record = verb, record
        self.__name__, self.__doc__ = verb.__name__, verb.__doc__
        # Typer reads both; the types of the parameters are in the signature.
        self.__annotations__: dict[str, Any] = {}
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in SHARED.items()
        ]
        self.__signature__ = inspect.Signature([*map(options.parameter, flat(record)), *shared])

    def __call__(self, *, quiet: bool, verbose: bool, no_progress: bool, as_json: bool, **values: Any) -> None:
        before = console.given_before()
        console.configure(quiet or before.quiet, verbose or before.verbose, no_progress or before.no_progress)
        try:
            _require_numbers(values)
            for name in OUTPUTS:
                _require_writable(values.get(name))
            self._verb(options.made(self._record, values), as_json)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except CosmosExportError as error:
            if console.is_verbose():
                import traceback

                sys.stderr.write(printable("".join(traceback.format_exception(error))))
            fail(error, as_json)
        except (Exception, KeyboardInterrupt) as error:
            fail_unexpected(error, as_json)
        finally:
            console.close()


def _interrupted(error: BaseException, as_json: bool) -> NoReturn:
    found = error if isinstance(error, SignalledError) else error.__cause__  # typer wraps one outside of verbs
    kind, what = Interrupted, "interrupted"
    if isinstance(found, SignalledError) and found.number in _ENDINGS:
        kind, what = _ENDINGS[found.number], f"stopped by {signal.Signals(found.number).name}"
    command = console.resume_command()
    if command:
        fail(kind("CX002", f"{what}; what is finished is kept", f"continue with `{command}`"), as_json)
    fail(kind("CX002", what), as_json)
