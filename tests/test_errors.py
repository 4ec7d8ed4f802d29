"""`docs/errors.md` lists every error that the code raises, with what it says. To accept a change: UPDATE_ERRORS=1."""

from __future__ import annotations

import ast
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/errors.md"
FOLDERS = ("cosmos_export", "passes", "targets", "kernels", "calibration")
STATUS = {"FindingError": 1, "UserError": 2, "UnsupportedError": 3, "ToolError": 4, "InternalError": 4}
HEAD = """# Errors

Each line is a code, the exit status of the command, and what it says; `…` stands for what it fills in. A hint follows
where there is something to do. A code that stands in several lines is raised in several places, a few of them for
mistakes that are only akin, or with another status. This page is made from the code
(`UPDATE_ERRORS=1 pytest tests/test_errors.py`), and a test compares them.

Status 1: a check found something. 2: usage or input. 3: not supported. 4: another tool failed, or it is a bug.

| code | status | says |
|---|---|---|
"""


def text(node: ast.expr) -> str:
    """The words of a message."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return "…"


def raised() -> Iterator[tuple[str, int, str]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or len(node.args) < 2:
                    continue
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                code = node.args[0]
                if name in STATUS and isinstance(code, ast.Constant):
                    yield str(code.value), STATUS[name], " ".join(text(node.args[1]).split())


CODE = re.compile(r"CX\d{3}")
INDIRECT = {
    "CX002": 130,
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


def page() -> str:
    said: dict[tuple[str, int], set[str]] = defaultdict(set)
    for code, status, message in raised():
        said[code, status].add(message)
    for code, status in INDIRECT.items():
        said[code, status].add("…")
    rows = [
        f"| {code} | {status} | {message.replace('|', chr(92) + '|')} |"
        for (code, status), messages in sorted(said.items())
        for message in sorted(messages - {"…"}) or ["(the case's own words)"]
    ]
    return HEAD + "\n".join(rows) + "\n"


def test_the_page_of_errors_is_that_of_the_code() -> None:
    if os.environ.get("UPDATE_ERRORS"):
        PAGE.write_text(page(), encoding="utf-8")
    assert len({code for code, _, _ in raised()}) > 150
    assert named() == {code for code, _, _ in raised()} | set(INDIRECT)
    assert PAGE.read_text(encoding="utf-8") == page()
