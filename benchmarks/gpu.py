"""Functions that the GPU benchmarks share: timing with device events, ceilings measured on the card, and what machine
it was."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from cosmos_export.machine.gpu import gpus


def device_for(dry_run: bool) -> torch.device:
    """The GPU; the CPU in a dry run. SystemExit where there is no GPU and it is none."""
    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: run with --dry-run to exercise everything else")
    return torch.device("cuda")


def times_s(function: Callable[[], Any], device: torch.device, *, runs: int, warm_up: int = 3) -> list[float]:
    """Seconds of each of ``runs`` calls, after ``warm_up`` calls; by events on a GPU."""
    for _ in range(warm_up):
        function()
    if device.type != "cuda":
        found = []
        for _ in range(runs):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
        return found
    torch.cuda.synchronize()
    # Filled before each run: nothing of the last one is in the cache, and the host is ahead when the clock starts.
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start_event, end_event in events:
        flush.zero_()
        start_event.record()
        function()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) / 1e3 for start_event, end_event in events]


def median_s(function: Callable[[], Any], device: torch.device, *, runs: int, warm_up: int = 3) -> float:
    return statistics.median(times_s(function, device, runs=runs, warm_up=warm_up))


def ceilings(device: torch.device, dry_run: bool) -> dict[str, float]:
    """Bytes and operations per second that this card reaches in the plainest case: a large copy, large products."""
    size = 64 if dry_run else 8192
    runs = 1 if dry_run else 10
    found = {}
    found["copy_bytes_per_s"] = _copy_rate(1024 if dry_run else 1 << 30, device, runs)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    found["bf16_flops"] = 2 * size**3 / median_s(lambda: a @ b, device, runs=runs)
    narrow = [t.to(torch.float8_e4m3fn) for t in (a, b)]
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            narrow[0], narrow[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
            use_fast_accum=device.type == "cuda",
        )  # fmt: skip

    found["fp8_flops"] = 2 * size**3 / median_s(product, device, runs=runs)
    return found


def _copy_rate(elements: int, device: torch.device, runs: int) -> float:
    """Bytes per second of a copy; those read and those written count."""
    source = torch.empty(elements, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_s(lambda: target.copy_(source), device, runs=runs)


def machine() -> dict[str, Any]:
    """Cards with clocks and power as they are now, and versions."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "processor": platform.machine(), "gpus": [], "versions": {}}
    found["gpus"] = [dataclasses.asdict(gpu) for gpu in gpus()]
    for name in ("cosmos-export", "torch", "triton", "nvidia-cudnn-frontend", "diffusers"):
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found["versions"][name] = None
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found
