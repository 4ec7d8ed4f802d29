"""The registry of backends: each answers everything by itself."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest

import cosmos_export.targets.backends as registry
from cosmos_export.diagnostics import CosmosExportError, InternalError
from cosmos_export.kernels.description import PLUGINS
from cosmos_export.targets import load_target, target_names
from cosmos_export.targets.backends import backend_of, backends, distributions, reference_backend
from cosmos_export.targets.backends.protocol import Backend, BuildAsked, PrecisionAsked
from cosmos_export.targets.description import parse_target
from cosmos_export.targets.profiles import parse_profile

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(backends())


def test_the_files_of_the_folder_are_the_backends() -> None:
    files = {path.stem for path in (ROOT / "targets" / "backends").glob("*.py")} - {"__init__", "protocol"}
    assert {type(one).__module__.rpartition(".")[2] for one in backends().values()} == files
    assert list(backends()) == NAMES and len(NAMES) >= 4
    assert all(backend.name == name for name, backend in backends().items())
    assert reference_backend().devices[0] == "cpu" and not reference_backend().needs_gpu


@pytest.mark.parametrize("name", target_names())
def test_every_target_has_backends_that_there_are(name: str) -> None:
    target = load_target(name)
    for one in (target.backend, *target.other_backends):
        assert backend_of(target.on(one)) is backends()[one]
    assert set(target.also) <= set(backends())


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_answers_everything(name: str) -> None:
    backend = backends()[name]
    assert isinstance(backend, Backend) and backend.title
    assert backend.devices and set(backend.devices) <= {"cuda", "cpu"}
    assert "cuda" in backend.devices or not backend.needs_gpu
    assert backend.requirements and {need.distribution for need in backend.requirements} <= set(distributions())
    optional = (ROOT / "pyproject.toml").read_text()
    for need in backend.requirements:
        assert f"\n{need.extra} = [" in optional, "the extra that a hint names"
    for method in ("refusals", "precision_refusals", "write", "open"):
        assert callable(getattr(backend, method))
    assert backend.builds_here == (backend.engines is not None and backend.engines.built_here)
    assert backend.finished_here or backend.needs_gpu
    if backend.engines is not None:
        assert set(backend.engines.key()) == {"builder", "worker"} and backend.engines.module.isidentifier()
        for method in ("require", "require_gpu", "build", "inspect", "checks", "problem"):
            assert callable(getattr(backend.engines, method))
    targets = [
        target for target in map(load_target, target_names()) if name in (target.backend, *target.other_backends)
    ]
    assert targets, "a backend without a target is not reached"


def asked_for() -> BuildAsked:
    return BuildAsked(external_weights=True, kernels=tuple(PLUGINS), memory_budget=True)


@pytest.mark.parametrize("name", NAMES)
def test_refusals_have_a_code_and_a_way_out(name: str) -> None:
    backend, target = backends()[name], load_target("h100")
    assert list(backend.refusals(BuildAsked(), target)) == []
    found = list(backend.refusals(asked_for(), target))
    for one in (field.name for field in fields(BuildAsked)):  # each by itself is refused as it is among the others
        alone = replace(BuildAsked(), **{one: getattr(asked_for(), one)})
        assert {error.code for error in backend.refusals(alone, target)} <= {error.code for error in found}
    precision = PrecisionAsked(
        recipe="fp8", schemes=frozenset({"fp8", "fp8-attention"}), checkpoint=Path("nano"), checkpoint_dtype="fp32",
        loop="device", steps=50, weight_only_steps=50, profiles=(parse_profile("480p"),),
    )  # fmt: skip
    nothing = replace(precision, schemes=frozenset(), loop="host", weight_only_steps=0)
    assert list(backend.precision_refusals(nothing)) == []
    found += backend.precision_refusals(precision)
    for error in found:
        assert isinstance(error, CosmosExportError) and error.code.startswith("CX") and error.message and error.hint
    assert len({error.code for error in found}) == len(found)


def test_what_follows_from_the_facts() -> None:
    refused = {
        name: {e.code for e in one.refusals(asked_for(), load_target("h100"))} for name, one in backends().items()
    }
    for name, backend in backends().items():
        assert ("CX452" in refused[name]) == (backend.engines is None)
        assert ("CX459" in refused[name]) != backend.takes_kernels
        assert ("CX456" in refused[name]) != backend.builds_here


DESCRIPTION = """
title = "a card"
backend = "{backend}"
unified_memory = false
precisions = ["bf16"]
traps = []
source = ["a data sheet"]
{gpu}
[peak_flops]
[refused]
"""
A_GPU = 'compute_capability = "12.0"\nmemory_bytes = 1\nbandwidth_bytes_per_s = 1'


def test_a_description_names_a_backend_and_has_its_gpu() -> None:
    assert backend_of(parse_target("x", DESCRIPTION.format(backend=NAMES[0], gpu=A_GPU))).name == NAMES[0]
    with pytest.raises(InternalError, match=r"backend `opencl` is not one of inductor") as caught:
        backend_of(parse_target("x", DESCRIPTION.format(backend="opencl", gpu=A_GPU)))
    assert caught.value.code == "CX402"
    for name, backend in backends().items():
        target = parse_target("x", DESCRIPTION.format(backend=name, gpu=""))
        if backend.needs_gpu:
            with pytest.raises(InternalError, match="needs a GPU") as caught:
                backend_of(target)
            assert caught.value.code == "CX402"
        else:
            assert backend_of(target) is backend


def test_a_file_without_a_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, again = ModuleType("empty"), ModuleType("again")
    again.BACKEND = reference_backend()  # type: ignore[attr-defined]
    for module, said in ((empty, "declares no `BACKEND`"), (again, "two files")):
        monkeypatch.setattr(registry, "import_module", lambda name, module=module: module)
        backends.cache_clear()
        with pytest.raises(InternalError, match=said) as caught:
            backends()
        assert caught.value.code == "CX408"
    monkeypatch.undo()
    backends.cache_clear()
    assert sorted(backends()) == NAMES


# ---------------------------------------------------------------------------------------------------------------------
# Imports


def test_the_floors_of_targets_do_not_look_up() -> None:
    """Descriptions know no machinery, and what lowers, builds and runs knows no backend."""
    machinery = ("cosmos_export.targets.onnx", "cosmos_export.targets.trt", "cosmos_export.targets.inductor")
    upper = "cosmos_export.targets.backends"
    for path in (ROOT / "targets").rglob("*.py"):
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [])
            + ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        }
        place = path.relative_to(ROOT / "targets").parts
        if place[0] != "backends":
            assert not any(name.startswith(upper) for name in imported), path
        if len(place) == 1:
            assert not any(name.startswith(machinery) for name in imported), path
