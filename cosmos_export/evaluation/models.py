"""ONNX models on the CPU, with values that numpy has no type for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Value = Any
"""A numpy array, or ONNX Runtime's own value where it is of a type that numpy lacks (FP8)."""


class Model:
    """The model at ``path`` in ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self._value: Any = onnxruntime.OrtValue
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def __call__(self, known: Mapping[str, Value]) -> dict[str, Value]:
        """Its outputs by name; ``known`` may hold more than it takes."""
        feed = {name: self._bound(known[name]) for name in self.inputs}
        values = self._session.run_with_ort_values(self.outputs, feed)
        return {name: _unbound(value) for name, value in zip(self.outputs, values, strict=True)}

    def _bound(self, value: Value) -> Any:
        return self._value.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value


def _unbound(value: Any) -> Value:
    return value if "float8" in value.data_type() else value.numpy()
