"""ONNX models on the CPU, with values that numpy has no type for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cosmos_export.targets.onnx.sessions import session_options

if TYPE_CHECKING:
    import onnx

Value = Any
"""A numpy array, or ONNX Runtime's own value where it is of a type that numpy lacks (FP8)."""

SHOWN = "/shown"
"""Ends the name of a result that is a value inside of the model."""


class OnnxModel:
    """The model at ``path`` in ONNX Runtime. ``shown``: values inside of it that are results too, in float32."""

    def __init__(self, path: Path, shown: Collection[str] = ()) -> None:
        import onnxruntime

        options = session_options(torch.get_num_threads())
        # Builders of engines run beside it: a thread that waits for work gives its core away.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model: str | bytes = str(path)
        if shown:
            model = _with_results(path, shown)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        self._session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        self._value: Any = onnxruntime.OrtValue
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def __call__(self, known: Mapping[str, Value]) -> dict[str, Value]:
        """Outputs of the model by name; ``known`` may hold more than its inputs."""
        feed = {name: self._bound(known[name]) for name in self.inputs}
        values = self._session.run_with_ort_values(self.outputs, feed)
        return {name: _unbound(value) for name, value in zip(self.outputs, values, strict=True)}

    def _bound(self, value: Value) -> Any:
        return self._value.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value


def read_model(path: Path) -> onnx.ModelProto:
    """The model at ``path`` without its weights."""
    import onnx

    return onnx.load(str(path), load_external_data=False)


def _with_results(path: Path, shown: Collection[str]) -> bytes:
    """The model at ``path`` with the values ``shown`` among its results, under their names and ``SHOWN``."""
    import onnx

    model = read_model(path)
    for name in sorted(shown):
        model.graph.node.append(onnx.helper.make_node("Cast", [name], [name + SHOWN], to=onnx.TensorProto.FLOAT))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name + SHOWN, onnx.TensorProto.FLOAT, None))
    return bytes(model.SerializeToString())


def _unbound(value: Any) -> Value:
    return value if "float8" in value.data_type() else value.numpy()
