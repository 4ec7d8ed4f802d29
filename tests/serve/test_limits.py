"""Limits of a robot: what passes, what is clipped, what is rejected, and files that are no limits."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.diagnostics import FindingError, UserError
from cosmos_export.runtime.limits import ColumnLimits, Limits, read_limits, review

FPS = 10.0
LIMITS = Limits(
    "raw",
    (
        ColumnLimits("shoulder", -1.0, 1.0, step_per_s=2.0, jump=0.1, clip=True),
        ColumnLimits("elbow", -2.0, 2.0, step_per_s=5.0),
        ColumnLimits("gripper", 0.0, 1.0, clip=True),
    ),
    digest="d" * 64,
)
REST = [0.0, 0.0, 0.5]


def chunk(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


GOOD = chunk([0.0, 0.1, 0.5], [0.1, 0.5, 1.0], [0.3, 1.0, 0.0])


def test_good_actions_pass_bit_for_bit() -> None:
    found = review(GOOD, LIMITS, fps=FPS, state=REST)
    assert (found.verdict, found.breaches, found.unchecked, found.limits) == ("pass", (), (), "d" * 64)
    assert found.actions is not None and found.actions.tobytes() == GOOD.tobytes()
    assert found.require() is found.actions


def test_the_very_bound_passes() -> None:
    actions = chunk([1.0, 2.0, 1.0], [0.8, 1.5, 0.0])
    assert review(actions, LIMITS, fps=FPS, state=[0.9, 2.0, 1.0]).verdict == "pass"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("limits", [LIMITS, None], ids=["limits", "no limits"])
def test_what_is_not_finite_is_always_rejected(value: float, limits: Limits | None) -> None:
    actions = GOOD.copy()
    actions[1, 2] = value  # a column that may be clipped
    found = review(actions, limits, fps=FPS, state=REST)
    assert (found.verdict, found.actions, found.breaches[0].rule) == ("reject", None, "finite")
    assert "in row 1" in str(found.breaches[0])
    with pytest.raises(FindingError, match=r"rejected: finite of .* in row 1") as caught:
        found.require()
    assert caught.value.code == "CX631"


@pytest.mark.parametrize(
    ("rows", "rule", "where"),
    [
        ([[0.0, 2.1, 0.5]], "range", "elbow in row 0"),
        ([[0.0, -2.1, 0.5]], "range", "elbow in row 0"),
        ([[0.0, 0.0, 0.5], [0.0, 0.6, 0.5]], "step", "elbow from row 0 to 1"),
        ([[0.0, 0.0, 0.5], [0.0, 0.4, 0.5], [0.0, -0.2, 0.5]], "step", "elbow from row 1 to 2"),
    ],
)
def test_a_column_that_may_not_be_clipped_rejects(rows: list[list[float]], rule: str, where: str) -> None:
    found = review(chunk(*rows), LIMITS, fps=FPS, state=REST)
    assert (found.verdict, found.actions) == ("reject", None)
    assert [(b.rule, b.where, b.clipped) for b in found.breaches] == [(rule, where, False)]


def test_clipping() -> None:
    actions = chunk([0.5, 0.0, 1.2], [0.9, 0.1, -0.3], [-0.9, 0.2, 0.5])
    found = review(actions, LIMITS, fps=FPS, state=REST)
    assert found.verdict == "clip" and found.actions is not None
    # 0.1 from the state, then at most 0.2 per row; the gripper into its range; the elbow as it was.
    np.testing.assert_allclose(found.actions, [[0.1, 0.0, 1.0], [0.3, 0.1, 0.0], [0.1, 0.2, 0.5]], atol=1e-6)
    assert {(b.rule, b.clipped) for b in found.breaches} == {("jump", True), ("step", True), ("range", True)}
    assert review(found.actions, LIMITS, fps=FPS, state=REST).verdict == "pass"


def test_clipping_that_does_not_help_rejects() -> None:
    """The robot is so far outside that no row near it is inside."""
    found = review(chunk([0.9, 0.0, 0.5]), LIMITS, fps=FPS, state=[1.5, 0.0, 0.5])
    assert found.verdict == "reject"
    assert [b.rule for b in found.breaches] == ["range"]


def test_one_bad_column_rejects_what_another_could_clip() -> None:
    found = review(chunk([0.0, 2.5, 1.5]), LIMITS, fps=FPS, state=REST)
    assert (found.verdict, [b.where for b in found.breaches]) == ("reject", ["elbow in row 0"])


def test_workspace_is_never_clipped() -> None:
    limits = replace(LIMITS, workspace=(("shoulder", -0.5, 0.05),))
    found = review(chunk([0.04, 0.0, 0.5], [0.08, 0.0, 0.5]), limits, fps=FPS, state=REST)
    assert (found.verdict, [b.rule for b in found.breaches]) == ("reject", ["workspace"])


def test_age() -> None:
    limits = replace(LIMITS, max_age_s=0.5)
    assert review(GOOD, limits, fps=FPS, state=REST, age_s=0.5).verdict == "pass"
    for age in (0.51, float("nan"), float("inf")):
        found = review(GOOD, limits, fps=FPS, state=REST, age_s=age)
        assert (found.verdict, [b.rule for b in found.breaches]) == ("reject", ["age"])


def test_what_cannot_be_looked_at_is_said() -> None:
    found = review(GOOD, replace(LIMITS, max_age_s=1.0), fps=FPS)
    assert (found.verdict, found.unchecked) == ("pass", ("jump: no state", "age: no time"))
    assert found.document["unchecked"] == ["jump: no state", "age: no time"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": LIMITS.columns[:2]}, "2 columns, and an action has 3"),
        ({"units": "model"}, "in units `model`, and actions are made in the units of the data"),
    ],
)
def test_limits_of_another_robot(change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        replace(LIMITS, **change).require(3, "raw")  # type: ignore[arg-type]
    assert caught.value.code == "CX632"


@pytest.mark.parametrize("state", [[0.0, 0.0], [0.0, np.nan, 0.0]])
def test_a_state_that_is_none(state: list[float]) -> None:
    with pytest.raises(UserError, match="a state of shape"):
        review(GOOD, LIMITS, fps=FPS, state=state)
    with pytest.raises(UserError, match="per second"):
        review(GOOD, LIMITS, fps=0.0, state=REST)
    with pytest.raises(UserError, match="of shape"):
        review(GOOD[0], LIMITS, fps=FPS, state=REST)


number = st.floats(-3, 3, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(number, number, number), min_size=1, max_size=8), st.tuples(number, number, number))
def test_what_leaves_keeps_every_limit(rows: list[tuple[float, ...]], state: tuple[float, ...]) -> None:
    limits = replace(LIMITS, columns=tuple(replace(column, clip=True) for column in LIMITS.columns))
    for given_limits in (LIMITS, limits):
        found = review(np.array(rows, dtype=np.float32), given_limits, fps=FPS, state=state)
        if found.actions is None:
            assert found.verdict == "reject"
            continue
        made = found.actions.astype(np.float64)
        for i, column in enumerate(given_limits.columns):
            assert made[:, i].min() >= column.low - 1e-4 and made[:, i].max() <= column.high + 1e-4
            if column.step_per_s is not None:
                assert np.abs(np.diff(made[:, i])).max(initial=0) <= column.step_per_s / FPS + 1e-4
            if column.jump is not None:
                assert abs(made[0, i] - state[i]) <= column.jump + 1e-4


def test_a_review_takes_no_time() -> None:
    """A chunk of 32 actions of 8 columns; the bound is many times what it takes, for machines that are busy."""
    columns = tuple(ColumnLimits(f"joint {i}", -3, 3, step_per_s=2, jump=1, clip=True) for i in range(8))
    limits = Limits("raw", columns)
    actions = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    review(actions, limits, fps=15, state=np.zeros(8))
    started = time.process_time()
    for _ in range(20):
        assert review(actions, limits, fps=15, state=np.zeros(8)).verdict == "clip"
    assert (time.process_time() - started) / 20 < 0.02


# -- files ------------------------------------------------------------------------------------------------------------

FILE = """
robot = "Arm"
units = "raw"
max_age_s = 1
[[column]]
name = "x"
low = -1
high = 1.0
max_step_per_s = 2
max_jump = 0.25
clip = true
[[column]]
name = "grip"
low = 0
high = 1
[workspace]
columns = ["x"]
low = [-0.5]
high = [0.5]
"""


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text(FILE)
    found = read_limits(tmp_path / "limits.toml")
    assert found.columns == (ColumnLimits("x", -1.0, 1.0, 2.0, 0.25, True), ColumnLimits("grip", 0.0, 1.0))
    assert (found.units, found.max_age_s, found.robot, found.workspace) == ("raw", 1.0, "Arm", (("x", -0.5, 0.5),))
    assert found.needs_state and len(found.digest) == 64
    (tmp_path / "other.toml").write_text(FILE.replace("0.25", "0.26"))
    assert read_limits(tmp_path / "other.toml").digest != found.digest


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('units = "raw"', "", "has no units"),
        ('units = "raw"', 'units = "degrees"', "`units` is"),
        ("max_age_s = 1", "max_age_s = 0", "`max_age_s` is 0"),
        ("max_age_s = 1", "max_age_s = nan", "finite number"),
        ("max_age_s = 1", "max_age = 1", "has 'max_age'"),
        ("low = -1", "low = 1", "not below"),
        ("low = -1", 'low = "-1"', "finite number"),
        ("low = -1", "low = true", "finite number"),
        ("low = -1", "low = -inf", "finite number"),
        ("max_jump = 0.25", "max_jump = -1", "`max_jump` is -1"),
        ("clip = true", 'clip = "yes"', "of type bool"),
        ('name = "grip"', 'name = "x"', "same name"),
        ('name = "grip"', "name = 3", "of type str"),
        ('columns = ["x"]', 'columns = ["y"]', "not columns of the file"),
        ('columns = ["x"]', "columns = []", "not columns of the file"),
        ("low = [-0.5]", "low = [0.5]", "not below"),
        ("low = [-0.5]", "", "has no low"),
        ("[workspace]", "[workspace", "not TOML"),
        ("low = [-0.5]", f"low = [-1{'0' * 400}]", "a finite number"),
        ("[workspace]", f"[workspace{'.a' * 300}]", "has 300 dots"),
        ("[[column]]", "[column]", "not TOML"),
    ],
)  # fmt: skip
def test_files_that_are_no_limits(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FILE
    (tmp_path / "limits.toml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read_limits(tmp_path / "limits.toml")
    assert caught.value.code == "CX630"
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.toml").write_text('units = "raw"\ncolumn = []\n')
    for name in ("bytes.toml", "empty.toml", "missing.toml", "."):
        with pytest.raises(UserError) as caught:
            read_limits(tmp_path / name)
        assert caught.value.code == "CX630"
