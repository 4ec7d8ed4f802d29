"""Engines of a bundle in TensorRT-RTX or TensorRT, on the GPU they were built for.

All engines of a bundle share one stream and one piece of scratch memory, which is as large as the largest needs. What
an engine returns stays on the device; a loop, whose calls repeat, is captured into a CUDA graph by the runtime, so its
inputs and outputs stay at their addresses.
"""

from __future__ import annotations

import importlib
import mmap
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np

from cosmos_export.bundle import BundleFiles, EngineRecord
from cosmos_export.diagnostics import ToolError, UnsupportedError
from cosmos_export.targets.sessions import Array, Value
from cosmos_export.targets.trt.common import TrtFlavor
from cosmos_export.targets.trt.cuda_memory import Device, DeviceBuffer, DeviceValue, open_device

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
}


class Scratch:
    """Memory for the activations of whichever engine runs: they run one after another."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: DeviceBuffer | None = None

    def at_least(self, size_bytes: int) -> DeviceBuffer:
        if self._memory is None or self._memory.size_bytes < size_bytes:
            self._memory = None  # given back first: both may not fit
            self._memory = DeviceBuffer(self._device, size_bytes)
        return self._memory


class Weights:
    """Weights that engines take as inputs: on the device once, whoever reads them, and for as long as someone does."""

    def __init__(self, device: Device, files: BundleFiles) -> None:
        self._device, self._files = device, files
        self._known: WeakValueDictionary[tuple[str, int], DeviceBuffer] = WeakValueDictionary()

    def of(self, record: EngineRecord) -> dict[str, DeviceBuffer]:
        """Weights by the name of the input, read from the page cache one at a time."""
        found = {}
        for weight in record.weights:
            memory = self._known.get((weight.path, weight.offset))
            if memory is None:
                memory = DeviceBuffer(self._device, weight.size_bytes)
                with self._files.open(weight.path, "weights") as file:
                    data = np.memmap(file, np.uint8, "r", weight.offset, (weight.size_bytes,))
                    self._device.upload(memory.address, data)
                self._known[weight.path, weight.offset] = memory
            found[weight.name] = memory
        return found


class TrtSession:
    """An engine with one execution context, and ``weights`` where it takes some as inputs."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        graph: str,
        device: Device,
        scratch: Scratch,
        log: deque[str],
        *,
        captured: bool,
        weights: Mapping[str, DeviceBuffer],
    ) -> None:
        self._graph, self._device, self._scratch, self._log = graph, device, scratch, log
        self._engine = engine
        self._captured = captured
        self._weights = dict(weights)
        every = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        names = [name for name in every if name not in weights]
        types = {name: _DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._inputs = {name: types[name] for name in names if is_input[name]}
        self._output_types = {name: types[name] for name in names if not is_input[name]}
        self._profiles = [
            {name: engine.get_tensor_profile_shape(name, profile) for name in self._inputs}
            for profile in range(engine.num_optimization_profiles)
        ]
        self._profile = 0
        self._own: dict[str, DeviceBuffer] = {}
        settings = engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Full TensorRT leaves capture to its caller; its loop is one call of the engine either way.
        if captured and hasattr(trt, "CudaGraphStrategy"):
            settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._context = engine.create_execution_context(settings)
        if self._context is None:
            raise self._failed("has no execution context")
        for name, memory in self._weights.items():
            self._place(name, memory.address)

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self._output_types)

    def run(self, feeds: Mapping[str, Array | Value]) -> dict[str, Value]:
        shapes = {name: tuple(feeds[name].shape) for name in self._inputs}
        self._choose_profile(shapes)
        for name, dtype in self._inputs.items():
            self._require(self._context.set_input_shape(name, shapes[name]), f"does not take {name} {shapes[name]}")
            self._place(name, self._address(name, feeds[name], dtype))
        missing = self._context.infer_shapes()
        self._require(not missing, f"lacks {', '.join(missing or ())}")
        outputs = {name: self._output(name, dtype) for name, dtype in self._output_types.items()}
        for name, value in outputs.items():
            self._place(name, value.memory.address)
        needed = self._context.update_device_memory_size_for_shapes()
        memory = self._scratch.at_least(needed)
        self._context.set_device_memory(memory.address, memory.size_bytes)
        self._require(self._context.execute_async_v3(self._device.stream), "did not run")
        return {name: self._kept(value) for name, value in outputs.items()}

    def _choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        fitting = [i for i, profile in enumerate(self._profiles) if _fits(profile, shapes)]
        if not fitting:
            raise self._failed(f"has no profile for {', '.join(f'{n} {list(s)}' for n, s in shapes.items())}")
        if fitting[0] != self._profile:
            chosen = self._context.set_optimization_profile_async(fitting[0], self._device.stream)
            self._require(chosen, f"does not change to profile {fitting[0]}")
            self._profile = fitting[0]

    def _address(self, name: str, value: Array | Value, dtype: np.dtype[Any]) -> int:
        """Where the engine reads ``value``: a tensor of this device in place, an array from memory of this session."""
        if isinstance(value, DeviceValue):
            if value.dtype != dtype:
                raise self._failed(f"takes {name} as {dtype}, not {value.dtype}")
            return value.memory.address
        array = np.ascontiguousarray(value, dtype=dtype)
        memory = self._memory(name, array.nbytes)
        self._device.upload(memory.address, array)
        return memory.address

    def _output(self, name: str, dtype: np.dtype[Any]) -> DeviceValue:
        shape = tuple(self._context.get_tensor_shape(name))
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = self._memory(name, size) if self._captured else DeviceBuffer(self._device, size)
        return DeviceValue(self._device, memory, shape, dtype)

    def _kept(self, value: DeviceValue) -> DeviceValue:
        """``value`` where the next run does not write."""
        if not self._captured:
            return value
        size = int(np.prod(value.shape, dtype=np.int64)) * value.dtype.itemsize
        memory = DeviceBuffer(self._device, size)
        self._device.copy(memory.address, value.memory.address, size)
        return DeviceValue(self._device, memory, value.shape, value.dtype)

    def _memory(self, name: str, size_bytes: int) -> DeviceBuffer:
        if name not in self._own or self._own[name].size_bytes < size_bytes:
            self._own[name] = DeviceBuffer(self._device, size_bytes)
        return self._own[name]

    def _place(self, name: str, address: int) -> None:
        self._require(self._context.set_tensor_address(name, address), f"does not take an address for {name}")

    def _require(self, done: object, what: str) -> None:
        if not done:
            raise self._failed(what)

    def _failed(self, what: str) -> ToolError:
        said = " | ".join(self._log) or "it logged nothing"
        return ToolError("CX501", f"the engine of graph `{self._graph}` {what}: {said}", "")

    def close(self) -> None:
        self._device.synchronize()
        self._context = self._engine = None
        self._own.clear()
        self._weights.clear()


