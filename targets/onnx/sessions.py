"""Graphs of a bundle in ONNX Runtime, on the CPU or a CUDA device: the backend that every bundle has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cosmos_export.bundle import BundleFiles, Manifest
from cosmos_export.diagnostics import ToolError, UnsupportedError
from cosmos_export.targets.sessions import Array, Value

NAME = "onnxruntime"
_FATAL = 4
"""Severity of what ONNX Runtime logs."""
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_FP8, _FP8_NAME, _FP8_ONNX = np.dtype(ml_dtypes.float8_e4m3fn), "tensor(float8e4m3fn)", 17
"""The last is its number in ONNX (``TensorProto.FLOAT8E4M3FN``)."""
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    _FP8_NAME: _FP8,
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
}
_SUFFIXES = (".cpu.onnx", ".onnx")
"""Endings of a graph's models in order of preference. fp32 is first: no CPU kernel takes bf16, and few CUDA ones do."""


class OnnxValue:
    """An `OrtValue`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    def numpy(self) -> Array:
        array: Array = self.value.numpy()
        # ONNX Runtime gives a type that numpy lacks as bytes.
        return array.view(_FP8) if self.value.data_type() == _FP8_NAME else array


class OnnxSession:
    """A model and the device it runs on."""

    def __init__(self, graph: str, session: Any, device: tuple[str, int]) -> None:
        self._graph = graph
        self._session = session
        self._device = device
        self._inputs = {i.name: _DTYPES[i.type] for i in session.get_inputs()}
        self._outputs = tuple(o.name for o in session.get_outputs())

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Array | Value]) -> dict[str, Value]:
        binding = self._session.io_binding()
        bound = {name: self._bound(feeds[name], dtype) for name, dtype in self._inputs.items()}
        for name, value in bound.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, *self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # pybind translates errors of the C++ side into classes that it does not name
            sizes = ", ".join(f"{name} {list(value.shape())}" for name, value in bound.items() if not _of_a_layer(name))
            raise ToolError(
                "CX501", f"ONNX Runtime failed in graph `{self._graph}` ({sizes}): {_first_line(error)}",
                "if memory ran out: fewer frames or a smaller size",
            ) from error  # fmt: skip
        return {name: OnnxValue(v) for name, v in zip(self._outputs, binding.get_outputs(), strict=True)}

    def _bound(self, value: Array | Value, dtype: np.dtype[Any]) -> Any:
        import onnxruntime

        if isinstance(value, OnnxValue):
            return value.value
        array = np.ascontiguousarray(value, dtype=dtype)
        if np.shares_memory(array, value):  # the caller may change it; what is bound must not
            array = array.copy()
        if dtype == _FP8:
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _FP8_ONNX)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._device)

    def close(self) -> None:
        self._session = None


@dataclass(frozen=True)
class OnnxExecutor:
    """The models of a bundle on one device."""

    files: BundleFiles
    models: Mapping[str, str]
    """Graph → path of its model in the bundle."""
    device_type: str = "cpu"
    index: int = 0

    @property
    def name(self) -> str:
        return NAME

    @property
    def device(self) -> str:
        return self.device_type if self.device_type == "cpu" else f"{self.device_type}:{self.index}"

    def open(self, graph: str) -> OnnxSession:
        import onnxruntime

        # As OpenMP's own libraries do; unset, ONNX Runtime takes every core.
        options = session_options(int(os.environ.get("OMP_NUM_THREADS", "0") or 0))
        provider = _PROVIDERS[self.device_type]
        settings = {} if self.device_type == "cpu" else {"device_id": self.index}
        name = self.models[graph]
        path = self.files.location(name, "onnx")
        try:
            session = onnxruntime.InferenceSession(str(path), options, [(provider, settings)])
        except Exception as error:  # as in `run`
            raise ToolError(
                "CX502",
                f"ONNX Runtime cannot load {self.files.path / name}: {_first_line(error)}",
                "is there enough memory for it?",
            ) from error
        return OnnxSession(graph, session, (self.device_type, self.index))

    def close(self) -> None:
        """Nothing is held besides the sessions."""


def session_options(threads: int) -> Any:
    """Options of a session of ONNX Runtime on ``threads`` threads, 0 for all, that writes nothing to stderr.

    What it logs has names of the model's nodes in it, whatever those do to a terminal. Errors are exceptions too,
    and are printed as all text of files is.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    return options


def open_models(files: BundleFiles, device: str | None) -> OnnxExecutor:
    """ONNX Runtime for the bundle, on ``cpu`` (the default) or ``cuda[:N]``. UnsupportedError CX503: not installed."""
    kind, _, index = (device or "cpu").partition(":")
    require_provider(kind)
    return OnnxExecutor(files, models(files.manifest), kind, int(index or 0))


def models(manifest: Manifest) -> dict[str, str]:
    """Graph → path of the model that ONNX Runtime takes, for the graphs that have one."""
    listed = {file.path for file in manifest.files if file.role == "onnx"}
    found = {}
    for graph in manifest.graphs:
        paths = [path for suffix in _SUFFIXES if (path := f"onnx/{graph}{suffix}") in listed]
        if paths:
            found[graph] = paths[0]
    return found


def require_provider(kind: str) -> None:
    """CX503 where ONNX Runtime, or its form for this kind of device, is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            "CX503", f"ONNX Runtime is not installed or does not load: {error}", 'pip install ".[run]" in the checkout'
        ) from error
    if _PROVIDERS[kind] not in onnxruntime.get_available_providers():
        raise UnsupportedError(
            "CX503",
            f"this ONNX Runtime has no {_PROVIDERS[kind]}",
            'pip uninstall onnxruntime, then pip install ".[gpu]" in the checkout; or --device cpu',
        )


def _of_a_layer(name: str) -> bool:
    """Whether an input is one of many alike, which an error message need not list."""
    return name.rsplit("_", 1)[-1].isdigit()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
