"""stdout is data, stderr is the rest; progress is bars on a terminal and few lines elsewhere."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from cosmos_export import cli
from cosmos_export.cli import console
from cosmos_export.cli.verbs import message
from cosmos_export.diagnostics import UserError
from cosmos_export.progress import Silent


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def piped() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=console.PIPED_WIDTH, force_terminal=False), stream


def run_task(step_s: float, steps: int = 100, total: int | None = 100) -> list[str]:
    target, stream = piped()
    clock = Clock()
    progress = console.RichProgress(target, clock)
    progress.begin("hash", total)
    for i in range(1, steps + 1):
        clock.now += step_s
        progress.update("hash", i)
    progress.end("hash")
    return stream.getvalue().splitlines()


def test_one_line_for_each_tenth() -> None:
    lines = run_task(step_s=1.0)
    assert len(lines) == 11
    assert lines[0] == "hash: 10 % (10 s, about 90 s left)"
    assert lines[-2] == "hash: 100 % (100 s)"
    assert lines[-1] == "hash: done in 100 s"


def test_quick_work_says_nothing() -> None:
    assert run_task(step_s=0.001) == []


def test_lines_come_at_most_once_a_second() -> None:
    lines = run_task(step_s=0.03)
    assert 2 <= len(lines) <= 4


def test_slow_work_keeps_talking() -> None:
    lines = run_task(step_s=20.0, steps=9)
    assert len(lines) >= 5
    assert lines[0] == "hash: 2 % (40 s, about 33 min left)"


def test_unknown_total() -> None:
    lines = run_task(step_s=20.0, steps=4, total=None)
    assert lines == ["hash: 2 done (40 s)", "hash: 4 done (80 s)", "hash: done in 80 s"]


def test_an_empty_task() -> None:
    assert run_task(step_s=0.0, steps=0, total=0) == []


def test_a_task_inside_another_is_named_by_its_lines() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = console.RichProgress(Console(file=stream, width=200), clock=lambda: now[0])
    progress.begin("build", 10)
    for completed, task in enumerate(("capture", "weights", "engine"), start=1):
        progress.begin(task, 4)
        now[0] += 20
        progress.update(task, 2)
        progress.update("build", completed)
        progress.end(task)
    progress.end("build")
    assert stream.getvalue().splitlines() == [
        "build: 10 % (20 s, about 3 min left): capture",
        "build: 20 % (40 s, about 3 min left): weights",
        "build: 30 % (60 s, about 2 min left): engine",
        "build: done in 60 s",
    ]


def test_bars_on_a_terminal() -> None:
    stream = io.StringIO()
    progress = console.RichProgress(Console(file=stream, force_terminal=True, width=100))
    progress.begin("build [generator]", 10)
    progress.begin("inner")
    progress.update("build [generator]", 5)
    progress.update("inner", 1)
    assert progress._bars is not None
    progress._bars.refresh()
    progress.end("inner")
    progress.end("build [generator]")
    shown = stream.getvalue()
    assert "build [generator]" in shown, "a name is not markup"
    assert "50%" in shown


def test_updates_of_unknown_tasks_are_ignored() -> None:
    for terminal in (True, False):
        progress = console.RichProgress(Console(file=io.StringIO(), force_terminal=terminal))
        progress.update("never begun", 1)
        progress.end("never begun")


@pytest.mark.parametrize("setting", ["quiet", "no_progress"])
def test_no_progress(setting: str) -> None:
    console.configure(**{setting: True})
    assert isinstance(console.progress(), Silent)
    console.configure()
    assert isinstance(console.progress(), console.RichProgress)


def test_log_levels(capsys: pytest.CaptureFixture[str]) -> None:
    def lines(**settings: bool) -> list[str]:
        console.configure(**settings)
        console.log("debug", logging.DEBUG)
        console.log("info")
        logging.getLogger("cosmos_export.compiler").warning("from the library: %s", "[x]")
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()

    assert lines() == ["info", "warning: from the library: [x]"]
    assert lines(quiet=True) == ["warning: from the library: [x]"]
    assert lines(verbose=True) == ["debug: debug", "info", "warning: from the library: [x]"]


def test_quiet_silences_good_verdicts_only(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    console.verdict("PASS", ok=True)
    console.verdict("FAIL", ok=False)
    assert capsys.readouterr() == ("", "FAIL\n")


def test_no_colour_in_a_pipe_nor_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.configure()
    console.out().print("plain", style="red")
    assert capsys.readouterr().out == "plain\n"
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.configure()
    console.out().print("plain", style="red")
    assert "31m" not in capsys.readouterr().out


def test_wide_output_in_a_pipe_is_not_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    console.configure()
    console.out().print("x" * 150 + " " + "y" * 40)
    assert len(capsys.readouterr().out.splitlines()) == 1


class _Kind(Enum):
    FP8 = "fp8"


@dataclass(frozen=True)
class _Inner:
    kind: _Kind
    path: Path


@dataclass(frozen=True)
class _Outer:
    inner: tuple[_Inner, ...]
    table: Any


def test_emit_json_takes_plain_values_and_dataclasses(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    value = _Outer((_Inner(_Kind.FP8, Path("a/b")),), MappingProxyType({"σ": 1.5, "name": "\udcff"}))
    console.emit_json("cache-ls", {"entries": [value]})
    document = json.loads(capsys.readouterr().out)
    assert (document["document"], document["version"]) == ("cache-ls", 1)
    assert document["entries"][0] == {
        "inner": [{"kind": "fp8", "path": "a/b"}],
        "table": {"σ": 1.5, "name": "\udcff"},
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1j}])
def test_emit_json_refuses_what_json_has_no_form_for(value: object) -> None:
    console.configure()
    with pytest.raises((TypeError, ValueError)):
        console.emit_json("cache-ls", {"entries": [value]})
    assert not console.json_emitted()


HARM = "a\x1b[2Jb\x9b31mc\rd\x07e\u202ef\u2028g\udcffh\x7fi\tj"
SAFE = r"a\x1b[2Jb\x9b31mc\rd\x07e\u202ef\u2028g\udcffh\x7fi"


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_of_a_file_reaches_the_terminal_as_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    # pytest keeps what is logged for its report, which cannot carry half of a character to another process.
    console.configure()
    logger = logging.getLogger("cosmos_export")
    own = [handler for handler in logger.handlers if not type(handler).__module__.startswith("_pytest")]
    monkeypatch.setattr(logger, "handlers", own)
    table = Table(HARM, title=HARM)
    table.add_row(HARM)
    console.out().print(table)
    console.out().print(HARM, soft_wrap=True)
    console.log(HARM)
    console.verdict(HARM, True)
    printed, said = capsys.readouterr()
    assert not set(printed + said) & set("\x9b\r\x07\u202e\u2028\udcff\x7f")
    assert "\x1b[2J" not in printed + said  # on a terminal Rich has escapes of its own
    safe = SAFE.replace(r"\r", "").replace(r"\x07", "")  # Rich drops these itself
    assert said.count(safe) == 2
    assert safe in printed


def test_a_document_is_escaped_and_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    console.emit_json("cache-ls", {"entries": [{HARM: [HARM, "Grüße\n"]}]})
    printed, _ = capsys.readouterr()
    assert not set(printed) & set("\x1b\x9b\r\x07\u202e\u2028\udcff\x7f")
    assert json.loads(printed)["entries"] == [{HARM: [HARM, "Grüße\n"]}]
    assert "Grüße" in printed


def test_an_error_is_escaped() -> None:
    text = message(UserError("CX000", HARM, HARM))
    assert text.count(SAFE) == 2
    assert not set(text) & set("\x1b\x9b\r\x07\u202e\u2028\udcff\x7f")


def test_a_recipe_of_ones_own_is_shown_without_its_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        "title": r'"\u001b[31mred"', "summary": r'"\u009b2J"', "experimental": "false", "warning": r'"\u0007"',
        "not_for": "[]", "source": r'["\u001b]0;title\u0007"]', "rules": "[]",
    }  # fmt: skip
    (tmp_path / "own.toml").write_text("\n".join(f"{key} = {value}" for key, value in lines.items()))
    monkeypatch.setattr("sys.argv", ["cosmos-export", "recipes", "show", str(tmp_path / "own.toml")])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    printed, _ = capsys.readouterr()
    assert not ending.value.code
    assert r"\x1b[31mred" in printed
    assert not set(printed) & set("\x1b\x9b\x07")
