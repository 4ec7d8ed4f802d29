"""What every verb has in common: streams, exit codes, error form, start-up time."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import cosmos_export.cli as cli
from cosmos_export.cli import console, verbs
from cosmos_export.diagnostics import ExitCode, FindingError, InternalError, ToolError, UnsupportedError, UserError
from cosmos_export.verb_options import NoOptions

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "diffusers", "transformers", "numpy")


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cosmos_export", *arguments], cwd=ROOT, capture_output=True, text=True, **settings
    )


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a one-verb command line in this process; returns exit code, stdout and stderr."""

    def invoke(body: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        app = verbs.Verbs(rich_markup_mode=None)

        @app.callback()
        def root() -> None: ...

        @app.verb("act", NoOptions)
        def act(_: NoOptions, as_json: bool) -> None:
            body()

        monkeypatch.setattr(cli, "app", app)
        monkeypatch.setattr(sys, "argv", ["cosmos-export", "act", *arguments])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        captured = capsys.readouterr()
        return int(ending.value.code or 0), captured.out, captured.err

    return invoke


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


# ---------------------------------------------------------------------------------------------------------------------
# Start-up


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["bundle", "verify", "--help"], ["run", "--help"], ["version"]]
)
def test_starts_without_anything_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from cosmos_export.cli import main; sys.argv[1:] = sys.argv[1:]\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        f"sys.stderr.write(repr(sorted(set({HEAVY!r}) & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "[]"


def test_help_does_not_import_rich() -> None:
    code = "import sys, cosmos_export.cli; print([m for m in sys.modules if m.split('.')[0] == 'rich'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n"


def test_help_is_there_at_once() -> None:
    """In processor time: what else the machine does is not the command's."""
    took: list[float] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.5, took


def test_module_and_command_are_the_same() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = run("--version", env=environment)
    assert result.stdout == f"cosmos-export {cosmos_export_version()}\n"


def cosmos_export_version() -> str:
    import cosmos_export

    return cosmos_export.__version__


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FindingError("CX711", "no", "look"), 1),
        (UserError("CX101", "no", "look"), 2),
        (UnsupportedError("CX401", "no", "look"), 3),
        (ToolError("CX402", "no", "look"), 4),
        (InternalError("CX201", "no", "look"), 4),
    ],
)
def test_an_error_ends_with_its_exit_code(call: Any, error: Any, code: int) -> None:
    assert call(raising(error)) == (code, "", f"error[{error.code}]: no\n\nhint: look\n")


def test_an_error_without_a_hint(call: Any) -> None:
    assert call(raising(UserError("CX101", "no [bold]such[/bold] file")))[2] == (
        "error[CX101]: no [bold]such[/bold] file\n"
    )


def test_an_error_is_one_json_document(call: Any) -> None:
    code, out, err = call(raising(UserError("CX101", "no", "look")), "--json")
    assert code == 2
    assert json.loads(out) == {
        "document": "error",
        "version": 1,
        "error": {"code": "CX101", "message": "no", "hint": "look"},
    }
    assert err.startswith("error[CX101]")


def test_a_verb_that_printed_its_document_adds_no_second_one(call: Any) -> None:
    def body() -> None:
        console.emit_json("cache-ls", {"entries": []})
        raise FindingError("CX711", "no")

    code, out, _ = call(body, "--json")
    assert code == 1
    assert json.loads(out)["entries"] == []


def test_two_documents_are_a_bug_of_ours(call: Any) -> None:
    def body() -> None:
        console.emit_json("cache-ls", {"entries": []})
        console.emit_json("cache-ls", {"entries": []})

    code, out, err = call(body, "--json")
    assert code == 4
    assert json.loads(out)["document"] == "cache-ls"
    assert "second JSON document" in err


def test_interrupted(call: Any) -> None:
    assert call(raising(KeyboardInterrupt())) == (130, "", "error[CX002]: interrupted\n")


def test_interrupted_and_resumable(call: Any) -> None:
    def body() -> None:
        console.set_resume_command("cosmos-export build x --resume")
        raise KeyboardInterrupt

    code, _, err = call(body)
    assert code == 130
    assert err.endswith(
        "interrupted; what is finished is kept\n\nhint: continue with `cosmos-export build x --resume`\n"
    )
    # The promise ends with the command that made it.
    assert "hint" not in call(raising(KeyboardInterrupt()))[2]


def test_unexpected_exception_is_one_line(call: Any) -> None:
    code, out, err = call(raising(ZeroDivisionError("by\nzero")), "--json")
    assert code == 4
    assert err.splitlines()[0] == "error[CX000]: unexpected ZeroDivisionError: by zero"
    assert "report" in err
    assert "Traceback" not in err
    assert json.loads(out)["error"]["code"] == "CX000"


