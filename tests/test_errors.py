"""`docs/errors.md` and what `explain` knows list every error that is raised. To accept a change: UPDATE_ERRORS=1."""

from __future__ import annotations

import ast
import json
import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/errors.md"
DATA = ROOT / "cosmos_export/cli/errors.json"
CAUSES = ROOT / "cosmos_export/cli/causes.toml"
KINDS = {
    "0": "the program itself",
    "1": "the checkpoint",
    "2": "capture and passes",
    "3": "precision and calibration",
    "4": "targets, profiles and engines",
    "5": "backends of a run",
    "6": "requests and what is measured",
    "7": "bundles",
    "8": "the environment",
}
"""What codes are about, by their first digit."""
FOLDERS = ("cosmos_export", "passes", "targets", "kernels", "calibration")
STATUS = {"FindingError": 1, "UserError": 2, "UnsupportedError": 3, "ToolError": 4, "InternalError": 4}
HEAD = """# Errors

Each line is a code, the exit status of the command, what the error says and its hint; `…` stands for what it fills in.
A code that has several lines is raised in several places, a few of them for related mistakes, or with another status.
`cosmos-export explain CX607` prints the same for one code. This page is made from the code
(`UPDATE_ERRORS=1 pytest tests/test_errors.py`), and a test compares them.

Status 1: a check found something. 2: usage or input. 3: not supported. 4: another tool failed, or it is a bug.
"""
TABLE = "\n| code | status | says | hint |\n|---|---|---|---|\n"


def text(node: ast.expr) -> str:
    """The words of a message."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return "…"


def raised() -> Iterator[tuple[str, int, str, str]]:
    """Code, status, message and hint of every error that is raised."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or len(node.args) < 2:
                    continue
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                code = node.args[0]
                if name in STATUS and isinstance(code, ast.Constant):
                    hint = " ".join(text(node.args[2]).split()) if len(node.args) > 2 else ""
                    yield str(code.value), STATUS[name], " ".join(text(node.args[1]).split()), hint


CODE = re.compile(r"CX\d{3}")
INDIRECT = {
    "CX002": 130,
    "CX129": 2,
    "CX131": 2,
    "CX220": 2,
    "CX334": 2,
    "CX348": 2,
    "CX460": 2,
    "CX461": 2,
    "CX462": 2,
    "CX464": 2,
}
"""Codes that are raised through a function of their own, with their status; what they say is the case's."""


def named() -> set[str]:
    """Every code that stands in the source by itself."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                    found.add(node.value)
    return found


def known() -> dict[str, dict[str, object]]:
    """Code → what `explain` prints of it."""
    cases: dict[str, set[tuple[int, str, str]]] = defaultdict(set)
    for code, status, message, hint in raised():
        cases[code].add((status, message, hint))
    for code, status in INDIRECT.items():
        cases[code].add((status, "…", ""))
    causes = tomllib.loads(CAUSES.read_text(encoding="utf-8"))
    assert not set(causes) - set(cases), "causes of codes that nobody raises"
    assert not set(cases) - set(causes), "each code needs a table with cause, example and way_out in cli/causes.toml"
    return {
        code: {
            "status": sorted({status for status, _, _ in found}),
            "kind": KINDS[code[2]],
            **causes.get(code, {}),
            "cases": [
                {"message": message, "hint": hint if hint != "…" else ""}
                for _, message, hint in sorted(found)
                if message != "…" or len(found) == 1
            ],
        }
        for code, found in sorted(cases.items())
    }


def page() -> str:
    parts, kind = [HEAD], ""
    for code, entry in known().items():
        if entry["kind"] != kind:
            kind = str(entry["kind"])
            parts.append(f"\n## {code[:3]}xx: {kind}\n{TABLE}")
        for case in entry["cases"]:  # type: ignore[attr-defined]
            said = case["message"] if case["message"] != "…" else "(the case's own words)"
            cells = (said.replace("|", "\\|"), case["hint"].replace("|", "\\|"))
            parts.append(f"| {code} | {' or '.join(map(str, entry['status']))} | {' | '.join(cells)} |\n")  # type: ignore[arg-type]
    return "".join(parts)


def data() -> str:
    return json.dumps(known(), indent=1, ensure_ascii=False) + "\n"


def test_the_page_of_errors_is_that_of_the_code() -> None:
    if os.environ.get("UPDATE_ERRORS"):
        PAGE.write_text(page(), encoding="utf-8")
        DATA.write_text(data(), encoding="utf-8")
    assert len(known()) > 150
    assert named() == {code for code, *_ in raised()} | set(INDIRECT)
    assert PAGE.read_text(encoding="utf-8") == page()
    assert DATA.read_text(encoding="utf-8") == data()


def test_every_code_is_explained_in_whole_sentences() -> None:
    for code, entry in known().items():
        texts = {name: str(entry.get(name, "")) for name in ("cause", "example", "way_out")}
        assert all(len(one.split()) > 1 and one.endswith(".") for one in texts.values()), (code, texts)
        hints = {case["hint"] for case in entry["cases"]}  # type: ignore[attr-defined]
        assert texts["way_out"] not in hints, f"{code}: the way out only repeats a hint"
