"""Plugins of a bundle, told to `tensorrt.plugin` itself: its Python code is in the wheel of the bindings.

What is behind it in the libraries is stood in for: a registry, and expressions over sizes that are known here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cosmos_export.bundle.strict import StrictError
from cosmos_export.kernels.description import (
    DOCUMENT,
    NAMESPACE,
    Output,
    PluginRecord,
    document_text,
)
from cosmos_export.targets.trt.plugins import parse_document, read_document, register_plugins

BINDINGS = importlib.util.find_spec("tensorrt_bindings")
pytestmark = pytest.mark.skipif(BINDINGS is None, reason="the bindings of TensorRT are not installed (dev extra)")

RECORD = PluginRecord(
    name="norm_0123abcd",
    entry="norm_kernel",
    inputs=("bf16", "fp32"),
    outputs=(Output("fp8", (("size", 0, 0), 48)), Output("bf16", (("size", 0, 0), ("size", 1, 0)))),
    integers=(("size", 0, 0), ("product", 2, ("size", 0, 0), ("size", 1, 0)), 1),
    grid=(("cdiv", ("size", 0, 0), 4), 3, 1),
    threads=128,
    shared_bytes=4096,
)


class Expression:
    """A size, as the builder's expressions are: of a value that is known here."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return False


class Expressions:
    """The builder's maker of expressions."""

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, kind: Enum, a: Expression, b: Expression) -> Expression:
        operations: dict[str, Callable[[int, int], int]] = {
            "SUM": int.__add__, "PROD": int.__mul__, "CEIL_DIV": lambda x, y: -(-x // y),
        }  # fmt: skip
        return Expression(operations[kind.name](a.value, b.value))


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        assert creator.plugin_namespace == namespace
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class Desc:
    """A description of an operand that has its size."""

    def __init__(self, kind: Any, *dims: int) -> None:
        self.desc = SimpleNamespace(type=kind, format="LINEAR", scale=1.0, dims=dims)
        self.min = self.max = self.opt = dims


def stand_in() -> ModuleType:
    """`tensorrt` as far as its plugin package asks for it."""
    trt = ModuleType("tensorrt")
    for name in (
        "IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime", "IPluginV3QuickAOTBuild",
        "IPluginCreatorV3Quick", "ISymExpr", "ITensor", "PluginTensorDesc",
    ):  # fmt: skip
        setattr(trt, name, type(name, (), {"__init__": lambda self, *_: None}))
    for name, members in {
        "DataType": "FLOAT HALF BF16 FP8 INT8 INT32",
        "TensorFormat": "LINEAR",
        "DimensionOperation": "SUM PROD SUB MAX MIN EQUAL LESS FLOOR_DIV CEIL_DIV",
        "PluginFieldType": "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN",
        "PluginArgType": "INT",
        "PluginArgDataType": "INT8 INT16 INT32",
        "TensorRTPhase": "BUILD RUNTIME",
        "QuickPluginCreationRequest": "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT",
    }.items():
        setattr(trt, name, Enum(name, members))
    registry = Registry()
    own: dict[str, Any] = {
        "IDimensionExpr": Expression, "DynamicPluginTensorDesc": Desc, "PluginFieldCollection": list,
        "PluginField": lambda name, data=None, type=None: (name, data, type), "get_plugin_registry": lambda: registry,
        "Dims": type("Dims", (tuple,), {"MAX_DIMS": 8}), "DimsExprs": lambda n: [None] * n,
        "Logger": type("Logger", (), {"WARNING": 1, "log": lambda *_: None}),
    }  # fmt: skip
    for name, value in own.items():
        setattr(trt, name, value)
    return trt


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """`tensorrt`, which is stood in for, and its `tensorrt.plugin`."""
    assert BINDINGS is not None and BINDINGS.submodule_search_locations is not None
    folder = Path(BINDINGS.submodule_search_locations[0]) / "plugin"
    trt = stand_in()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    spec.loader.exec_module(plugin)
    yield trt, plugin
    for name in [name for name in sys.modules if name.startswith("tensorrt.plugin")]:
        monkeypatch.delitem(sys.modules, name)


def written(folder: Path, *records: PluginRecord) -> Path:
    (folder / DOCUMENT).write_text(document_text(records))
    for record in records:
        (folder / f"{record.name}.ptx").write_text(f"// {record.name}")
    return folder


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    other = PluginRecord("other_1", "k", ("fp16",), (Output("fp16", (1,)),), (), (1, 1, 1), 32, 0)
    first, second = read_document(written(tmp_path, RECORD, other))
    assert document_text([first, second]) == document_text([RECORD, other])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../outside/norm"}, {"name": "a/b"}, {"name": ""}, {"name": {}}, {"name": "x" * 300},
        {"entry": "k; exit"}, {"inputs": ["int8"]}, {"inputs": "bf16"}, {"outputs": []}, {"more": 1},
        {"outputs": [{"type": "bf16", "shape": [["size", 2, 0]]}]}, {"outputs": [{"type": "x", "shape": [1]}]},
        {"grid": [1, 1]}, {"grid": [["system", "id"], 1, 1]}, {"grid": [["cdiv", 1, 0], 1, 1]},
        {"grid": [["cdiv", ["size", 0, 0], ["size", 0, 0]], 1, 1]}, {"grid": [["size", True, 0], 1, 1]},
        {"grid": [["size", 0], 1, 1]}, {"integers": [-1]}, {"integers": [1.5]}, {"integers": [[]]},
        {"integers": [["product", *[1] * 20]]}, {"threads": 0}, {"threads": 4096}, {"shared_bytes": -1},
    ],
)  # fmt: skip
def test_a_description_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    document = json.loads((written(tmp_path, RECORD) / DOCUMENT).read_text())
    parse_document(json.dumps(document).encode())
    document["plugins"][0] |= changes
    with pytest.raises(StrictError):
        parse_document(json.dumps(document).encode())


