"""The recipe that is chosen for a target and workloads, by the numbers of the plan."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cosmos_export.cli import app
from cosmos_export.plan import choose, offered_bytes, parse_workload, published_subject
from cosmos_export.plan.choose import NEAR, Tried
from cosmos_export.sampling import Overrides, resolve_schedule
from cosmos_export.targets import load_target, target_names


def chosen(like: str, target: str, *workloads: str) -> tuple[str, dict[str, Tried]]:
    subject, on = published_subject(like), load_target(target)
    asked = [parse_workload(text) for text in workloads]
    schedules = [resolve_schedule(subject.sampling, w.mode, Overrides()) for w in asked]
    recipe, tried = choose(subject, on, asked, schedules, offered_bytes(on))
    return recipe.name, {one.recipe.name: one for one in tried}


def test_the_fastest_that_fits_is_chosen() -> None:
    name, tried = chosen("nano", "rtx-pro-6000", "t2v-480p-189f")
    assert name == "fp8"
    times = {n: one.relative_s for n, one in tried.items() if one.relative_s is not None}
    assert times["fp8"] == pytest.approx(min(times.values()), rel=NEAR - 1)
    # `memory` is as fast, and has fewer bits.
    assert times["memory"] == pytest.approx(times["fp8"], rel=0.02)
    assert (tried["memory"].weights_bytes or 0) < (tried["fp8"].weights_bytes or 0)


def test_what_does_not_fit_is_passed_over() -> None:
    """Super on a card of 48 GB: only INT4 weights are there at once."""
    name, tried = chosen("super", "l40s", "t2v-480p-189f")
    assert name == "int4" and tried["fp8"].fit == "phases" and tried["bf16"].fit == "no"
    policy, tried = chosen("super", "l40s", "policy-droid")
    assert policy in ("fp8", "memory") and tried["int4"].refusal == "not for policy"


def test_targets_without_fp8_and_without_a_measured_efficiency() -> None:
    for target in target_names():
        name, tried = chosen("edge", target, "t2i-480p")
        assert not tried[name].refusal
        assert tried["fp4"].refusal == tried["fp8-attention"].refusal == "experimental"
    assert chosen("nano", "cpu", "t2v-256p-17f")[0] == "bf16"


def test_the_command() -> None:
    arguments = ["recipes", "choose", "--like", "nano", "--target", "rtx-pro-6000"]
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert document["chosen"] == "fp8"
    assert {row["recipe"] for row in document["tried"]} >= {"bf16", "fp8", "int4", "memory"}
    assert "fp8 (chosen)" in CliRunner().invoke(app, arguments).stdout
    unknown = CliRunner().invoke(app, ["recipes", "choose", "--like", "nano", "--target", "dgx-spark"])
    assert "rates are not published" in unknown.stdout
    both = CliRunner().invoke(app, ["recipes", "choose"])
    assert both.exit_code == 2
