"""Each scheme is declared once and whole."""

from __future__ import annotations

import ast
import os
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch

from cosmos_export.calibration.algorithms import ALGORITHMS
from cosmos_export.calibration.formats import quantized_weight
from cosmos_export.evaluation.gates import LINEAR_MARGIN
from cosmos_export.ir.interpreter import pack_rows, tensor_scale
from cosmos_export.ir.spec import Packing, Part, parts_of
from cosmos_export.plan import published_subject
from cosmos_export.plan.precision import precision
from cosmos_export.precision import schemes
from cosmos_export.precision.layout import LinearInputs
from cosmos_export.precision.recipe import load_recipe
from cosmos_export.precision.scheme import Scheme, StepLimits
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED, stored_schemes
from cosmos_export.precision.sites import CORE, KINDS, LINEARS, PROMPT_KV
from cosmos_export.targets import load_target, target_names

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = [scheme for scheme in SCHEMES.values() if scheme.weight is not None]


def named(scheme: Scheme) -> str:
    return scheme.name


# -- declarations -----------------------------------------------------------------------------------------------------


def test_a_file_is_a_scheme_of_that_name() -> None:
    modules = [module.name for module in iter_modules(schemes.__path__)]
    files = {name: import_module(f"{schemes.__name__}.{name}") for name in modules}
    assert {name.replace("_", "-"): module.SCHEME.name for name, module in files.items()} == {n: n for n in SCHEMES}
    assert all(module.__doc__ for module in files.values())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=named)
def test_a_declaration_is_whole(scheme: Scheme) -> None:
    assert scheme.weights and scheme.activations and scheme.product
    assert scheme.kinds and set(scheme.kinds) <= set(KINDS)
    assert any(scheme.computes in load_target(name).peak_flops for name in target_names()), "a rate of some target"
    assert set(scheme.algorithms) <= set(ALGORITHMS) and scheme.requires in {"", *SCHEMES} - {scheme.name}
    if scheme.name == UNQUANTIZED:
        assert set(scheme.kinds) == set(KINDS) and not scheme.linear_error and scheme.steps is None
        return
    assert scheme.engine and scheme.steps is not None
    assert (scheme.weight is not None) == bool(set(LINEARS) & set(scheme.kinds))
    assert (scheme.attention is not None) == (CORE in scheme.kinds)
    assert bool(scheme.modelopt) == ("modelopt-auto" in scheme.algorithms)
    if scheme.weight is None:
        return
    assert scheme.builder_share > 0 and 0 < scheme.linear_error < 0.2
    assert scheme.weight.local <= (scheme.weight.row_scales is not None)
    assert bool(scheme.weight.groups or scheme.weight.block) <= (scheme.weight.row_scales is not None)
    assert isinstance(vars(torch)[scheme.weight.values], torch.dtype)
    assert scheme.pre_scaled <= scheme.weight_only
    if PROMPT_KV in scheme.kinds:  # what the pass writes for them
        assert scheme.activation is not None and scheme.activation.values == "float8_e4m3fn"


def test_a_product_tells_its_scheme() -> None:
    """By the form of its weight, and by whether it reads something rounded."""
    assert len({(scheme.weight, scheme.calibrated) for scheme in WEIGHTS}) == len(WEIGHTS)
    formats = {scheme.weight for scheme in WEIGHTS}
    assert len({format.name for format in formats if format is not None}) == len(formats)


def test_searches_have_a_scheme_and_pre_scales_have_one() -> None:
    for algorithm in ALGORITHMS:
        count = len(schemes.searched_schemes(algorithm))
        assert count == 0 if algorithm == "none" else count > 1 if algorithm == "modelopt-auto" else count == 1, (
            algorithm
        )


def test_limits_of_a_mixture_are_the_loosest() -> None:
    narrow, coarse = StepLimits(0.01, 0.05, 0.999, 1.3, 1.5), StepLimits(0.02, 0.04, 0.99)
    assert StepLimits.loosest([narrow]) == narrow
    assert StepLimits.loosest([narrow, coarse]) == StepLimits(0.02, 0.05, 0.99)
    assert StepLimits.loosest([narrow, StepLimits(0.01, 0.01, 0.9, 2.0, 1.0)]) == StepLimits(0.01, 0.05, 0.9, 2.0, 1.5)


# -- what they do -----------------------------------------------------------------------------------------------------


def at_once(operation: Any, *operands: Any) -> Any:
    """What a graph would be given to do later."""
    return operation(*operands)


