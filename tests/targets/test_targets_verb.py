"""``cosmos-export targets``."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from cosmos_export.cli import console, verbs
from cosmos_export.cli.targets import register
from cosmos_export.targets import target_names


@pytest.fixture
def app() -> typer.Typer:
    console.configure()  # or it would print to the stream of the test before
    application = verbs.Verbs()
    application.callback()(lambda: None)
    register(application)
    return application


def test_json_is_one_document(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["targets", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [target["name"] for target in document["targets"]] == list(target_names())
    by_name = {target["name"]: target for target in document["targets"]}
    assert (by_name["h100"]["backend"], by_name["h100"]["other_backends"]) == ("inductor", ["tensorrt"])
    assert by_name["cpu"]["compute_capability"] is None


def test_table_names_every_target(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["targets"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in target_names())


def test_one_target_shows_its_traps(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["targets", "l40s"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "8.9" in result.stdout and "trap " in result.stdout and "source " in result.stdout


def test_unknown_target(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["targets", "l40"])
    assert result.exit_code == 2 and "CX401" in result.output and "l40s" in result.output
