"""Command lines of help and of pages, as the real parser takes them: no unknown verb, option or name. None is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cosmos_export import cli
from cosmos_export.cli import choices

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*s/README.md")])
COMMAND: Any = typer.main.get_command(cli.app)


def verbs(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb with its command, groups left out."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name), command


def parse(line: str, whole: bool = True) -> tuple[str, ...]:
    """The verb of ``line``. Raises what the parser raises. ``whole``: arguments that must be given are."""
    program, *words = shlex.split(line, comments=True)
    assert program == "cosmos-export"
    command, path, parent = COMMAND, [program], None
    while True:
        context = command.make_context(path[-1], list(words), parent=parent, resilient_parsing=not whole)
        if not hasattr(command, "commands"):
            break
        words = [*context._protected_args, *context.args]
        if not words:
            break
        name, command, words = command.resolve_command(context, words)
        parent = context
        path.append(name)
    assert not context.args, f"more than it takes: {context.args}"
    for parameter, registry in getattr(command, "names", {}).items():
        require_names(registry, context.params[parameter])
    return tuple(path[1:])


def require_names(registry: str, value: Any) -> None:
    """Values are names of ``registry``, or words in capitals that stand for one, or files."""
    given = value if isinstance(value, list) else (value or "").split(",")
    known = {*choices.names(registry), "auto" if registry == "recipes" else ""}
    strangers = {one for one in given if one not in known and not one.isupper() and "." not in one} - {"verb_object"}
    assert not strangers or value is None, f"{strangers} not in {registry}"


@pytest.mark.parametrize(("path", "command"), [pytest.param(*one, id=" ".join(one[0])) for one in verbs(COMMAND)])
def test_every_verb_has_two_examples_that_parse(path: tuple[str, ...], command: Any) -> None:
    assert len(command.examples) >= 2
    assert [parse(example) for example in command.examples] == [path] * len(command.examples)


def in_blocks(text: str) -> Iterator[str]:
    """Command lines of code blocks, indented or between fences, continuations joined."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = "\n".join(line.strip() for line in text.splitlines() if line.startswith("    "))
    for block in (fenced, indented):
        yield from re.findall(r"^cosmos-export .*$", re.sub(r"\\\n\s*", "", block), re.MULTILINE)


def in_sentences(text: str) -> Iterator[str]:
    """Command lines between backticks, one for each of ``ls|why``. They may leave out what must be given."""
    for line in re.findall(r"`(cosmos-export [^`]+)`", text):
        words = [word for word in line.split() if word not in ("…", "...")]
        for one in words[-1].split("|"):
            yield " ".join([*words[:-1], one])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_command_lines_of_pages_parse(page: Path) -> None:
    text = page.read_text("utf-8")
    wrong = []
    for lines, whole in ((in_blocks(text), True), (in_sentences(text), False)):
        for line in lines:
            try:
                parse(line.replace("…", ""), whole and "…" not in line)
            except (typer.TyperException, AssertionError, ValueError) as error:
                wrong.append(f"{line}: {error}")
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "cosmos-export biuld x", "cosmos-export build x -o y --tagret cpu", "cosmos-export build x -o y --target h101",
        "cosmos-export bundle vreify x", "cosmos-export build -o y", "cosmos-export targets a b c",
        "cosmos-export plan --like nano --loop hots", "cosmos-export build x -o y --steps many",
    ],
)  # fmt: skip
def test_a_wrong_line_is_found(line: str) -> None:
    with pytest.raises((typer.TyperException, AssertionError)):
        parse(line)
