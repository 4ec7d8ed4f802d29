"""A builder ends with the process that started it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import os, sys, time
from cosmos_export.targets.trt.worker import die_with_parent
die_with_parent(int(sys.argv[1]) or os.getppid())
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}, "0"])
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a signal at the parent's death is Linux's")
def test_it_dies_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        for _ in range(100):
            if not alive(child):
                return
            time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it went on without its parent")


def alive(pid: int) -> bool:
    """Running; one that is over and that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_does_not_start_when_its_parent_is_gone_already() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(gone.pid)], capture_output=True, env=environment(), cwd=ROOT, timeout=60
    )
    assert (result.returncode, result.stdout) == (1, b"")
