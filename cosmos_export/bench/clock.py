"""The one clock of all measurements: a call to its end on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def timed(function: Callable[[], Any], device: torch.device, runs: int, warm_up: int) -> list[float]:
    """Seconds of each of ``runs`` calls, each to its end on the device; the first call, which compiles, is no run."""
    import torch

    found = []
    for number in range(1 + warm_up + runs):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > warm_up:
            found.append(time.perf_counter() - start)
    return found
