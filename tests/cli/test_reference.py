"""Pages that are made from declarations: docs/reference.md of options, docs/json.md and its schema of documents.

To accept a change: UPDATE_DOCS=1.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from cosmos_export import cli, documents, options, verb_options
from cosmos_export.bundle import Manifest
from cosmos_export.calibration.algorithms import ALGORITHMS
from cosmos_export.calibration.formats import FORMATS
from cosmos_export.cli import choices
from cosmos_export.cli.verbs import SHARED
from cosmos_export.compiler.selection import COMPONENTS
from cosmos_export.diagnostics import InternalError
from cosmos_export.option_fields import Option, described, flat
from cosmos_export.plan import parse_workload
from cosmos_export.runtime.embodiments import METHODS
from cosmos_export.runtime.prompts import VIEWPOINTS
from cosmos_export.sampling import DEFAULT_MODE, Schedule
from cosmos_export.sampling.action_canvas import ACTION_BINS
from cosmos_export.sampling.schedule import GRIDS

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = {
    "build": "cosmos_export.compile",
    "plan": "cosmos_export.plan",
    "calibrate": "cosmos_export.calibrate",
    "quantize": "cosmos_export.quantize",
    "run": "Model.generate",
}


def verbs_of(group: Any, path: str = "") -> dict[str, Any]:
    """Verb → its command."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = verbs_of(command, f"{path}{name} ") if hasattr(command, "commands") else {f"{path}{name}": command}
        found |= inner
    return found


COMMANDS = verbs_of(typer.main.get_command(cli.app))


def reference() -> str:
    lines = [
        "# Options",
        "",
        "Every option of every verb, and the argument of the Python function that is the same. An option is one field",
        "of a record in `cosmos_export/options.py` or `cosmos_export/verb_options.py`, with its docstring. This page,",
        "help and completion of the command line, and the entries of a bundle's manifest are made from these fields",
        "(`UPDATE_DOCS=1 pytest tests/cli/test_reference.py`). All verbs also take `--json`, `--quiet`, `--verbose`",
        "and `--no-progress`.",
    ]
    for verb, command in COMMANDS.items():
        given = list(flat(command.record))
        lines += ["", f"## {verb}", ""]
        if not given:
            lines.append("No options of its own.")
            continue
        function = FUNCTIONS.get(verb)
        columns = {"option": written, "argument": argument, "default": shown, "manifest": kept, "": explained}
        if function is not None:
            lines += [f"Python: `{function}`", ""]
        else:
            del columns["argument"]
        if verb != "build":
            del columns["manifest"]
        lines += [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(cell(option) for cell in columns.values())} |" for option in given]
    return "\n".join(lines) + "\n"


def written(option: Option) -> str:
    flags = option.cli.metavar if option.cli.argument else ", ".join(option.flags)
    values = f" {' or '.join(option.choices)}" if option.choices else ""
    return f"`{flags}`{values}".replace("|", "\\|")


def argument(option: Option) -> str:
    return f"`{option.name}`"


def kept(option: Option) -> str:
    where = option.cli.manifest
    return "" if where is None else f"`{where}.{option.name}`" if where == "options" else f"`{where}`"


def explained(option: Option) -> str:
    return option.text.replace("|", "\\|")


def shown(option: Option) -> str:
    if option.default is dataclasses.MISSING:
        return "required"
    if option.cli.shown_default is not None and not isinstance(option.default, tuple):
        return option.cli.shown_default
    if option.default in (None, ()):
        return ""
    value = option.default if option.cli.scale is None else option.default // option.cli.scale
    return f"`{','.join(value) if isinstance(value, tuple) else value}`"


def json_page() -> str:
    lines = [
        "# JSON documents",
        "",
        "With `--json` a command prints one document on stdout. Each says what it is (`document`) and its",
        "`version`, which grows when a field changes its meaning or goes; fields may be added without. This page and",
        "its JSON Schema [json.schema.json](json.schema.json) are made from `cosmos_export/documents.py`",
        "(`UPDATE_DOCS=1 pytest tests/cli/test_reference.py`).",
    ]
    for name, document in documents.DOCUMENTS.items():
        lines += ["", f"## {name}, version {document.version}", "", f"Printed by: {document.command}.", ""]
        lines += ["| field | type | |", "|---|---|---|"]
        for field, declared in document.fields.items():
            kind, _, text = declared.partition(": ")
            optional = " (may be absent)" if field.endswith("?") else ""
            lines.append(f"| `{field.removesuffix('?')}` | {kind.replace('|', ' or ')} | {text}{optional} |")
    return "\n".join(lines) + "\n"


