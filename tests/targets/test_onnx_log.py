"""ONNX Runtime prints nothing of a model's names: they go wherever text of files goes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from cosmos_export.targets.onnx.sessions import session_options

ROOT = Path(__file__).resolve().parents[2]
NAME = "\x1b[31mnode\x9b"


def model(operation: str) -> bytes:
    """A model whose node ``operation`` has an escape sequence for a name and fails when it runs, or is unknown."""
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None, None]) for n in ("x", "y"))
    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [7, 7])
    unused = helper.make_tensor(f"{NAME}unused", onnx.TensorProto.FLOAT, [1], [0.0])  # worth a warning
    node = helper.make_node(operation, ["x", "shape"], ["y"], NAME)
    graph = helper.make_graph([node], NAME, [x], [y], [shape, unused])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()  # type: ignore[no-any-return]


def test_a_model_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    session = onnxruntime.InferenceSession(model("Reshape"), session_options(1), ["CPUExecutionProvider"])
    with pytest.raises(Exception, match="node"):
        session.run(None, {"x": np.zeros((2, 3), np.float32)})
    with pytest.raises(Exception, match="Unheard"):
        onnxruntime.InferenceSession(model("Unheard"), session_options(1), ["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


def test_every_session_has_these_options() -> None:
    made = [
        (path.name, line)
        for folder in ("cosmos_export", "targets", "passes", "calibration", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\b(SessionOptions|InferenceSession)\(", line)
    ]
    assert all("InferenceSession" not in line or "options, [" in line for _, line in made), made
    assert [name for name, line in made if "SessionOptions(" in line] == ["sessions.py"]
