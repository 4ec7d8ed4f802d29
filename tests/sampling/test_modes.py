"""Every mode is declared completely, and everything that asks the declaration finds what it needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cosmos_export.calibration.entries import entry_item
from cosmos_export.checkpoint.published import PUBLISHED
from cosmos_export.evaluation.cases import CASES
from cosmos_export.family import Family
from cosmos_export.options import GenerateOptions
from cosmos_export.plan import parse_workload, published_subject
from cosmos_export.plan.work import decodes, encoded_frames, request_work
from cosmos_export.sampling import MODES, Mode, guide, resolve_schedule
from cosmos_export.sampling.modes import Clean, Clue, PromptForm, implied_mode, modes_shown_by
from cosmos_export.targets.profiles import NAMED_PROFILES

ROOT = Path(__file__).resolve().parents[2]
EXPRESSIONS: dict[str, Callable[[np.ndarray, np.ndarray, np.float32], np.ndarray]] = {
    "u + g·(c − u)": lambda c, u, g: u + g * (c - u),
}
"""What the samplers compute, by how a declaration writes it."""

every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=str)


@every_mode
def test_a_mode_is_declared_completely(mode: Mode) -> None:
    assert mode.name.isprintable() and mode.title.isprintable()
    known = {entry.name for entry in fields(GenerateOptions)}
    assert {*mode.options, *mode.needs} <= known and set(mode.needs) <= set(mode.options)
    assert set(mode.sources) <= {"image", "video"}
    assert bool(mode.sources) == (mode.clean_frames != 0), "frames are given exactly where a file shows them"
    assert mode.generated and set(mode.decoded) <= set(mode.generated)
    assert not (mode.single and mode.clean_frames) and not (mode.single and "sound" in mode.options)
    assert (mode.clean_actions == "all") == ("actions" in mode.needs)
    assert mode.acts == (mode.prompt is PromptForm.TASK) == ("embodiment" in mode.options)
    assert not mode.state or mode.acts
    for settings in (mode.settings, *mode.robots.values()):
        assert set(settings.defaults) == set(Family) and all(row.source for row in settings.defaults.values())
        assert min(settings.prompt_tokens) > 0


@every_mode
def test_its_guidance_is_what_the_samplers_compute(mode: Mode) -> None:
    c, u = np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
    assert mode.guidance.branches == ("positive", "negative")
    assert np.array_equal(guide(c, u, 3.5), EXPRESSIONS[mode.guidance.expression](c, u, np.float32(3.5)))


def test_no_two_modes_are_told_by_the_same() -> None:
    spellings = [text for mode in MODES.values() for text in {mode.name, mode.title, *mode.aliases}]
    assert len(spellings) == len(set(spellings))
    clues = [mode.implied_by for mode in MODES.values() if mode.implied_by is not None]
    assert sorted(clues) == sorted(Clue)
    assert [(mode.name, other.name) for mode, other in combinations(MODES.values(), 2)
            if other.name.startswith(f"{mode.name}-")] == []  # fmt: skip


def test_the_mode_that_files_speak_of() -> None:
    found = {clue: implied_mode([clue]).implied_by for clue in Clue}
    assert found == {clue: clue for clue in Clue}
    assert implied_mode([]).implied_by is Clue.NOTHING
    for first, second in combinations(Clue, 2):
        assert implied_mode([second, first]).implied_by is first


def test_each_kind_of_data_shows_a_mode() -> None:
    for data in (Clue.PICTURE, Clue.CLIP, Clue.ACTIONS):
        assert modes_shown_by(data)
    assert all(MODES[name].acts for name in modes_shown_by(Clue.ACTIONS))
    assert all(MODES[name].single for name in modes_shown_by(Clue.PICTURE))


def test_representative_modes_have_everything() -> None:
    chosen = [mode for mode in MODES.values() if mode.representative]
    assert {name for mode in chosen for name in mode.modalities("sound" in mode.options)} == {
        "vision", "sound", "action",
    }  # fmt: skip
    assert any(mode.clean_frames for mode in chosen) and any(not mode.clean_frames for mode in chosen)
    assert any(mode.sample.sound for mode in chosen) and any(mode.sample.actions for mode in chosen)


@every_mode
def test_it_has_a_case(mode: Mode) -> None:
    """Parity is measured on its sample, with the rows given that the mode gives."""
    (case,) = (case for case in CASES if case.name == mode.title)
    sample = mode.sample
    assert case.mode is mode
    assert (sample.frames == 1) if mode.single else sample.frames >= mode.least_frames
    assert not sample.sound or "sound" in mode.options
    assert bool(sample.actions) == mode.acts
    inputs = case.inputs({**PUBLISHED["nano"].config, "vocab_size": 64}, ("vision", "sound", "action"))
    masks = {name: inputs[f"{name}_mask"].numpy() for name in ("vision", "action")}
    assert masks["vision"].tolist() == [row >= mode.given_frames(sample.frames) for row in range(sample.frames)]
    assert masks["action"].tolist() == [float(mode.clean_actions != "all")] * sample.actions


@every_mode
@pytest.mark.parametrize("size", PUBLISHED)
def test_the_planner_has_its_workload(mode: Mode, size: str) -> None:
    subject = published_subject(size)
    own = next((name for name in NAMED_PROFILES if name.startswith(f"{mode.name}-")), None)
    workload = parse_workload(own or f"{mode.name}-256p-17f{',action_len=16' * mode.acts}")
    frames = workload.dim("frames")
    assert (workload.mode, frames == 1) == (mode.name, mode.single)
    assert encoded_frames(workload) == mode.given_frames(frames) <= frames
    assert decodes(workload) == ("vision" in mode.decoded)
    schedule = resolve_schedule(subject.sampling, mode.name)
    reasoner, generator = request_work(subject, workload, schedule)
    assert reasoner.total > 0 and generator.total > 0


@every_mode
def test_calibration_reads_each_spelling(mode: Mode, tmp_path: Path) -> None:
    for spelling in (mode.name, *mode.aliases):
        assert entry_item("x", {"prompt": "A cup.", "mode": spelling}, tmp_path).mode == mode.name


def _rows(clean: Clean | None) -> str:
    if clean is None:
        return "–"
    return "all" if clean == "all" else f"first {clean}" if clean else "none"


def _table() -> str:
    """The page's table."""
    lines = [
        "| mode | in words | starts from | also needs | given frames | given actions | generates | steps | guidance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in MODES.values():
        rows = [mode.settings.defaults[family] for family in Family]
        steps, guidance = ("/".join(dict.fromkeys(f"{v:g}" for v in values)) for values in
                           ([row.steps for row in rows], [row.guidance for row in rows]))  # fmt: skip
        made = [*mode.generated, *(["sound"] if "sound" in mode.options else [])]
        cells = (
            f"`{mode.name}`", mode.title, " or ".join(f"`--{name}`" for name in mode.sources) or "text",
            ", ".join(f"`--{name}`" for name in mode.needs), _rows(mode.clean_frames), _rows(mode.clean_actions),
            ", ".join(made), steps, guidance,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_docs_list_them() -> None:
    """`UPDATE_DOCS=1` writes the table of docs/sampling.md; each mode has an example in docs/run.md."""
    page = ROOT / "docs/sampling.md"
    before, begin, rest = page.read_text("utf-8").partition("<!-- modes -->\n")
    _, end, after = rest.partition("<!-- end of modes -->\n")
    assert begin and end
    text = f"{before}{begin}{_table()}{end}{after}"
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(text, encoding="utf-8")
    assert page.read_text("utf-8") == text, "UPDATE_DOCS=1 pytest tests/sampling/test_modes.py -k docs"
    examples = (ROOT / "docs/run.md").read_text("utf-8")
    assert not [mode.name for mode in MODES.values() if f"| `{mode.name}` |" not in examples]