class TrtExecutor:
    """The engines of a bundle on one GPU."""

    def __init__(self, trt: Any, device: Device, files: BundleFiles, name: str, title: str) -> None:
        manifest = files.manifest
        self._name, self._title = name, title
        self._trt, self._device, self._files = trt, device, files
        self._engines: dict[str, EngineRecord] = {record.graph: record for record in manifest.engines}
        loop = manifest.loop
        self._captured = frozenset(segment.graph for segment in loop.segments) if loop else frozenset[str]()
        self._log: deque[str] = deque(maxlen=8)
        self._runtime = trt.Runtime(_logger(trt, self._log))
        self._scratch = Scratch(device)
        self._weights = Weights(device, files)

    @property
    def name(self) -> str:
        return self._name

    @property
    def device(self) -> str:
        return f"cuda:{self._device.index}"

    def open(self, graph: str) -> TrtSession:
        name = self._engines[graph].path
        self._log.clear()
        # Mapped: the runtime copies the weights to the device from the page cache, and nothing else holds them.
        with (
            self._files.open(name, "engine") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        ):
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            said = " | ".join(self._log) or "it logged nothing"
            raise ToolError(
                "CX502",
                f"{self._title} cannot load {self._files.path / name}: {said}",
                "is it installed in the version of the build?",
            )
        captured = graph in self._captured
        weights = self._weights.of(self._engines[graph])
        return TrtSession(
            self._trt, engine, graph, self._device, self._scratch, self._log, captured=captured, weights=weights
        )

    def close(self) -> None:
        self._device.close()


def open_engines(flavor: TrtFlavor, name: str, files: BundleFiles, device: str | None) -> TrtExecutor:
    """The engines of the bundle for the backend ``name``, on ``cuda[:N]``.

    UnsupportedError CX503: the runtime is not installed, or in another version than the engines are from; CX505: no
    such GPU, or no engines.
    """
    manifest = files.manifest
    if not manifest.engines:
        waits = any(file.path == "finish.sh" for file in manifest.files)
        hint = "run its finish.sh on the GPU" if waits else "`--backend onnxruntime` runs its models"
        raise UnsupportedError("CX505", "this bundle has no engines", hint)
    try:
        trt = importlib.import_module(flavor.module)
    except ImportError as error:
        raise UnsupportedError(
            "CX503", f"{flavor.title} is not installed: {error}", f'pip install ".[{flavor.extra}]" in the checkout'
        ) from error
    built = manifest.tools.get(flavor.module)
    if built is not None and built != trt.__version__:
        raise UnsupportedError(
            "CX503", f"{flavor.title} {trt.__version__} is installed; the engines are of {built}",
            f"pip install {flavor.distribution}=={built}, or build the bundle again",
        )  # fmt: skip
    _, _, index = (device or "cuda").partition(":")
    found = open_device(int(index or 0), manifest.target.compute_capability)
    return TrtExecutor(trt, found, files, name, flavor.title)


def _fits(profile: Mapping[str, Sequence[Sequence[int]]], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(
        len(low) == len(shape) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        for name, shape in shapes.items()
        for low, _, high in [profile[name]]
    )


def _logger(trt: Any, lines: deque[str]) -> Any:
    """A logger that keeps the last warnings and errors for a message."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                lines.append(message.strip())

    return Logger()
