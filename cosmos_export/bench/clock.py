"""The one clock of all measurements, a call to its end on the device; and what the device does meanwhile."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def timed(
    function: Callable[[], Any], device: torch.device, runs: int, warm_up: int, watch: CardWatch | None = None
) -> list[float]:
    """Seconds of each of ``runs`` calls, each to its end on the device; the first call, which compiles, is no run.

    ``watch`` keeps what it reads during the runs alone.
    """
    import torch

    found = []
    for number in range(1 + warm_up + runs):
        if watch is not None:
            watch.keeps = number > warm_up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > warm_up:
            found.append(time.perf_counter() - start)
    if watch is not None:
        watch.keeps = False
    return found


@dataclass(frozen=True)
class CardSample:
    """A GPU at one moment; what it does not report is None."""

    sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None


Read = Callable[[], CardSample | None]
_PERIOD_S = 0.2


class CardWatch:
    """Reads a GPU's clocks, power and temperature again and again, beside what is measured.

    Through NVML where the package nvidia-ml-py is installed, else with the driver's own tool. ``index`` None: no GPU.
    """

    def __init__(self, index: int | None, read: Read | None = None, period_s: float = _PERIOD_S) -> None:
        self.source = ""
        self._read, self._period = read, period_s
        if read is None and index is not None:
            self._read, self.source = _reader(index)
        self._samples: list[CardSample] = []
        self.keeps = True
        """Whether what is read now is kept: while a GPU waits for the host it says nothing of the work."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> CardWatch:
        if self._read is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._read is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._read is not None
        while True:
            found = self._read()
            if found is not None and self.keeps:
                self._samples.append(found)
            if self._ended.wait(self._period):
                return

    def summary(self) -> dict[str, Any] | None:
        """Median, least and largest of each quantity; None where nothing was read."""
        if not self._samples:
            return None
        quantities = {}
        for one in fields(CardSample):
            values = [value for s in self._samples if (value := getattr(s, one.name)) is not None]
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
            quantities[one.name] = spread
        return {"source": self.source, "samples": len(self._samples), "period_s": self._period, **quantities}


def _reader(index: int) -> tuple[Read, str]:
    """The reader of GPU ``index`` of this process, and the name of its source."""
    import importlib

    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = _handle(nvml, index)
    except Exception:  # not installed, or no driver: NVML's own exceptions are not known without it
        return _by_tool(index), "nvidia-smi"

    def read() -> CardSample | None:
        def asked(function: Callable[..., Any], *arguments: Any) -> float | None:
            try:
                return float(function(handle, *arguments))
            except nvml.NVMLError:
                return None

        power = asked(nvml.nvmlDeviceGetPowerUsage)
        return CardSample(
            asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            power / 1e3 if power is not None else None,
            asked(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        )

    return read, "NVML"


def _handle(nvml: Any, index: int) -> Any:
    """The device that torch calls ``index``: its own numbering may leave cards out."""
    import torch

    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except (nvml.NVMLError, AttributeError, RuntimeError, AssertionError):
        return nvml.nvmlDeviceGetHandleByIndex(index)


def _by_tool(index: int) -> Read:
    from cosmos_export.machine.gpu import gpus

    def read() -> CardSample | None:
        found = next((gpu for gpu in gpus() if gpu.index == index), None)
        if found is None:
            return None
        return CardSample(found.sm_clock_mhz, found.memory_clock_mhz, found.power_w, found.temperature_c)

    return read
