"""Dependencies point one way, heavy packages are imported late, and everything installs inside `cosmos_export`."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("passes", "kernels", "calibration", "targets")
"""Folders at the root that install inside the package."""

# Each part may import those of lower levels (and itself), and nothing else of this project.
LEVELS = {
    "cli": 10,
    "api": 9,
    "bench": 8,  # a geometry is compiled as a job is
    "compiler": 7,
    **dict.fromkeys(["evaluation", "report"], 6),  # the build measures and reports itself
    "serve": 5,
    "calibration": 5,  # its inputs are requests, and the front end of requests is the runtime's
    **dict.fromkeys(["runtime", "plan", "doctor"], 4),
    **dict.fromkeys(["targets", "passes", "capture"], 3),
    "precision": 2,  # a target lists schemes, and a pass asks them what to insert
    "embodiments": 2,  # rows of the bundle's schema
    "kernels": 2,  # a kernel of an operation of the dialect is called as that is
    **dict.fromkeys(["ir", "checkpoint", "sampling", "bundle"], 1),
    **dict.fromkeys(
        [
            "arguments",
            "audit",
            "diagnostics",
            "documents",
            "in_memory",
            "kinds",
            "option_fields",
            "options",
            "verb_options",
            "directories",
            "family",
            "files",
            "machine",
            "printable",
            "progress",
            "release",
            "stamps",
            "streams",
            "units",
        ],
        0,
    ),
}
# Where the level alone would allow more than there should be.
ONLY = {
    "arguments": {"diagnostics"},
    "documents": {"diagnostics"},
    "options": {"in_memory", "option_fields"},
    "verb_options": {"files", "option_fields", "options"},
    "ir": {"diagnostics"},
    "embodiments": {"bundle"},
    "audit": {"diagnostics", "files"},
    "kinds": {"files"},
    "bundle": {"diagnostics", "directories", "files", "kinds", "machine", "progress", "stamps"},
    "checkpoint": {
        "diagnostics",
        "directories",
        "family",
        "files",
        "kinds",
        "machine",
        "progress",
        "stamps",
        "units",
        "verb_options",
    },
    "sampling": {"diagnostics", "family", "options"},
    "stamps": {"diagnostics"},
    "runtime": {other for other, level in LEVELS.items() if level < LEVELS["runtime"]} - {"embodiments"},
    "serve": {other for other, level in LEVELS.items() if level < LEVELS["serve"]} - {"embodiments"},
    "plan": {"targets", "precision", "sampling", "checkpoint", "diagnostics", "family", "files", "units"},
}
BACKENDS = {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx"}
HEAVY = {"torch", "diffusers", "transformers", "av", "tokenizers", *BACKENDS}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module, as installed."""
    for top in (ROOT / "cosmos_export", *(ROOT / folder for folder in OUTSIDE)):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if parts[0] == "cosmos_export" else ("cosmos_export", *parts))
            yield name.removesuffix(".__init__"), path


MODULES = dict(modules())


def part_of(name: str) -> str:
    """The part of the project a module belongs to; empty for `cosmos_export` itself and its `__main__`."""
    return [*name.split("."), ""][1].replace("__main__", "")


