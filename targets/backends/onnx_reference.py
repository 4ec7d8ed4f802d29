"""ONNX's own reference evaluator: it runs the models that every bundle has, slowly, by what defines the operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosmos_export.diagnostics import ToolError, UnsupportedError
from cosmos_export.targets.backends.protocol import Backend, Requirement

if TYPE_CHECKING:
    import numpy as np

    from cosmos_export.bundle import BundleFiles
    from cosmos_export.targets.sessions import Array, Executor, Value


class _Value:
    def __init__(self, array: Array) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    def numpy(self) -> Array:
        return self._array


class _Session:
    def __init__(self, graph: str, evaluator: Any, types: Mapping[str, np.dtype[Any]]) -> None:
        self._graph, self._evaluator, self._types = graph, evaluator, types

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._types

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self._evaluator.output_names)

    def run(self, feeds: Mapping[str, Array | Value]) -> dict[str, Value]:
        import numpy as np

        given = {}
        for name, dtype in self._types.items():
            value = feeds[name]
            array = value if isinstance(value, np.ndarray) else value.numpy()
            given[name] = np.array(array, dtype=dtype)  # a copy: the caller may change what it gave
        try:
            made = self._evaluator.run(None, given)
        except Exception as error:  # of whichever operation it was
            raise ToolError("CX501", f"ONNX's evaluator failed in graph `{self._graph}`: {error}") from error
        return {name: _Value(array) for name, array in zip(self.outputs, made, strict=True)}

    def close(self) -> None:
        self._evaluator = None


class _Executor:
    def __init__(self, name: str, files: BundleFiles) -> None:
        self.name, self.device, self._files = name, "cpu", files

    def open(self, graph: str) -> _Session:
        import onnx
        from onnx.helper import tensor_dtype_to_np_dtype
        from onnx.reference import ReferenceEvaluator

        from cosmos_export.targets.onnx.sessions import models

        path = self._files.location(models(self._files.manifest)[graph], "onnx")
        try:
            model = onnx.load(str(path))
        except Exception as error:  # protobuf's own, which it does not name
            raise ToolError("CX502", f"ONNX cannot load graph `{graph}` of {self._files.path}: {error}") from error
        types = {i.name: tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input}
        return _Session(graph, ReferenceEvaluator(model), types)

    def close(self) -> None:
        """Nothing is held besides the sessions."""


class OnnxReference(Backend):
    name = "onnx-reference"
    title = "ONNX's reference evaluator"
    devices = ("cpu",)
    requirements = (Requirement("onnx", "compile"),)
    needs_gpu = False

    def open(self, files: BundleFiles, device: str | None) -> Executor:
        try:
            import onnx  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(
                "CX503", f"ONNX is not installed: {error}", 'pip install ".[compile]" in the checkout'
            ) from error
        return _Executor(self.name, files)


BACKEND = OnnxReference()