@pytest.mark.parametrize("scheme", WEIGHTS, ids=named)
def test_a_linear_loses_what_is_stated(scheme: Scheme) -> None:
    """Gaussian weights and inputs; the gate allows 1.3 times the stated loss."""
    torch.manual_seed(0)
    x, w, format = torch.randn(256, 1024), torch.randn(512, 1024), scheme.weight
    assert format is not None
    group = format.groups[0] if format.groups else 0
    parts = []
    for part in parts_of(format):
        packing = Packing(format, part, torch.float32, group)
        parts.append(pack_rows(packing, w, tensor_scale(packing, w.abs().amax())))
        assert parts[-1].numel() <= w.numel() and (part is Part.VALUES) == (parts[-1].shape == w.shape)
    back, read = format.widen(at_once, parts, torch.float32), x
    if scheme.activation is not None:
        read = scheme.activation.requantize(at_once, x, scheme.activation.scale(x.abs().amax()), x.dtype)
    error = float((read @ back.T - x @ w.T).norm() / (x @ w.T).norm())
    assert error == pytest.approx(scheme.linear_error, rel=0.06) and error < LINEAR_MARGIN * scheme.linear_error


@pytest.mark.parametrize("scheme", stored_schemes(), ids=named)
def test_what_is_stored_comes_back(scheme: Scheme) -> None:
    torch.manual_seed(0)
    layout, w = scheme.layout, torch.randn(256, 1024).bfloat16()
    assert layout is not None and layout.refusal(tuple(w.shape)) is None
    for rounding in layout.roundings:
        tensors = quantized_weight(scheme.name, w, LinearInputs(3.0 if scheme.calibrated else None), rounding)
        kinds = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "U8": torch.uint8}
        stated = {leaf: (kinds[kind], shape) for leaf, (kind, shape) in layout.tensors(256, 1024).items()}
        assert {leaf: (t.dtype, tuple(t.shape)) for leaf, t in tensors.items()} == stated
        error = float((layout.decode(tensors) - w.float()).norm() / w.float().norm())
        assert error == pytest.approx(layout.error, rel=0.05)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES.values() if scheme.steps is not None], ids=named)
def test_a_scheme_runs_somewhere_and_is_planned(scheme: Scheme) -> None:
    place = {LINEARS[0]: "gen", CORE: "gen.attention.core"}[scheme.kinds[0]]
    targets = [load_target(name) for name in target_names()]
    target = next(
        t for t in (*targets, *(t.on(b) for t in targets for b in t.other_backends)) if scheme.name in t.schemes
    )
    geometry = published_subject("nano").geometry
    planned = precision(load_recipe(UNQUANTIZED), (f"{place}={scheme.name}",), target, geometry, 8)
    assert scheme.computes in planned.computes
    assert scheme.name in {*planned.generator.linears, *planned.generator.attention}
    if scheme.weight is not None:
        assert planned.generator.label == scheme.name and planned.generator.bits == scheme.bits < 16
        assert planned.alone == (tuple(range(8)) if scheme.weight_only else ())


# -- documentation ----------------------------------------------------------------------------------------------------


def test_docs_list_them() -> None:
    """`UPDATE_DOCS=1` writes the table of docs/precision.md."""
    page = ROOT / "docs/precision.md"
    before, begin, rest = page.read_text("utf-8").partition("<!-- schemes -->\n")
    _, end, after = rest.partition("<!-- end of schemes -->\n")
    assert begin and end
    rows = (
        f"| `{s.name}` | {s.weights} | {s.activations} | {s.product} |"
        for s in SCHEMES.values()
        if s.name != UNQUANTIZED
    )
    table = "\n".join(["| scheme | weight | activation | in the engine |", "|---|---|---|---|", *rows])
    text = f"{before}{begin}{table}\n{end}{after}"
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(text, encoding="utf-8")
    assert page.read_text("utf-8") == text, "UPDATE_DOCS=1 pytest tests/precision/test_schemes.py -k docs"
    stored = (ROOT / "docs/calibration.md").read_text("utf-8")
    assert not [scheme.name for scheme in stored_schemes() if f"| `{scheme.name}` |" not in stored]


# -- imports ----------------------------------------------------------------------------------------------------------


def test_nothing_outside_imports_one_scheme() -> None:
    """`SCHEMES` is the way in: a module that imports one scheme's file would be a second place that knows it."""
    room = "cosmos_export.precision.schemes"
    for folder in ("cosmos_export", "passes", "kernels", "calibration", "targets"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.is_relative_to(ROOT / "cosmos_export/precision/schemes"):
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                module = getattr(node, "module", None) or ""
                assert not any(name.startswith(f"{room}.") for name in (module, *names)), path
