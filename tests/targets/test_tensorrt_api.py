"""Every call this project makes of TensorRT exists in the bindings of TensorRT 11, with the parameters it is given.

The bindings' names and signatures are in ``tensorrt_11_api.json``, read from the wheel by ``read_tensorrt_api.py``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import cosmos_export.targets.trt.sessions as rtx_sessions
from cosmos_export.targets.trt import worker as trt_worker

DOCUMENT = json.loads((Path(__file__).parent / "tensorrt_11_api.json").read_text())
API: dict[str, Any] = DOCUMENT["api"]

# What a variable or attribute of that name is an object of, in the code that talks to TensorRT.
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "optimization": "IOptimizationProfile", "cache": "ITimingCache", "inspector": "EngineInspector",
    "engine": "ICudaEngine", "runtime": "Runtime", "_runtime": "Runtime", "_engine": "ICudaEngine",
    "_context": "IExecutionContext", "settings": "IRuntimeConfig", "layer": "ILayer", "tensor": "ITensor",
    "error": "IParserError" if "IParserError" in API else "ParserError", "attention": "IAttention",
}  # fmt: skip
ONLY_RTX = {
    ("trt", "ComputeCapability"), ("IBuilderConfig", "num_compute_capabilities"), ("trt", "CudaGraphStrategy"),
    ("IBuilderConfig", "set_compute_capability"), ("IRuntimeConfig", "cuda_graph_strategy"),
}  # fmt: skip
"""Used where the module is TensorRT-RTX alone: behind the compute capability, or behind a question for the class."""
NOT_OURS = {"settings.get", "error.strerror", "cache.get"}


@dataclass(frozen=True)
class Use:
    """One use of the API: a member of a class or of the module, and how it is called where it is called."""

    owner: str
    member: str
    positional: int | None
    keywords: tuple[str, ...]
    line: int


def uses(path: Path) -> Iterator[Use]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = _owner(node.value)
        name = f"{owner[1]}.{node.attr}" if owner else ""
        if owner is None or name in NOT_OURS:
            continue
        call = calls.get(id(node))
        starred = call is not None and any(isinstance(a, ast.Starred) for a in call.args)
        yield Use(
            owner[0], node.attr, None if call is None or starred else len(call.args),
            tuple(k.arg or "" for k in call.keywords) if call else (), node.lineno,
        )  # fmt: skip


def _owner(value: ast.expr) -> tuple[str, str] | None:
    """(class, name of the variable) that an attribute is taken of."""
    if isinstance(value, ast.Name):
        name = value.id
    elif isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
        if value.value.id == "trt":
            return value.attr, value.attr
        if value.value.id != "self":
            return None
        name = value.attr
    elif (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "get_timing_cache"
    ):
        return "ITimingCache", "cache"
    else:
        return None
    if name == "trt" or name == "_trt":
        return "trt", "trt"
    return (CLASSES[name], name) if name in CLASSES else None


def problem(use: Use) -> str | None:
    """What is wrong with a use, if anything."""
    if (use.owner, use.member) in ONLY_RTX or use.owner in ("CudaGraphStrategy", "__version__"):
        return None
    if (use.owner, use.member) == ("ILayer", "attention"):  # the worker casts the layer before
        use = replace(use, owner="IAttentionInputLayer")
    if use.owner == "trt":
        if use.member in API or use.member.startswith("__"):
            signatures = API.get(use.member, {}).get("__init__") if isinstance(API.get(use.member), dict) else None
        else:
            return f"tensorrt has no `{use.member}`"
    elif use.owner not in API:
        return f"tensorrt has no class `{use.owner}`"
    elif use.member not in API[use.owner] and not use.member.startswith("__"):
        return f"`{use.owner}` has no `{use.member}`"
    else:
        signatures = API[use.owner].get(use.member)
    if use.positional is None or not signatures or use.member.startswith("__"):
        return None
    if any(_fits(parameters, use) for parameters in signatures):
        return None
    return f"`{use.owner}.{use.member}` takes {signatures}, given {use.positional} and {list(use.keywords)}"


def _fits(parameters: list[str], use: Use) -> bool:
    assert use.positional is not None
    names = [p.rstrip("=") for p in parameters]
    needed = [p for i, p in enumerate(parameters) if not p.endswith("=") and i >= use.positional]
    return (
        use.positional <= len(parameters)
        and set(use.keywords) <= set(names[use.positional :])
        and set(needed) <= set(use.keywords)
    )


FILES = [Path(module.__file__ or "") for module in (trt_worker, rtx_sessions)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_use_is_in_the_bindings(path: Path) -> None:
    found = list(uses(path))
    assert len(found) > 20
    wrong = [f"line {use.line}: {said}" for use in found if (said := problem(use))]
    assert not wrong, "\n".join(wrong)


def test_the_reader_sees_the_calls() -> None:
    members = {(use.owner, use.member) for path in FILES for use in uses(path)}
    assert {
        ("Builder", "build_serialized_network_to_stream"), ("IBuilderConfig", "set_timing_cache"),
        ("IBuilderConfig", "hardware_compatibility_level"), ("OnnxParser", "parse_from_file"),
        ("EngineInspector", "get_engine_information"), ("BuilderFlag", "VERSION_COMPATIBLE"),
        ("IExecutionContext", "execute_async_v3"), ("Runtime", "deserialize_cuda_engine"),
    } <= members  # fmt: skip


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (Use("Builder", "build_engine", 2, (), 1), "has no `build_engine`"),
        (Use("trt", "NoSuch", None, (), 1), "has no `NoSuch`"),
        (Use("IBuilderConfig", "set_timing_cache", 1, (), 1), "takes"),
        (Use("IBuilderConfig", "set_timing_cache", 1, ("ignore",), 1), "takes"),
        (Use("BuilderFlag", "STRONG", None, (), 1), "has no `STRONG`"),
    ],
)
def test_the_check_finds_what_is_wrong(use: Use, said: str) -> None:
    assert said in (problem(use) or "")


def test_names_that_are_made_of_settings() -> None:
    """What the worker looks up by a name it makes."""
    for level in ("NONE", "SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS"):
        assert level in API["HardwareCompatibilityLevel"]
    assert DOCUMENT["version"].startswith("11.")


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("ILogger", "log"), ("IProgressMonitor", "phase_start"), ("IProgressMonitor", "step_complete"),
        ("IProgressMonitor", "phase_finish"), ("IStreamWriter", "write"),
    ],
)  # fmt: skip
def test_callbacks_have_the_parameters_they_are_called_with(base: str, method: str) -> None:
    """The worker's own classes, against the signature that TensorRT documents for them."""
    tree = ast.parse(FILES[0].read_text(encoding="utf-8"))
    classes = [
        n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and base in ast.unparse(n.bases[0] if n.bases else n)
    ]
    (function,) = (f for c in classes for f in c.body if isinstance(f, ast.FunctionDef) and f.name == method)
    own = [a.arg for a in function.args.args][1:]
    (documented,) = API[base][method]
    assert len(own) == len(documented), (own, documented)
