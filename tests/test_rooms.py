"""Ideas that have a room: nothing outside it asks for one of its names.

A mode is declared in `cosmos_export.sampling.modes`, a family in `cosmos_export.family`, a scheme and a backend each in
a file of their own. Code elsewhere asks the declaration; if it asked for the name, the next one would have to be added
there as well.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from cosmos_export.family import Family
from cosmos_export.precision.schemes import SCHEMES
from cosmos_export.sampling import MODES
from cosmos_export.targets.backends import backends

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(
    path.relative_to(ROOT)
    for folder in ("cosmos_export", "passes", "kernels", "calibration", "targets")
    for path in (ROOT / folder).rglob("*.py")
)


@dataclass(frozen=True)
class Room:
    """Where an idea is declared."""

    places: tuple[str, ...]
    names: Collection[str]
    holder: str = ""
    """The name in Python of what has them, where its attributes are names too."""
    only_asked: bool = False
    """Names are ordinary words, so that a text is one only where something is compared with it or looked up by it.
    Otherwise every text that is a name counts, whatever is done with it."""


ROOMS = {
    "mode": Room(
        ("cosmos_export/sampling/",),
        {spelling for mode in MODES.values() for spelling in (mode.name, mode.title, *mode.aliases)},
        "MODES",
        only_asked=True,
    ),
    "family": Room(("cosmos_export/family.py",), {family.value for family in Family}, "Family", only_asked=True),
    "scheme": Room(("cosmos_export/precision/schemes/",), SCHEMES),
    "backend": Room(("targets/backends/", "targets/onnx/", "targets/trt/", "targets/inductor/"), backends()),
}
ALLOWED: dict[str, dict[tuple[str, str], str]] = {
    "mode": {
        ("cosmos_export/checkpoint/variants.py", "text2image"): "part of the name of a published repository",
        ("cosmos_export/checkpoint/variants.py", "image2video"): "part of the name of a published repository",
        ("cosmos_export/checkpoint/variants.py", "policy"): "part of the name of a published repository",
        ("calibration/write_quantized.py", "text2image"): "part of the name of a published repository",
        ("cosmos_export/checkpoint/reader.py", "policy"): "a field of checkpoint.json",
        ("cosmos_export/checkpoint/demo.py", "policy"): "a field of checkpoint.json",
        ("cosmos_export/cli/inspect.py", "policy"): "a title of the table",
        ("cosmos_export/cli/bundle.py", "policy"): "a title of the table",
        ("cosmos_export/documents.py", "policy"): "a field of a document",
        ("cosmos_export/evaluation/requested.py", "policy"): "a field of the sampling record",
    },
    "family": {
        ("cosmos_export/checkpoint/published.py", "edge"): "a published size, which is called as its family is",
        ("cosmos_export/plan/subject.py", "edge"): "a published size, which is called as its family is",
        ("cosmos_export/sampling/defaults.py", "Family.*"): "each kind of request has its row",
    },
    "scheme": {
        ("kernels/*.py", "*"): "types of numbers, in the words of kernels",
        ("targets/onnx/plugins.py", "*"): "types of operands of plugins",
        ("targets/trt/plugins.py", "*"): "types of operands of plugins",
        ("targets/trt/engine_inspector.py", "*"): "types of numbers, in the words of an engine's layers",
        ("targets/trt/worker.py", "*"): "types of numbers, in the words of an engine's layers",
        ("targets/trt/checks.py", "*"): "types of numbers, in the words of an engine's layers",
        ("cosmos_export/compiler/engines.py", "bf16"): "types of numbers, in the words of an engine's layers",
        ("cosmos_export/ir/spec.py", "*"): "PyTorch's and the IR's names of types",
        ("cosmos_export/checkpoint/mapping.py", "bf16"): "the type of a checkpoint's numbers",
        ("cosmos_export/checkpoint/converted.py", "bf16"): "the type of a checkpoint's numbers",
        ("cosmos_export/compiler/options.py", "bf16"): "the type of a checkpoint's numbers",
        ("cosmos_export/checkpoint/quantization.py", "fp8"): "a method of quantization in the words of other programs",
        ("cosmos_export/compiler/planned.py", "bf16"): "the type of a checkpoint's numbers",
        ("cosmos_export/plan/estimate.py", "*"): "names of recipes",
        ("cosmos_export/verb_options.py", "bf16"): "the name of a recipe",
        ("cosmos_export/runtime/facts.py", "bf16"): "the type of a checkpoint's numbers",
        ("cosmos_export/bench/baseline.py", "bf16"): "what diffusers computes in",
        ("cosmos_export/options.py", "fp8"): "the default of an option",
        ("cosmos_export/cli/meanings.py", "*"): "options of other programs",
    },
    "backend": {
        ("cosmos_export/doctor.py", "onnxruntime"): "a distribution that compiling needs",
        ("cosmos_export/compiler/options.py", "onnxruntime"): "a module that compiling needs",
        ("cosmos_export/compiler/record.py", "onnxruntime"): "a module whose version a manifest has",
        ("cosmos_export/cli/version.py", "onnxruntime"): "a distribution whose version is shown",
        ("cosmos_export/bench/result.py", "onnxruntime"): "a distribution whose version is recorded",
        ("cosmos_export/bench/measure.py", "inductor"): "a geometry is measured with this backend, which it says",
        ("cosmos_export/bench/baseline.py", "inductor"): "the compiler that diffusers is given: torch.compile's",
    },
}
"""Patterns of a file and of names in it → what else the same words mean there, or why they stand there."""
_LOOKUPS = {"get", "pop", "startswith", "endswith", "removeprefix", "removesuffix", "fromkeys", "index", "count"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"))


def uses(tree: ast.Module, room: Room) -> Iterator[tuple[int, str]]:
    """Lines of ``tree`` that ask for a name of ``room``, each with the name."""

    def named(node: ast.expr | None) -> Iterator[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in room.names:
            yield node.value
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == room.holder:
            yield f"{room.holder}.{node.attr}"
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            for element in node.elts:
                yield from named(element)

    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Constant) and not room.only_asked:
            found = [node]
        elif isinstance(node, ast.Compare):
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


def outside(room: Room) -> Iterator[tuple[str, int, str]]:
    """File, line and name of every use of ``room`` by the rest of the product."""
    for path in PRODUCT:
        if not path.as_posix().startswith(room.places):
            yield from ((path.as_posix(), line, name) for line, name in uses(parsed(path), room))


def allows(pattern: tuple[str, str], file: str, name: str) -> bool:
    return fnmatch(file, pattern[0]) and fnmatch(name, pattern[1])


@pytest.mark.parametrize("idea", ROOMS)
def test_nobody_outside_a_room_asks_for_a_name(idea: str) -> None:
    found = list(outside(ROOMS[idea]))
    strangers = {
        f"{file}:{line}: {name}"
        for file, line, name in found
        if not any(allows(pattern, file, name) for pattern in ALLOWED[idea])
    }
    assert not strangers, f"ask the declaration of the {idea} instead, or say in ALLOWED what else the word means"
    unused = [one for one in ALLOWED[idea] if not any(allows(one, file, name) for file, _, name in found)]
    assert not unused, "no longer needed"


@pytest.mark.parametrize(
    ("idea", "text"),
    [
        *(("mode", text) for text in (
            "x == 't2v'", "x in ('a', 't2v')", "x = {'t2v': 1}", "x['t2v']", "x.get('t2v', 0)",
            "x.startswith('policy')", "KNOWN = ('t2i', 't2v')", "match x:\n    case 't2v': pass",
            "dict.fromkeys(('t2v',), 1)", "x is not MODES.t2v", "x = {MODES.t2v: 1}", "x != 'forward_dynamics'",
            "x == 'text-to-video'",
        )),
        *(("scheme", text) for text in (
            "x == 'fp8'", "T = {'int4': 1}", "x in ('nvfp4',)", "F8 = 'fp8'", "match x:\n case 'int4': 1",
        )),
        *(("backend", text) for text in (
            "if target.backend == 'inductor': ...", "x = b in ('tensorrt', 'inductor')", "{'inductor': 1}[b]",
            "match b:\n case 'inductor': ...", "HERE = 'inductor'", "f(backend='inductor')",
        )),
    ],
)  # fmt: skip
def test_a_use_is_found(idea: str, text: str) -> None:
    assert list(uses(ast.parse(text), ROOMS[idea]))


def test_what_is_harmless_is_not_found() -> None:
    mode = "help = 't2v, i2v'\nmode = MODES[name]\nf(mode='t2v')\nx == 'other'"
    assert not list(uses(ast.parse(mode), ROOMS["mode"]))
    assert not list(uses(ast.parse("help = 'fp8, int4'\nscheme = SCHEMES[name]"), ROOMS["scheme"]))