def imports(path: Path, package: str, top_level_only: bool = False) -> set[str]:
    """Names of the modules that ``path`` imports. ``from a import b`` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")), top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _statements(node: ast.AST, top_level_only: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if top_level_only and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child, top_level_only)


def package_of(name: str, path: Path) -> str:
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def parts_imported(name: str) -> set[str]:
    path = MODULES[name]
    own = {one for one in imports(path, package_of(name, path)) if one.split(".")[0] == "cosmos_export"}
    # `from cosmos_export.ir import graph` names a module; `from cosmos_export import __version__` names none.
    return {part_of(one) for one in own} & set(LEVELS)


def outside_imported(name: str, top_level_only: bool) -> set[str]:
    path = MODULES[name]
    return {one.split(".")[0] for one in imports(path, package_of(name, path), top_level_only)}


# ---------------------------------------------------------------------------------------------------------------------
# Arrows


def test_every_part_has_a_level() -> None:
    unknown = {part_of(name) for name in MODULES} - set(LEVELS) - {""}
    assert not unknown, f"give {unknown} a level in {Path(__file__).name}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_down(name: str) -> None:
    part = part_of(name)
    if not part:
        return
    allowed = ONLY.get(part) or {other for other, level in LEVELS.items() if level < LEVELS[part]}
    assert parts_imported(name) <= allowed | {part}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_imports_the_outside_folders_by_their_bare_name(name: str) -> None:
    assert not outside_imported(name, top_level_only=False) & set(OUTSIDE)


@pytest.mark.parametrize("name", sorted(name for name in MODULES if part_of(name) in ("ir", "passes", "capture")))
def test_the_middle_knows_no_backend(name: str) -> None:
    assert not outside_imported(name, top_level_only=False) & BACKENDS


@pytest.mark.parametrize(
    "name",
    sorted(name for name in MODULES if part_of(name) in ("", "diagnostics", "files", "progress", "bundle", "cli")),
)
def test_light_parts_import_nothing_heavy_at_the_top(name: str) -> None:
    assert not outside_imported(name, top_level_only=True) & {*HEAVY, "numpy", "rich"}


# These run in the build only, and the package does not import them; sessions are what runs a bundle.
_HEAVY_BY_NATURE = {
    name
    for name in MODULES
    if name.startswith(("cosmos_export.targets.onnx.", "cosmos_export.targets.inductor."))
    and not name.endswith(".sessions")
}


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in MODULES
        if part_of(name) in ("checkpoint", "machine", "precision", "sampling", "targets", "runtime", "plan")
        and name not in _HEAVY_BY_NATURE
    ),
)
def test_readers_and_descriptions_import_nothing_heavy_at_the_top(name: str) -> None:
    assert not outside_imported(name, top_level_only=True) & HEAVY


@pytest.mark.parametrize(
    "part",
    ["cli", "checkpoint", "sampling", "bundle", "machine", "precision", "runtime", "plan", "targets", "diagnostics"],
)
def test_importing_loads_nothing_heavy(part: str) -> None:
    code = f"import sys, cosmos_export.{part}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


EVALUATORS = {
    "eval", "exec", "__import__", "sympify", "_sympify", "parse_expr", "lambdify", "pickle", "cloudpickle", "dill",
    "marshal", "shelve", "joblib", "runpy", "unsafe_load", "full_load",
}  # fmt: skip
"""Whatever makes code of text or of bytes."""


def evaluators(path: Path) -> set[str]:
    """What ``path`` names of `EVALUATORS`. ``model.eval()`` is a method without arguments and evaluates nothing;
    ``sympy.S`` and the builtin ``compile`` are such names, too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {name.split(".")[-1] for name in imports(path, "") if set(name.split(".")) & EVALUATORS}
    harmless = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and not node.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and (node.id in EVALUATORS or node.id == "compile"):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            if node.attr in EVALUATORS and not (node.attr == "eval" and id(node) in harmless):
                found.add(node.attr)
            if node.attr == "S" and isinstance(node.value, ast.Name) and node.value.id == "sympy":
                found.add("sympy.S")
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_evaluates_text(name: str) -> None:
    assert not evaluators(MODULES[name])


def test_evaluators_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    for code, seen in (
        ("eval('1')", "eval"), ("builtins.exec(x)", "exec"), ("sympy.sympify(x)", "sympify"), ("f = eval", "eval"),
        ("from sympy import sympify as s", "sympify"), ("import pickle", "pickle"), ("sympy.S('x')", "sympy.S"),
        ("from sympy.parsing.sympy_parser import parse_expr", "parse_expr"), ("compile(x, y, z)", "compile"),
        ("frame.eval('a + b')", "eval"),
    ):  # fmt: skip
        path.write_text(code)
        assert evaluators(path) == {seen}, code
    path.write_text("model.eval()\nre.compile('x')\ntorch.compile(f)\n")
    assert not evaluators(path)


def test_the_checks_see_what_they_should(tmp_path: Path) -> None:
    """The reader of imports itself: late, guarded, relative and nested imports are told apart."""
    path = tmp_path / "module.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "try:\n    import onnx\nexcept ImportError:\n    pass\n"
        "from . import sibling\nfrom ..ir import graph\n"
        "class A:\n    import numpy\n    def f(self):\n        import tensorrt\n"
    )
    top = imports(path, "cosmos_export.passes", top_level_only=True)
    assert {"onnx", "numpy", "cosmos_export.passes.sibling", "cosmos_export.ir.graph"} <= top
    assert not {"torch", "tensorrt"} & top
    assert {"torch", "tensorrt"} <= imports(path, "cosmos_export.passes")


# ---------------------------------------------------------------------------------------------------------------------
# Circles


