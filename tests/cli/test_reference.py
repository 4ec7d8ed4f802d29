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

from cosmos_export import cli, documents, options
from cosmos_export.calibration.algorithms import ALGORITHMS
from cosmos_export.calibration.formats import FORMATS
from cosmos_export.calibration.observers import Method
from cosmos_export.cli import choices
from cosmos_export.compiler.selection import COMPONENTS
from cosmos_export.diagnostics import InternalError
from cosmos_export.option_fields import Option, described
from cosmos_export.plan import parse_workload
from cosmos_export.runtime.canvas import ACTION_BINS
from cosmos_export.runtime.embodiments import METHODS
from cosmos_export.runtime.prompts import VIEWPOINTS
from cosmos_export.sampling import DEFAULT_MODE
from cosmos_export.sampling.schedule import GRIDS

ROOT = Path(__file__).resolve().parents[2]
RECORDS = {
    "build": (options.BuildOptions, "cosmos_export.compile"),
    "plan": (options.PlanOptions, "cosmos_export.plan"),
    "calibrate": (options.CalibrateOptions, "cosmos_export.calibrate"),
    "quantize": (options.QuantizeRequest, "cosmos_export.quantize"),
    "run": (options.GenerateOptions, "Model.generate"),
}


def flat(record: type) -> list[Option]:
    found = []
    for option in described(record):
        if dataclasses.is_dataclass(option.kind):
            found += flat(option.kind)  # type: ignore[arg-type]
        elif not option.cli.hidden:
            found.append(option)
    return found


def reference() -> str:
    lines = [
        "# Options",
        "",
        "Every option of the verbs that make something, and the argument of the Python function that is the same.",
        "An option is one field of a record in `cosmos_export/options.py`, with its docstring; this page is made from",
        "them (`UPDATE_DOCS=1 pytest tests/cli/test_reference.py`).",
    ]
    for verb, (record, function) in RECORDS.items():
        lines += [
            "",
            f"## {verb}",
            "",
            f"Python: `{function}`",
            "",
            "| option | argument | default | |",
            "|---|---|---|---|",
        ]
        for option in flat(record):
            flags = option.cli.metavar if option.cli.argument else ", ".join(option.flags)
            values = f" {' or '.join(option.choices)}" if option.choices else ""
            lines.append(
                f"| `{flags}`{values} | `{option.name}` | {shown(option)} | {option.text.replace('|', chr(92) + '|')} |"
            )
    return "\n".join(lines) + "\n"


def shown(option: Option) -> str:
    if option.default is dataclasses.MISSING:
        return "required"
    if option.default is None or option.default == ():
        return ""
    value = option.default
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


@pytest.mark.parametrize("verb", RECORDS)
def test_every_option_has_a_docstring_and_is_an_option_of_the_verb(verb: str) -> None:
    command: Any = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    names = {parameter.name for parameter in command.params}
    for option in flat(RECORDS[verb][0]):
        assert option.text, option.name
        assert option.name in names


def test_values_that_are_declared_elsewhere() -> None:
    assert options.BuildOptions.mode == DEFAULT_MODE
    (grid,) = (option for option in described(options.Overrides) if option.name == "grid")
    assert set(grid.choices) == set(GRIDS) - {"distilled"}
    parse_workload(options.WORKLOAD)


def test_names_in_texts_are_those_of_their_registries() -> None:
    """Help must not import what is heavy, so that these stand in the text."""
    listed: dict[tuple[type, str], Collection[str]] = {
        (options.CalibrateOptions, "observer"): get_args(Method),
        (options.CalibrateOptions, "algorithm"): ALGORITHMS,
        (options.GenerateOptions, "viewpoint"): VIEWPOINTS,
        (options.GenerateOptions, "action_normalization"): METHODS,
        (options.GenerateOptions, "tier"): [str(tier) for tier in ACTION_BINS],
        (options.BuildOptions, "components"): COMPONENTS,
    }
    for (record, field), names in listed.items():
        (option,) = (option for option in described(record) if option.name == field)
        listing = re.split(r"[:.] ", re.sub(r" \(.*?\)", "", f"{option.text} "))[1]
        words = set(re.findall(r"\w[\w-]*", listing)) - {"or", "all", "none"}
        assert words == set(names) - {"none"}, field


@pytest.mark.parametrize("record", [record for record, _ in RECORDS.values()])
def test_defaults_are_names_of_their_registries(record: type) -> None:
    for option in flat(record):
        if option.cli.names is not None and option.default not in (None, dataclasses.MISSING):
            given = option.default if isinstance(option.default, tuple) else (option.default,)
            assert set(given) <= set(choices.names(option.cli.names)), option.name
    assert choices.names("observers") == get_args(Method)
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
