"""The GPUs of this machine, as the driver's own tool reports them. No CUDA, no torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FIELDS = (
    "index", "name", "compute_cap", "memory.total", "memory.free", "driver_version", "clocks.sm", "clocks.max.sm",
    "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "mig.mode.current",
)  # fmt: skip
_MIB = 1 << 20
_TIMEOUT_S = 20.0

Run = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Gpu:
    """One GPU. What the driver does not report is None."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int | None
    free_bytes: int | None
    driver: str
    sm_clock_mhz: float | None
    max_sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: float | None
    mig: bool


def gpus(run: Run | None = None) -> tuple[Gpu, ...]:
    """Every GPU that ``nvidia-smi`` lists; none where it is not installed or finds no driver."""
    try:
        text = (run or _smi)(["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"])
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(_parse(line) for line in text.splitlines() if line.count(",") == len(_FIELDS) - 1)


def _smi(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(command[0])
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S).stdout


def _parse(line: str) -> Gpu:
    cells = [cell.strip() for cell in line.split(",")]
    at = dict(zip(_FIELDS, cells, strict=True))

    def number(field: str) -> float | None:
        try:
            return float(at[field])
        except ValueError:  # [N/A], [Not Supported]
            return None

    def mebibytes(field: str) -> int | None:
        value = number(field)
        return None if value is None else int(value) * _MIB

    return Gpu(
        index=int(at["index"]),
        name=at["name"],
        compute_capability=at["compute_cap"],
        memory_bytes=mebibytes("memory.total"),
        free_bytes=mebibytes("memory.free"),
        driver=at["driver_version"],
        sm_clock_mhz=number("clocks.sm"),
        max_sm_clock_mhz=number("clocks.max.sm"),
        memory_clock_mhz=number("clocks.mem"),
        power_w=number("power.draw"),
        power_limit_w=number("power.limit"),
        temperature_c=number("temperature.gpu"),
        mig=at["mig.mode.current"] == "Enabled",
    )