def modules_imported(name: str) -> set[str]:
    """Modules of this project that ``name`` imports anywhere: late and for types alone, too.

    ``from package import module`` is the module; what a package hands on counts as the package. The whole project's
    package counts as none: it hands the API on to users, and its parts read nothing from it but the version.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{name} has a relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {full if full in MODULES else node.module for full in names}
    return found & set(MODULES) - {name, "cosmos_export"}


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach each other, by Tarjan's algorithm."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in graph[name]:
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            at = stack.index(name)
            found.append(set(stack[at:]))
            del stack[at:]

    for name in graph:
        if name not in number:
            visit(name)
    return [circle for circle in found if len(circle) > 1]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """An import inside a function hides a circle from Python and not from a reader, so it counts as well."""
    found = circles({name: modules_imported(name) for name in MODULES})
    assert found == []


def test_circles_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# ---------------------------------------------------------------------------------------------------------------------
# The machine

QUESTIONS = {
    "os.cpu_count", "os.sched_getaffinity", "os.sysconf", "os.statvfs", "os.getloadavg", "os.uname",
    "shutil.disk_usage", "resource.getrusage", "multiprocessing.cpu_count",
}  # fmt: skip
"""Functions that tell what a machine has, and what of it is taken."""


def questions(path: Path) -> set[str]:
    """What ``path`` asks the machine by itself: files of the kernel, `QUESTIONS`, and anything of ``platform``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    found = {name for name in imports(path, "") if name in QUESTIONS or name.split(".")[0] in ("platform", "psutil")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in text:
            found |= {node.value} if node.value.startswith(("/proc", "/sys/", "proc/", "sys/")) else set()
        elif isinstance(node, ast.Attribute):
            found |= {ast.unparse(node)} & QUESTIONS
    return found


def test_one_part_asks_the_machine() -> None:
    """Two parts that ask by themselves can disagree: one honours the limits of a container, and one does not."""
    found = {name: questions(path) for name, path in MODULES.items() if part_of(name) != "machine"}
    assert not {name: asked for name, asked in found.items() if asked}


def test_questions_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    for code, seen in (
        ("os.cpu_count()", "os.cpu_count"), ("from os import cpu_count", "os.cpu_count"),
        ("import platform", "platform"),
        ("Path(f'/proc/{pid}/status')", "/proc/"), ("shutil.disk_usage(p).free", "shutil.disk_usage"),
        ("open('/sys/fs/cgroup/memory.max')", "/sys/fs/cgroup/memory.max"),
    ):  # fmt: skip
        path.write_text(code)
        assert questions(path) == {seen}, code
    path.write_text('"""/proc is asked elsewhere."""\nsys.platform\n')
    assert not questions(path)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes

MAX_LINES = 500
LONGER = {"cosmos_export.bundle.manifest"}
"""The manifest's schema is read as one page."""


def test_no_two_classes_share_a_name() -> None:
    found: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_no_module_is_long() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name for name, count in lines.items() if count > MAX_LINES} == LONGER


# ---------------------------------------------------------------------------------------------------------------------
# Installation


def test_the_source_tree_runs_without_installation(tmp_path: Path) -> None:
    """A copy of the tree, so that an editable installation of this one cannot help."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for folder in ("cosmos_export", *OUTSIDE):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def python(*arguments: str) -> str:
        result = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "Usage: cosmos-export" in python("-m", "cosmos_export", "--help")
    assert "rtx-pro-6000" in python("-m", "cosmos_export", "targets")
    where = python("-c", "import cosmos_export as p; print(p.__file__)")
    assert Path(where.strip()).is_relative_to(copy)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the wheel of this tree, built offline from a copy (the build writes into its source)."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools 77 (dev extra)")
    work = tmp_path_factory.mktemp("wheel")
    tree = work / "tree"
    tree.mkdir()
    for folder in ("cosmos_export", *OUTSIDE):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(work), str(tree)], check=True, capture_output=True, text=True)
    (built,) = work.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_the_wheel_has_one_top_level_package(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"cosmos_export"}


def test_the_wheel_has_every_module_and_data_file(wheel: list[str]) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in MODULES.values()}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "targets").rglob("*.toml")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "cosmos_export").rglob("*.toml")}
    expected |= {"cosmos_export/py.typed", "calibration/prompts.txt"}
    installed = {name if name.startswith("cosmos_export") else f"cosmos_export/{name}" for name in expected}
    assert installed <= set(wheel), "is a package missing in pyproject.toml?"


def test_the_wheel_carries_its_licence(wheel: list[str]) -> None:
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)


def test_every_folder_of_tests_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest leaves out folders of certain names by default, and one of them is a folder of tests here."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert not {folder for folder in folders if any(fnmatch(folder.name, pattern) for pattern in left_out)}
