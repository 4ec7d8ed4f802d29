"""Help, tables and messages as they are at 80 and 120 columns. To accept a change: UPDATE_SNAPSHOTS=1."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from cosmos_export import cli

FOLDER = Path(__file__).with_name("snapshots")


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every verb, and every group of them."""
    found = [path]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, (*path, name))
    return found


HELP = commands(typer.main.get_command(cli.app))
TABLES: dict[str, tuple[str, ...]] = {
    "plan": ("plan", "--like", "nano", "--target", "rtx-pro-6000,l40s,h100", "--workload", "t2v-480p-189f"),
    "plan-nothing-fits": ("plan", "--like", "super", "--target", "l40s", "--workload", "t2v-720p-189f"),
    "targets": ("targets",),
    "targets-l40s": ("targets", "l40s"),
    "recipes-ls": ("recipes", "ls"),
    "recipes-show": ("recipes", "show", "fp8-attention"),
    "recipes-choose": ("recipes", "choose", "--like", "nano", "--target", "rtx-pro-6000"),
    "explain": ("explain", "CX607"),
    "error": ("plan", "--like", "nano", "--target", "rtx-pro-600"),
    "error-choice": ("plan", "--like", "nano", "--loop", "hots"),
    "error-usage": ("plan", "--lik", "nano"),
}


def compare(name: str, width: int, text: str) -> None:
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    long = [line for line in text.splitlines() if len(line) > width and " " in line.strip()]
    if not name.startswith("error"):  # a message is one line, which the terminal wraps
        assert not long, "lines that are wider than the terminal"
    path = FOLDER / str(width) / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command in this process, as `main` ends it; returns what it printed."""

    def run(arguments: tuple[str, ...], width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["cosmos-export", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        out, err = capsys.readouterr()
        return out + err

    return run


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("path", HELP, ids=[" ".join(path) or "cosmos-export" for path in HELP])
def test_help(path: tuple[str, ...], width: int, printed: Callable[..., str]) -> None:
    text = printed((*path, "--help"), width)
    assert not re.search(r"<(str|int|float|path)>|<list", text), "a value without a name of its own"
    compare("-".join(("help", *path)), width, text)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_tables_and_messages(name: str, width: int, printed: Callable[..., str]) -> None:
    compare(name, width, printed(TABLES[name], width))


def test_no_snapshot_is_left_over() -> None:
    names = {"-".join(("help", *path)) for path in HELP} | set(TABLES)
    assert {path.stem for path in FOLDER.rglob("*.txt")} == names
