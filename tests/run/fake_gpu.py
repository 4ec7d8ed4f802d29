"""A GPU that is not there: device memory on the host, and engines that run the model they were built from.

Enough of `cuda.bindings.runtime` and `tensorrt_rtx` to run a bundle's sessions, and stricter than both: memory that was
freed or never given out, a copy over its end, an address or a shape that was not set, and scratch memory that is too
small are errors here. Fresh memory holds NaN.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cosmos_export.bundle import Manifest
from cosmos_export.targets.profiles import DimRange, Profile, input_shapes

SUCCESS, OUT_OF_MEMORY = (SimpleNamespace(name=name) for name in ("cudaSuccess", "cudaErrorMemoryAllocation"))
SCRATCH = 4096


class FakeCuda:
    """The runtime API of one device."""

    cudaStreamNonBlocking = 1
    cudaError_t = SimpleNamespace(cudaSuccess=SUCCESS)
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="h2d", cudaMemcpyDeviceToHost="d2h", cudaMemcpyDeviceToDevice="d2d"
    )
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold="threshold")
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)

    def __init__(self, capability: tuple[int, int] = (12, 0), memory_bytes: int = 1 << 30, devices: int = 1) -> None:
        self.capability, self.free_bytes, self.devices = capability, memory_bytes, devices
        self.blocks: dict[int, np.ndarray] = {}
        self.graveyard: list[np.ndarray] = []
        self.allocations = 0

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        return SUCCESS, self.devices

    def cudaDeviceGetAttribute(self, attribute: int, index: int) -> tuple[Any, int]:
        return SUCCESS, self.capability[attribute]

    def cudaGetErrorString(self, status: Any) -> tuple[Any, bytes]:
        return SUCCESS, b"out of memory"

    def cudaSetDevice(self, index: int) -> tuple[Any]:
        return (SUCCESS,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        return SUCCESS, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert stream == 7
        return (SUCCESS,)

    cudaStreamDestroy = cudaStreamSynchronize

    def cudaDeviceGetDefaultMemPool(self, index: int) -> tuple[Any, str]:
        return SUCCESS, "pool"

    def cudaMemPoolSetAttribute(self, pool: str, attribute: str, value: Any) -> tuple[Any]:
        return (SUCCESS,)

    def cudaMallocAsync(self, size: int, stream: int) -> tuple[Any, int]:
        assert size > 0
        if size > self.free_bytes:
            return OUT_OF_MEMORY, 0
        block = np.full(size, 0xFF, np.uint8)
        self.free_bytes -= size
        self.allocations += 1
        self.blocks[block.ctypes.data] = block
        return SUCCESS, block.ctypes.data

    def cudaFreeAsync(self, address: int, stream: int) -> tuple[Any]:
        block = self.blocks.pop(address)
        block[:] = 0xFF
        self.free_bytes += block.size
        self.graveyard.append(block)  # its address is not given out again: a stale pointer is found
        return (SUCCESS,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[Any]:
        for address, side in ((target, kind[2]), (source, kind[0])):
            if side == "d":
                self.view(address, size)
        ctypes.memmove(target, source, size)
        return (SUCCESS,)

    def view(self, address: int, size: int) -> np.ndarray:
        """The ``size`` bytes at ``address``, which must be the begin of memory that is given out."""
        assert address in self.blocks, "an address that is not of this device, or was freed"
        assert size <= self.blocks[address].size, "beyond the end of the memory"
        return self.blocks[address][:size]


TYPES = {"tensor(float)": ("FLOAT", np.float32), "tensor(int64)": ("INT64", np.int64),
         "tensor(float8e4m3fn)": ("FP8", np.uint8)}  # fmt: skip
"""What ONNX Runtime calls a type → what TensorRT calls it, and what numpy has for it."""


def _fp8(value: np.ndarray) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, 17)


class Engine:
    """The engine of one graph, with the profiles of its bundle."""

    def __init__(self, cuda: FakeCuda, model: Path, profiles: Sequence[Mapping[str, Any]]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # As the backend it is compared with: the order of sums may follow the number of threads.
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
        self.session = onnxruntime.InferenceSession(str(model), options, ["CPUExecutionProvider"])
        self.cuda, self.profiles = cuda, profiles
        self.types = {t.name: t.type for t in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.num_io_tensors = len(self.types)
        self.num_optimization_profiles = len(profiles)
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPES[self.types[name]][0])

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.inputs else "OUTPUT"

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile][name]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda s: None, cuda_graph_strategy=None)

    def create_execution_context(self, settings: Any) -> Context:
        self.contexts.append(Context(self, settings.cuda_graph_strategy))
        return self.contexts[-1]


class Context:
    """Runs its engine's model on what lies at the addresses."""

    def __init__(self, engine: Engine, strategy: Any) -> None:
        self.engine, self.strategy = engine, strategy
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.results: dict[str, np.ndarray] = {}
        self.memory = (0, 0)
        self.profile = 0
        self.runs: list[dict[str, int]] = []
        """The addresses of each run."""

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return len(low) == len(shape) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        self.results = self._computed()
        # What is static has its shape from the engine.
        return [name for name in self.engine.inputs if name not in self.shapes and not self._static(name)]

    def _static(self, name: str) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        return tuple(low) == tuple(high)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name) or tuple(self.engine.profiles[self.profile][name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.results[name].shape

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        self.engine.cuda.view(self.memory[0], SCRATCH)
        self.runs.append(dict(self.addresses))
        for name, value in self._computed().items():
            self.engine.cuda.view(self.addresses[name], value.nbytes)[:] = np.frombuffer(value.tobytes(), np.uint8)
        return True

    def _computed(self) -> dict[str, np.ndarray]:
        feed = {}
        for name in self.engine.inputs:
            kind = np.dtype(TYPES[self.engine.types[name]][1])
            shape = self._shape(name)
            size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            value = self.engine.cuda.view(self.addresses[name], size).view(kind).reshape(shape)
            feed[name] = _fp8(value) if kind == np.uint8 else value
        return dict(zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, feed), strict=True))


class Logger:
    Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal")


def fake_trt(cuda: FakeCuda, bundle: Path, manifest: Manifest) -> tuple[Any, dict[str, Engine]]:
    """The module, and the engines that it has loaded, by graph."""
    files = {file.sha256: file.path for file in manifest.files if file.role == "engine"}
    records = {record.path: record for record in manifest.engines}
    loaded: dict[str, Engine] = {}

    def deserialize(plan: Any) -> Engine | None:
        path = files.get(hashlib.sha256(plan).hexdigest())
        if path is None:
            return None
        record = records[path]
        dims = {t.name: [str(d).replace("negative_und_len", "und_len") if isinstance(d, str) else d for d in t.dims]
                for t in manifest.graphs[record.graph].inputs}  # fmt: skip
        dims |= {weight.name: list(weight.dims) for weight in record.weights}
        profiles = [_profile(manifest, name) for name in record.profiles]
        models = [bundle / f"onnx/{record.graph}{suffix}" for suffix in (".cpu.onnx", ".onnx")]
        model = next(path for path in models if path.is_file())  # of a narrow graph the form that runs here
        loaded[record.graph] = Engine(cuda, model, [input_shapes(profile, dims) for profile in profiles])
        return loaded[record.graph]

    module = SimpleNamespace(
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize),
        ILogger=Logger,
        TensorIOMode=SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="capture"),
    )
    return module, loaded


def _profile(manifest: Manifest, name: str) -> Profile:
    record = next(p for p in manifest.profiles if p.name == name)
    return Profile(name, {dim: DimRange(r.min, r.opt, r.max) for dim, r in record.dims.items()})
