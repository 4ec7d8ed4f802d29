"""Recipes as data: strict, without contradictions, and refused where a target would only pretend to run them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cosmos_export.cli import app, console
from cosmos_export.diagnostics import CosmosExportError, InternalError, UnsupportedError, UserError
from cosmos_export.precision.recipe import (
    Assignment,
    load_recipe,
    parse_recipe,
    parse_rule,
    recipe_names,
    resolve_recipe,
)
from cosmos_export.precision.sites import LINEARS
from cosmos_export.targets import load_target

RTX = "rtx-pro-6000"
VALID = """
title = "a recipe"
summary = "for a test"
experimental = false
not_for = []
warning = ""
source = []
[[rules]]
where = ["gen.mlp"]
scheme = "fp8"
"""


def resolved(
    name: str, *overrides: str, target: str = RTX, layers: int = 4, steps: int = 10, distilled: bool = False
) -> Assignment:
    recipe = load_recipe(name)
    return resolve_recipe(recipe, overrides, load_target(target), layers=layers, steps=steps, distilled=distilled)


def test_every_recipe_loads_and_runs_somewhere() -> None:
    assert recipe_names() == ("bf16", "fp4", "fp8", "fp8-attention", "int4", "memory")
    for name in recipe_names():
        assert resolved(name).recipe == name


def test_the_published_layout() -> None:
    found = resolved("fp8")
    for kind in LINEARS:
        assert set(found.over_steps("und", kind, 2)) == {"fp8-w8a16"}
        assert found.over_steps("gen", kind, 2) == ("fp8-w8a16",) * 3 + ("fp8",) * 4 + ("fp8-w8a16",) * 3
    assert found.over_steps("gen", "attention.core", 2) == ("bf16",) * 10
    assert found.step_keys() == (0, 0, 0, 1, 1, 1, 1, 0, 0, 0)
    assert found.needs_calibration and not resolved("int4").needs_calibration
    assert found.table()["gen.mlp.down@3:7"] == "fp8" and found.table()["und.attention.out"] == "fp8-w8a16"


@pytest.mark.parametrize(("steps", "distilled"), [(1, False), (4, True)])
def test_distilled_models_and_single_steps_do_not_mix(steps: int, distilled: bool) -> None:
    found = resolved("fp8", steps=steps, distilled=distilled)
    assert found.over_steps("gen", "mlp.down", 0) == ("fp8",) * steps


def test_short_schedules_are_all_a16() -> None:
    assert set(resolved("fp8", steps=6).over_steps("gen", "mlp.down", 0)) == {"fp8-w8a16"}


def test_overrides_come_last() -> None:
    found = resolved("fp8", "gen.mlp.down[-1:]=bf16", "gen.attention.qkv=fp8-w8a16", "und=bf16")
    assert found.over_steps("gen", "mlp.down", 3) == ("bf16",) * 10
    assert found.over_steps("gen", "mlp.down", 2) == resolved("fp8").over_steps("gen", "mlp.down", 2)
    assert set(found.over_steps("gen", "attention.qkv", 0)) == {"fp8-w8a16"}
    assert found.scheme("und", "mlp.down", 0) == "bf16"
    assert found.table()["gen.mlp.down[0:3]@3:7"] == "fp8" and "und.mlp.down" not in found.table()
    assert resolved("bf16", "gen.mlp.down=fp8", "gen.mlp.down=fp8").table() == {"gen.mlp.down": "fp8"}


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("gen.mlp.down", "CX353", "not PLACE=SCHEME"),
        ("vae.mlp=fp8", "CX353", "towers: und, gen"),
        ("gen.conv=fp8", "CX353", "no kind `conv`"),
        ("gen.ml=fp8", "CX353", "no kind `ml`"),
        ("gen.mlp=fp9", "CX353", "no scheme `fp9`"),
        ("gen.mlp[3:3]=fp8", "CX353", "is empty"),
        ("gen.mlp[1]=fp8", "CX353", "not a range"),
        ("gen.mlp[4:]=bf16", "CX353", "no such layer"),
        ("gen.mlp@10:=fp8", "CX353", "no such step"),
        ("und@0:3=bf16", "CX353", "no steps"),
        ("gen.mlp=fp8-attention", "CX353", "mlp.gate_up takes"),
        ("gen.attention.core=fp8", "CX353", "attention.core takes"),
        ("und.attention.core=fp8-attention", "CX353", "only `gen` has"),
        ("gen.attention.kv=fp8", "CX353", "only `und` has"),
        ("und.attention.kv=int4", "CX353", "attention.kv takes bf16, fp8"),
        ("gen.mlp@0:3=bf16", "CX354", "stored twice"),
        ("gen.mlp.down@5:6=int4", "CX354", "stored twice"),
        ("gen.mlp=mxfp8", "CX352", "dequantized"),
        ("gen.mlp=nvfp4-w4a16", "CX352", "dequantized by a separate kernel"),
    ],
)
def test_overrides_that_are_refused(override: str, code: str, message: str) -> None:
    with pytest.raises(CosmosExportError) as caught:
        resolved("fp8", override)
    assert caught.value.code == code and message in caught.value.message and caught.value.hint


def test_what_the_reasoner_hands_on_is_a_place_of_its_own() -> None:
    found = resolved("bf16", "und.attention.kv[1:3]=fp8")
    assert found.table() == {"und.attention.kv[1:3]": "fp8"} and found.needs_calibration
    assert "und.attention.kv" not in resolved("fp8", "und.attention=fp8").table()


def test_overrides_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match="contradict each other"):
        resolved("fp8", "gen.mlp=bf16", "gen.mlp=fp8")


@pytest.mark.parametrize("target", ["l40s", "h100", "cpu"])
def test_a_recipe_for_a_target_that_cannot_run_it(target: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolved("fp4", target=target)
    assert caught.value.code == "CX352" and "nvfp4" in caught.value.message and caught.value.exit_code == 3
    assert load_target(target).refused["nvfp4"] in caught.value.message


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("fp8-attn")
    assert caught.value.code == "CX350" and "fp8-attention" in caught.value.hint


@pytest.mark.parametrize("name", ["../cpu", "", "zzz"])
def test_names_are_looked_up_not_opened(name: str) -> None:
    with pytest.raises(UserError, match="unknown recipe"):
        load_recipe(name)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "a recipe"', 'title = "a recipe"\ncolour = "green"', "colour"),
        ("source = []\n", "", "source"),
        ("experimental = false", 'experimental = "no"', "not a bool"),
        ('scheme = "fp8"', 'scheme = "fp8"\nbits = 8', "a rule has"),
        ('where = ["gen.mlp"]', 'where = "gen.mlp"', "a rule has"),
        ("gen.mlp", "gen.fc", "no kind"),
        ('scheme = "fp8"', 'scheme = "fp8"\n[[rules]]\nwhere = ["gen.mlp"]\nscheme = "bf16"', "contradict"),
        ("title", "= title", "TOML"),
    ],
)
def test_a_wrong_recipe_fails(old: str, new: str, message: str) -> None:
    with pytest.raises(InternalError, match=message) as caught:
        parse_recipe("test", VALID.replace(old, new, 1))
    assert caught.value.code == "CX351"
    assert parse_recipe("test", VALID).schemes == ("fp8",)


def test_rules_print_as_they_are_written() -> None:
    assert str(parse_rule(" gen.mlp[0:2]@-3: = fp8 ")) == "gen.mlp[0:2]@-3:=fp8"


# -- the verb ---------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> str:
    console.configure()
    result = CliRunner().invoke(app, ["recipes", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_ls() -> None:
    assert all(name in invoke("ls") for name in recipe_names())
    names = [recipe["name"] for recipe in json.loads(invoke("ls", "--target", "l40s", "--json"))["recipes"]]
    assert "fp4" not in names and {"fp8", "fp8-attention", "int4", "memory"} <= set(names)


def test_show() -> None:
    text = invoke("show", "int4")
    assert "52 %" in text and "gen" in text and "runs on " in text
    document = json.loads(invoke("show", "fp4", "--json"))["recipe"]
    assert document["experimental"] and "nvfp4" in document["refused"]["l40s"]