PAGES = {
    "docs/reference.md": reference,
    "docs/json.md": json_page,
    "docs/json.schema.json": lambda: json.dumps(documents.schema(), indent=2, ensure_ascii=False) + "\n",
}


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_those_of_the_declarations(name: str) -> None:
    text = PAGES[name]()
    if os.environ.get("UPDATE_DOCS"):
        (ROOT / name).write_text(text, encoding="utf-8")
    assert (ROOT / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_is_a_field_with_a_docstring(verb: str) -> None:
    options_of = list(flat(COMMANDS[verb].record))
    assert [option.name for option in options_of if not option.text] == []
    names = [parameter.name for parameter in COMMANDS[verb].params]
    assert [name for name in names if name not in (*SHARED, "help")] == [option.name for option in options_of]


def test_every_option_of_a_build_that_changes_the_bundle_is_in_its_manifest() -> None:
    """What is not in it names nothing but files and the way of working."""
    absent = {option.name for option in described(options.BuildOptions) if option.cli.manifest is None}
    assert absent == {"output", "until", "dump", "force", "resume", "cache", "graphs"}
    parts = {field.name for field in dataclasses.fields(Manifest)}
    for option in described(options.BuildOptions):
        assert (option.cli.manifest or "options").partition(".")[0] in parts, option.name
    schedule = {f"options.schedule.{field.name}" for field in dataclasses.fields(Schedule)}
    named = {option.cli.manifest or "" for option in described(options.BuildOptions)}
    assert {one for one in named if one.startswith("options.schedule.")} <= schedule


def test_values_that_are_declared_elsewhere() -> None:
    assert options.BuildOptions.mode == DEFAULT_MODE
    (grid,) = (option for option in described(options.Overrides) if option.name == "grid")
    assert set(grid.choices) == set(GRIDS) - {"distilled"}
    parse_workload(options.WORKLOAD)


def test_names_in_texts_are_those_of_their_registries() -> None:
    """Help must not import what is heavy, so that these stand in the text."""
    listed: dict[tuple[type, str], Collection[str]] = {
        (options.CalibrateOptions, "observer"): get_args(options.ObserverMethod),
        (options.CalibrateOptions, "algorithm"): ALGORITHMS,
        (options.GenerateOptions, "viewpoint"): VIEWPOINTS,
        (options.GenerateOptions, "action_normalization"): METHODS,
        (options.GenerateOptions, "tier"): [str(tier) for tier in ACTION_BINS],
        (options.BuildOptions, "components"): COMPONENTS,
        (verb_options.PolicyOptions, "action_normalization"): METHODS,
    }
    for (record, field), names in listed.items():
        (option,) = (option for option in described(record) if option.name == field)
        listing = re.split(r"[:.] ", re.sub(r" \(.*?\)", "", f"{option.text} "))[1]
        words = set(re.findall(r"\w[\w-]*", listing)) - {"or", "all", "none"}
        assert words == set(names) - {"none"}, field


@pytest.mark.parametrize("verb", COMMANDS)
def test_defaults_are_names_of_their_registries(verb: str) -> None:
    for option in flat(COMMANDS[verb].record):
        if option.cli.names is not None and option.default not in (None, dataclasses.MISSING):
            given = option.default if isinstance(option.default, tuple) else (option.default,)
            assert set(given) <= set(choices.names(option.cli.names)), option.name
    assert choices.names("formats") == FORMATS


def test_documents_that_differ_from_their_declaration_are_refused() -> None:
    good = {"entries": []}
    assert documents.labelled("cache-ls", good) == {"document": "cache-ls", "version": 1, "entries": []}
    for wrong in ({}, {"entries": [], "more": 1}, {"entries": "text"}, {"entries": True}):
        with pytest.raises(InternalError, match="CX001"):
            documents.labelled("cache-ls", wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        ("targets",), ("recipes", "ls"), ("recipes", "show", "fp8"), ("recipes", "choose", "--like", "nano"),
        ("plan", "--like", "nano"), ("explain", "CX607"), ("version",), ("cache", "ls", "--cache", "nothing"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_documents_say_what_they_are(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (schema,) = (one for one in documents.schema()["oneOf"] if one["title"] == found["document"])
    assert found["version"] == schema["properties"]["version"]["const"]
    assert set(schema["required"]) <= set(found) <= set(schema["properties"])


def test_completion_knows_the_names_of_registries() -> None:
    def complete(words: str) -> set[str]:
        environment = {
            "_COSMOS_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": f"cosmos-export {words}",
            "COMP_CWORD": str(len(words.split(" "))),
        }  # fmt: skip
        result = CliRunner().invoke(cli.app, [], prog_name="cosmos-export", env=environment)
        return set(result.stdout.split())

    assert {"build", "bundle", "bench"} == complete("b")
    assert {"rtx-5090", "rtx-pro-6000"} == complete("build --target r")
    assert {"h100", "h200"} == complete("plan --target h")
    assert {"l40s,h100", "l40s,h200"} == complete("plan --target l40s,h")
    assert {"host", "device"} == complete("build --loop ")
    assert "fp8-attention" in complete("build --recipe fp8")
    assert "vae-decoder" in complete("build --components va")