def test_other_documents_are_refused(tmp_path: Path) -> None:
    size: Any = 1
    for _ in range(300):
        size = ["product", size, 1]
    document = json.loads((written(tmp_path, RECORD) / DOCUMENT).read_text())
    plugin = document["plugins"][0]
    for wrong in (
        {**document, "namespace": "other"}, {**document, "plugins": [plugin, plugin]}, {"plugins": []}, [],
        {**document, "plugins": [plugin | {"integers": [size]}]},
    ):  # fmt: skip
        with pytest.raises(StrictError):
            parse_document(json.dumps(wrong).encode())


def test_a_builder_creates_and_launches_it(builder: tuple[Any, Any], tmp_path: Path) -> None:
    """As the parser makes it for a node with ``aot``, and as the builder asks it then."""
    trt, plugin = builder
    register_plugins(trt, plugin, written(tmp_path, RECORD))
    creator = trt.get_plugin_registry().get_creator(RECORD.name, "1", NAMESPACE)
    assert list(creator.field_names) == []
    made = creator.create_plugin(
        RECORD.name, NAMESPACE, trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )  # fmt: skip
    kinds, expressions = trt.DataType, Expressions()
    assert made.get_num_outputs() == 2
    assert list(made.get_output_data_types([kinds.BF16, kinds.FLOAT], [2, 1])) == [kinds.FP8, kinds.BF16]
    shapes = [[Expression(10), Expression(48)], [Expression(48)]]
    found = made.get_output_shapes(shapes, [], expressions)
    assert [[one.value for one in shape] for shape in found] == [[10, 48], [10, 48]]

    operands = [Desc(kinds.BF16, 10, 48), Desc(kinds.FLOAT, 48), Desc(kinds.FP8, 10, 48), Desc(kinds.BF16, 10, 48)]
    launch, integers = SimpleNamespace(), Setter()
    made.set_tactic(0)
    made.get_launch_params(shapes, operands, 2, launch, integers, expressions)
    assert [getattr(launch, f"grid_{axis}").expr.value for axis in "xyz"] == [3, 3, 1]
    assert [getattr(launch, f"block_{axis}").expr.value for axis in "xyz"] == [128, 1, 1]
    assert launch.shared_mem.expr.value == 4096
    assert integers.nbSymExprs == 3 and [integers.values[i].expr.value for i in range(3)] == [10, 960, 1]
    assert all(value.dtype is trt.PluginArgDataType.INT32 for value in integers.values.values())
    name, code = made.get_kernel([one.desc for one in operands[:2]], [one.desc for one in operands[2:]])
    assert (name, code) == ("norm_kernel", b"// norm_0123abcd")


class Setter:
    """Where the builder takes integers of a launch from."""

    def __init__(self) -> None:
        self.nbSymExprs = 0
        self.values: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        self.values[index] = value
