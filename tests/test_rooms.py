"""Ideas that have a room: nothing outside it compares with one of its names, or keeps a table by it.

A mode is declared in `cosmos_export.sampling.modes`, a family in `cosmos_export.family`. Code elsewhere asks the
declaration; if it asked for the name, the next mode or family would have to be added there as well.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from cosmos_export.family import Family
from cosmos_export.sampling import MODES

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(
    path.relative_to(ROOT)
    for folder in ("cosmos_export", "passes", "kernels", "calibration", "targets")
    for path in (ROOT / folder).rglob("*.py")
)
ROOMS: dict[str, tuple[Path, Collection[str], str]] = {
    "mode": (
        Path("cosmos_export/sampling"),
        {spelling for mode in MODES.values() for spelling in (mode.name, mode.title, *mode.aliases)},
        "MODES",
    ),
    "family": (Path("cosmos_export/family.py"), {family.value for family in Family}, "Family"),
}
"""Where it is declared, its names, and the name in Python of what has them."""
ALLOWED: dict[tuple[str, str], str] = {
    ("cosmos_export/checkpoint/published.py", "edge"): "a published size, which is called as its family is",
    ("cosmos_export/plan/subject.py", "edge"): "a published size, which is called as its family is",
    **{
        ("cosmos_export/sampling/defaults.py", f"Family.{family.name}"): "each kind of request has its row"
        for family in Family
    },
    **{
        ("cosmos_export/checkpoint/variants.py", name): "part of the name of a published repository"
        for name in ("text2image", "image2video", "policy")
    },
    ("calibration/write_quantized.py", "text2image"): "part of the name of a published repository",
    ("cosmos_export/checkpoint/reader.py", "policy"): "a field of checkpoint.json",
    ("cosmos_export/cli/inspect.py", "policy"): "a title of the table",
    ("cosmos_export/cli/bundle.py", "policy"): "a title of the table",
    ("cosmos_export/documents.py", "policy"): "a field of a document",
    ("cosmos_export/evaluation/requested.py", "policy"): "a field of the sampling record",
}
"""The same words with another meaning, by file."""
_LOOKUPS = {"get", "pop", "startswith", "endswith", "removeprefix", "removesuffix", "fromkeys", "index", "count"}


def uses(tree: ast.Module, names: Collection[str], room: str) -> Iterator[tuple[int, str]]:
    """Lines of ``tree`` that compare with one of ``names``, or with an attribute of ``room``, or key on it."""

    def named(node: ast.expr | None) -> Iterator[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            yield node.value
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == room:
            yield f"{room}.{node.attr}"
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            for element in node.elts:
                yield from named(element)

    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            found = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            found = list(node.keys)
        elif isinstance(node, ast.MatchValue):
            found = [node.value]
        elif isinstance(node, ast.Subscript):
            found = [node.slice]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            found = [node]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LOOKUPS:
            found = list(node.args)
        for one in found:
            for name in named(one):
                yield getattr(node, "lineno", 0), name


@pytest.mark.parametrize("idea", ROOMS)
def test_nobody_outside_a_room_asks_for_a_name(idea: str) -> None:
    room, names, holder = ROOMS[idea]
    found = {
        f"{path}:{line}: {name}"
        for path in PRODUCT
        if not path.is_relative_to(room)
        for line, name in uses(ast.parse((ROOT / path).read_text("utf-8")), names, holder)
        if (path.as_posix(), name) not in ALLOWED
    }
    assert not found, f"ask the declaration of the {idea} instead, or say in ALLOWED what else the word means"


def test_what_is_allowed_is_there() -> None:
    for file, name in ALLOWED:
        idea = next(idea for idea, (_, names, room) in ROOMS.items() if name in names or name.startswith(room))
        _, names, holder = ROOMS[idea]
        assert name in {used for _, used in uses(ast.parse((ROOT / file).read_text("utf-8")), names, holder)}, file


@pytest.mark.parametrize(
    "text",
    [
        "x == 't2v'", "x in ('a', 't2v')", "x = {'t2v': 1}", "x['t2v']", "x.get('t2v', 0)", "x.startswith('policy')",
        "KNOWN = ('t2i', 't2v')", "match x:\n    case 't2v': pass", "dict.fromkeys(('t2v',), 1)", "x is not MODES.t2v",
        "x = {MODES.t2v: 1}", "x != 'forward_dynamics'", "x == 'text-to-video'",
    ],
)  # fmt: skip
def test_a_use_is_found(text: str) -> None:
    _, names, holder = ROOMS["mode"]
    assert list(uses(ast.parse(text), names, holder))
    harmless = "help = 't2v, i2v'\nmode = MODES[name]\nf(mode='t2v')\nx == 'other'"
    assert not list(uses(ast.parse(harmless), names, holder))
