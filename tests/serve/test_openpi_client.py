"""openpi's own client, unmodified, from an environment of its own: it pins NumPy below 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from own_environment import environment

from cosmos_export.audit import verify_trail

HERE = Path(__file__).resolve().parent
PACKAGES = ("openpi-client==0.1.2", "typing_extensions")
"""The second is imported by the first, which does not say so."""


@pytest.fixture(scope="module")
def robot() -> str:
    """The Python of the environment."""
    return str(environment("openpi-client", *PACKAGES) / "python")


@contextmanager
def server(port: int, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, str(HERE / "fake_server.py"), "openpi", str(port), *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def client(robot: str, port: int, count: int) -> subprocess.Popen[str]:
    command = [robot, str(HERE / "openpi_robot.py"), str(port), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_openpi_s_own_client(robot: str, tmp_path: Path) -> None:
    """A hundred requests in a row, two robots at a time; a server that is killed, and one that follows it."""
    trail = str(tmp_path / "trail.jsonl")
    with server(0, trail) as (process, port):
        robots = [client(robot, port, count) for count in (100, 20)]
        outputs = [one.communicate(timeout=120) for one in robots]
        assert [one.returncode for one in robots] == [0, 0], outputs
        assert [out.count("right") for out, _ in outputs] == [100, 20]
        assert all(out.endswith("broker\n") for out, _ in outputs)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == "ended by 15\n"
    assert verify_trail(tmp_path / "trail.jsonl").events == {"golden": 1, "ready": 1, "request": 124, "ended": 1}
    with server(port, trail) as (process, again):
        assert again == port
        waiting = client(robot, port, 10_000)
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "right 0\n"
        process.kill()
        out, error = waiting.communicate(timeout=60)
        assert waiting.returncode != 0 and "ConnectionClosed" in error
    with server(port, trail):
        last = client(robot, port, 3)
        out, error = last.communicate(timeout=60)
        assert (last.returncode, out.count("right")) == (0, 3), error
    found = verify_trail(tmp_path / "trail.jsonl")
    assert found.events["golden"] == 3 and found.events["ended"] == 1
