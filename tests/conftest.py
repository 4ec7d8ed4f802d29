"""For every test: interrupts work, also where a shell started the run in the background; failures are readable."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Processes the tests start inherit what is ignored, and not what is handled.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The exporter traces every operation at DEBUG; a failing capture would print thousands of lines.
logging.getLogger("torch.__trace").propagate = False

# A build of a test builds: it takes no engine from another bundle unless the test is about that. Captured graphs are
# shared by all tests, and kept between runs (`pytest --cache-clear` removes them): their key has the code in it.
os.environ["COSMOS_EXPORT_CACHE"] = "off"
_GRAPHS_DAYS = 7


def pytest_configure(config: pytest.Config) -> None:
    cache = getattr(config, "cache", None)  # none with `-p no:cacheprovider`
    folder = cache.mkdir("graphs") if cache is not None else None
    os.environ["COSMOS_EXPORT_GRAPHS"] = str(folder or "off")
    if folder is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        for path in folder.iterdir():  # those of code that has changed since are not found again
            if path.stat().st_mtime < time.time() - _GRAPHS_DAYS * 86_400:
                path.unlink()


# What a test needs, and so about how long it takes. A new folder is given its tier here.
_TIERS = {
    **dict.fromkeys(["tests", "bundle", "checkpoint", "machine", "plan", "sampling"], 0),
    **dict.fromkeys(["components", "ir", "kernels", "microworld", "precision", "targets"], 1),
    **dict.fromkeys(["bench", "calibration", "cli", "compiler", "fuzz", "run", "serve"], 2),
}
_SLOW_TIER = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its tier: that of its folder, or the last one where it is slow."""
    for item in items:
        folder = Path(str(item.path)).parent.name
        tier = _SLOW_TIER if item.get_closest_marker("slow") else _TIERS[folder]
        item.add_marker(f"tier{tier}")


# Without a GPU kernels run in Triton's interpreter. It is chosen when a kernel is defined, so before any import.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