@pytest.mark.parametrize("error", [ZeroDivisionError("zero"), UserError("CX101", "no")])
def test_verbose_shows_the_traceback(call: Any, error: Exception) -> None:
    err = call(raising(error), "--verbose")[2]
    assert "Traceback" in err
    assert "raise error" in err


def test_system_errors_are_no_bugs(call: Any) -> None:
    code, _, err = call(raising(OSError(28, "No space left on device", "x.plan")))
    assert code == 4
    assert err.startswith("error[CX801]: [Errno 28] No space left on device: 'x.plan'\n")
    assert "bug" not in err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["bundle", "verify"], "Missing argument 'DIR'", "--help` lists what there is"),
        (["bundl"], "cosmos-export has no verb `bundl`", "`cosmos-export bundle` is meant"),
        (["version", "--jsn"], "cosmos-export version has no option --jsn", "did you mean `--json`?"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, hint: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error[CX100]: {message}")
    assert hint in result.stderr


def test_usage_errors_in_json() -> None:
    result = run("version", "--json", "--nope")
    assert result.returncode == 2
    assert json.loads(result.stdout)["error"]["code"] == "CX100"


@pytest.mark.parametrize("arguments", [[], ["bundle"]])
def test_no_verb_shows_the_help_on_stderr(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: cosmos-export")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    code = """
import sys
from cosmos_export.cli import verbs
from cosmos_export.verb_options import NoOptions
import cosmos_export.cli as cli
app = verbs.Verbs()
@app.callback()
def root(): ...
@app.verb("act", NoOptions)
def act(options, as_json):
    for i in range(100_000):
        print(i)
cli.app = app
sys.argv = ["cosmos-export", "act"]
cli.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


def test_sigint_of_the_process() -> None:
    code = """
import sys, time
from cosmos_export.cli import verbs
from cosmos_export.verb_options import NoOptions
import cosmos_export.cli as cli
app = verbs.Verbs()
@app.callback()
def root(): ...
@app.verb("act", NoOptions)
def act(options, as_json):
    print("ready", flush=True)
    time.sleep(60)
cli.app = app
sys.argv = ["cosmos-export", "act"]
cli.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    assert err == "error[CX002]: interrupted\n"


# ---------------------------------------------------------------------------------------------------------------------
# Every verb


def _commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, command in group.commands.items():
        inner = (*path, name)
        found += _commands(command, inner) if hasattr(command, "commands") else [(inner, command)]
    return found


VERBS = _commands(typer.main.get_command(cli.app))


@pytest.mark.parametrize(("path", "command"), VERBS, ids=[" ".join(path) for path, _ in VERBS])
def test_every_verb_has_the_shared_options_and_a_help_text(path: tuple[str, ...], command: Any) -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--quiet", "-q", "--verbose", "-v", "--no-progress"} <= options
    assert command.help
    undocumented = [parameter.name for parameter in command.params if not parameter.help]
    assert not undocumented


def test_version_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_export.cli import version

    monkeypatch.setattr(version, "OPTIONAL", ("typer", "no-such-distribution"))
    found = version.installed()
    assert found["typer"] == typer.__version__
    assert found["no-such-distribution"] is None


def test_version_json() -> None:
    document = json.loads(run("version", "--json").stdout)
    assert document["packages"]["cosmos-export"] == cosmos_export_version()
    assert "torch" in document["packages"]


def test_the_shared_options_may_stand_before_the_verb(tmp_path: Path) -> None:
    before, after = run("--verbose", "targets", "nothing"), run("targets", "nothing", "--verbose")
    assert before.stderr == after.stderr
    assert "Traceback" in before.stderr
    assert "Traceback" not in run("targets", "nothing").stderr
    assert run("-V").stdout == run("--version").stdout


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.has_colour(Terminal())
    assert not console.has_colour(io.StringIO())
    error = UserError("CX101", "no \x1b[31mfile", "look")
    assert verbs.message(error, colour=True) == (
        "\x1b[1;31merror[CX101]\x1b[0m: no \\x1b[31mfile\n\n\x1b[36mhint\x1b[0m: look\n"
    )
    assert "\x1b" not in verbs.message(error)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not console.has_colour(Terminal())


def test_an_interruption_that_a_verb_hands_on_is_one(call: Callable[..., tuple[int, str, str]]) -> None:
    """A server takes SIGINT itself, closes in order and hands it on."""

    def body() -> None:
        raise verbs.SignalledError(signal.SIGINT)

    code, _, err = call(body)
    assert code == 130 and "error[CX002]: interrupted" in err
