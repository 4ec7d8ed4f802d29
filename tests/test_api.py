"""The public API: signatures that agree with the records of options, wrong arguments, and nothing heavy imported."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cosmos_export as cx
from cosmos_export import api
from cosmos_export.arguments import made
from cosmos_export.options import BuildOptions, CalibrateOptions, GenerateOptions, PlanOptions, QuantizeRequest
from cosmos_export.precision.recipe import recipe_names
from cosmos_export.precision.schemes import SCHEMES
from cosmos_export.runtime import passed
from cosmos_export.sampling import MODES, Overrides
from cosmos_export.targets import target_names

ROOT = Path(__file__).resolve().parents[1]


def names(record: type) -> set[str]:
    return {field.name for field in dataclasses.fields(record)}


def keywords(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "progress", "on_step"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, cosmos_export; dir(cosmos_export); print({'numpy', 'torch', 'rich', 'typer'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_what_there_is_comes_from_the_registries_without_anything_heavy() -> None:
    code = (
        "import sys, cosmos_export as cx\n"
        "for registry in (cx.targets, cx.recipes, cx.schemes, cx.modes): print(*(one.name for one in registry()))\n"
        "print({'torch', 'onnx', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *found, heavy = result.stdout.splitlines()
    assert [line.split() for line in found] == [[*target_names()], [*recipe_names()], [*SCHEMES], [*MODES]]
    assert heavy == "set()", result.stderr


def test_every_name_is_there() -> None:
    assert all(getattr(cx, name) is not None for name in cx.__all__)
    assert set(cx.__all__) <= set(dir(cx))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cx.nothing  # type: ignore[attr-defined] # noqa: B018


def test_a_package_with_the_name_of_a_function_is_called_as_the_function() -> None:
    import cosmos_export.plan
    import cosmos_export.targets as package

    assert [target.name for target in package()] == [target.name for target in api.targets()]  # type: ignore[operator]
    assert cosmos_export.plan("nano", targets="cpu").variant == "nano"
    assert package.load_target("cpu").name == "cpu"


def test_keywords_are_the_fields_of_the_options() -> None:
    assert keywords(cx.compile) == names(BuildOptions)
    assert keywords(cx.plan) == names(PlanOptions)
    assert keywords(cx.quantize) == names(QuantizeRequest)
    sampling = names(Overrides)
    assert keywords(cx.calibrate) == (
        names(CalibrateOptions) - {"overrides", "negative"} | sampling | {"negative_prompt"}
    )
    fields = names(GenerateOptions) - {"sampling"} | sampling
    diffusers = {v: k for k, v in api._DIFFUSERS.items()}
    assert keywords(api.Model.generate) == {diffusers.get(name, name) for name in fields} | {"num_frames"}


@pytest.mark.parametrize("function", [cx.compile, cx.plan, cx.calibrate, cx.quantize, api.Model.generate])
def test_none_is_the_default_of_every_option(function: Callable[..., Any]) -> None:
    """So that a default is in one place, the record of options."""
    parameters = inspect.signature(function).parameters.values()
    assert {p.default for p in parameters if p.default is not p.empty} == {None}


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (lambda: cx.plan(5), "CX005", "`checkpoint` of `plan` is 5 (int)"),
        (lambda: cx.plan("nano", steps="8"), "CX005", "`steps` of `plan` is '8' (str)"),
        (lambda: cx.plan("nano", steps=True), "CX005", "`steps`"),
        (lambda: cx.plan("nano", guidance_interval=(1,)), "CX005", "`guidance_interval`"),
        (lambda: cx.plan("nano", targets=[]), "CX480", "a target"),
        (lambda: cx.plan(), "CX480", "a checkpoint"),
        (lambda: cx.plan("nano", targets="h1000"), "CX401", "h1000"),
        (lambda: cx.compile(None), "CX005", "`compile` needs `checkpoint`"),
        (lambda: cx.compile("a", "b", profiles=[3]), "CX005", "`profiles`"),
        (lambda: cx.compile("a", "b", loop="hots"), "CX005", "`loop` of `compile` is 'hots'"),
        (lambda: cx.compile("a", "b", force=1), "CX005", "`force`"),
        (lambda: cx.open(3), "CX005", "`bundle` of `open` is 3 (int)"),
        (lambda: cx.open("no such bundle"), "CX700", "no such bundle"),
        (lambda: cx.quantize("a", "b", calibration=None), "CX005", "`quantize` needs `calibration`"),
        (lambda: cx.calibrate("a", "b", data=None), "CX005", "`calibrate` needs `data`"),
    ],
)
def test_a_wrong_argument_is_an_error_with_a_code_and_a_hint(call: Callable[[], Any], code: str, words: str) -> None:
    with pytest.raises(cx.CosmosExportError) as caught:
        call()
    assert caught.value.code == code
    assert words in caught.value.message
    assert caught.value.hint


class Strange:
    """Nothing that any argument takes."""


WRONG = [
    Strange(), 1j, b"bytes", {"a": 1}, np.zeros((2, 2)), float("nan"), -1, "", "no such", [], (1, 2, 3), True, 10**30,
    object, {1}, [None], "\0", "\ud800",
]  # fmt: skip
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "compile": (cx.compile, {"checkpoint": "missing", "output": "missing/x"}),
    "plan": (cx.plan, {"checkpoint": "edge", "targets": "cpu", "workloads": "t2i-256p"}),
    "calibrate": (cx.calibrate, {"checkpoint": "missing", "output": "missing/x", "data": "x"}),
    "quantize": (cx.quantize, {"checkpoint": "missing", "output": "missing/x", "calibration": "x"}),
    "open": (cx.open, {"bundle": "missing"}),
    "generate": (lambda **given: api._generate_options(given), {"prompt": "x"}),
}


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, (function, _) in CALLS.items()
        for argument in sorted(keywords(api.Model.generate if name == "generate" else function))
    ],
)
def test_no_argument_of_any_type_ends_in_another_error(name: str, argument: str) -> None:
    """A sentence with a code, whatever is passed; what is taken meets a checkpoint or a bundle that is not there."""
    function, given = CALLS[name]
    if name == "generate":
        given = dict.fromkeys(keywords(api.Model.generate)) | given
    for value in WRONG:
        try:
            function(**{**given, argument: value})
        except cx.CosmosExportError as error:
            assert len(str(error).split()) > 2, value
        else:
            assert name in ("plan", "generate"), value


@pytest.mark.parametrize("name", ["compile", "calibrate", "quantize", "open"])
def test_what_reports_nothing_is_no_progress(name: str) -> None:
    function, given = CALLS[name]
    with pytest.raises(cx.CosmosExportError, match=f"CX005: `progress` of `{name}` is of type ndarray"):
        function(**given, progress=np.zeros(2))


def test_values_are_taken_as_they_are_meant(tmp_path: Path) -> None:
    options = made(BuildOptions, "compile", {
        "checkpoint": str(tmp_path), "profiles": "256p-17f", "steps": np.int64(8), "shift": 3, "modalities": ["vision"],
        "guidance_interval": [400, 1000.0], "loop": None,
    })  # fmt: skip
    expected = BuildOptions(
        tmp_path, profiles=("256p-17f",), steps=8, shift=3.0, modalities=("vision",), guidance_interval=(400.0, 1000.0)
    )
    assert options == expected
    assert type(options.steps) is int and type(options.shift) is float


@pytest.mark.parametrize(
    "value",
    [
        Image.new("RGBA", (4, 2), "red"),
        np.full((2, 4, 3), [255, 0, 0], np.uint8),
        np.full((1, 2, 4, 3), [1.0, 0.0, 0.0], np.float32),
        [np.full((2, 4, 3), [255, 0, 0], np.uint8)],
    ],
    ids=["pil", "array", "floats", "list"],
)
def test_pictures_in_memory(value: object) -> None:
    found = passed.pictures("image", value)
    assert (found.dtype, found.shape) == (np.uint8, (1, 2, 4, 3))
    assert (found == np.array([255, 0, 0])).all()


@pytest.mark.parametrize(
    "value", [np.zeros((2, 4)), np.zeros((2, 4, 4)), np.full((2, 4, 3), 2.0), np.zeros((2, 4, 3), np.int64), 5, [], {}]
)
def test_what_is_no_picture_is_refused(value: object) -> None:
    with pytest.raises(cx.CosmosExportError, match="CX614"):
        passed.pictures("image", value)


def test_reprs_are_short() -> None:
    for registry in (cx.targets, cx.recipes, cx.schemes, cx.modes):
        assert all(one.name in repr(one) and len(repr(one)) < 100 for one in registry())
    assert repr(cx.plan("nano", targets="cpu")) == "Estimate(Cosmos3-Nano, bf16, 1 of 1 fit)"
