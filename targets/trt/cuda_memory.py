"""Memory of a CUDA device and copies to and from it, all in the order of one stream. cuda-python is the only driver."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from cosmos_export.diagnostics import ToolError, UnsupportedError
from cosmos_export.targets.sessions import Array

_ALL = 2**64 - 1
_ALIGNMENT = 256


class DeviceBuffer:
    """Bytes on a device, given back when nothing refers to them."""

    def __init__(self, device: Device, size_bytes: int) -> None:
        self.size_bytes = max(size_bytes, _ALIGNMENT)  # an engine takes no null address, also for an empty tensor
        self.address = device.allocate(self.size_bytes)
        self._finalizer = weakref.finalize(self, device.free, self.address)
        self._finalizer.atexit = False  # the driver takes everything back then, and may be gone before


class Device:
    """One CUDA device with one stream. ``cudart`` is ``cuda.bindings.runtime``."""

    def __init__(self, cudart: Any, index: int) -> None:
        self._cudart = cudart
        self.index = index
        self.check("cudaSetDevice", index)
        self.stream = int(self.check("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking))
        # What is freed stays with the process: a later request allocates nothing from the driver.
        pool = self.check("cudaDeviceGetDefaultMemPool", index)
        keep = cudart.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self.check("cudaMemPoolSetAttribute", pool, keep, _threshold())

    def check(self, function: str, *arguments: Any) -> Any:
        """Call ``function`` of the runtime API; ToolError CX506 with the driver's words where it fails."""
        status, *results = getattr(self._cudart, function)(*arguments)
        if status != self._cudart.cudaError_t.cudaSuccess:
            said = _said(self._cudart, status)
            raise ToolError("CX506", f"{function} on CUDA device {self.index}: {said}", _hint(status))
        return results[0] if results else None

    def allocate(self, size_bytes: int) -> int:
        return int(self.check("cudaMallocAsync", size_bytes, self.stream))

    def free(self, address: int) -> None:
        self.check("cudaFreeAsync", address, self.stream)

    def upload(self, address: int, array: Array) -> None:
        """Contiguous ``array`` to ``address``; it may be changed when this returns, since its pages are not locked."""
        if array.nbytes:
            self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: Array, address: int) -> None:
        """``array.nbytes`` from ``address`` into contiguous ``array``; waits for all that was asked of the device."""
        if array.nbytes:
            self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")
        self.synchronize()

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        if size_bytes:
            self._copy(target, source, size_bytes, "cudaMemcpyDeviceToDevice")

    def _copy(self, target: int, source: int, size_bytes: int, kind: str) -> None:
        direction = getattr(self._cudart.cudaMemcpyKind, kind)
        self.check("cudaMemcpyAsync", target, source, size_bytes, direction, self.stream)

    def synchronize(self) -> None:
        self.check("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        self.synchronize()
        self.check("cudaStreamDestroy", self.stream)


class DeviceValue:
    """A tensor on a device."""

    def __init__(self, device: Device, memory: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._device = device
        self.memory = memory
        self._shape = shape
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def numpy(self) -> Array:
        array = np.empty(self._shape, self.dtype)
        self._device.download(array, self.memory.address)
        return array


def open_device(index: int, capability: str | None) -> Device:
    """Device ``index``, which must have compute capability ``capability``.

    UnsupportedError CX503: cuda-python is not installed; CX505: no driver, no such device, or another kind of device.
    """
    try:
        from cuda.bindings import runtime as cudart
    except ImportError as error:
        raise UnsupportedError(
            "CX503", f"cuda-python is not installed: {error}", 'pip install ".[rtx]" in the checkout'
        ) from error
    return connect(cudart, index, capability)


def connect(cudart: Any, index: int, capability: str | None) -> Device:
    """`open_device` on a given runtime API."""
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or index >= count:
        found = _said(cudart, status) if status != cudart.cudaError_t.cudaSuccess else f"there are {count}"
        raise UnsupportedError(
            "CX505", f"no CUDA device {index}: {found}", "`--backend onnxruntime` runs the bundle's models on a CPU"
        )
    attributes = cudart.cudaDeviceAttr
    parts = (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
    found = ".".join(str(cudart.cudaDeviceGetAttribute(part, index)[1]) for part in parts)
    if capability is not None and found != capability:
        raise UnsupportedError(
            "CX505",
            f"CUDA device {index} has compute capability {found}; this bundle's engines are for {capability}",
            "build for this device (`cosmos-export targets`), or run with --backend onnxruntime",
        )
    return Device(cudart, index)


def _threshold() -> Any:
    from cuda.bindings import driver

    return driver.cuuint64_t(_ALL)


def _said(cudart: Any, status: Any) -> str:
    text = cudart.cudaGetErrorString(status)[1]
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _hint(status: Any) -> str:
    return "fewer frames or a smaller size take less memory" if "MemoryAllocation" in str(status) else ""
