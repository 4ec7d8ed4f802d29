"""Tools of other projects in environments of their own, where their packages do not suit those of this project."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest


def environment(name: str, *packages: str) -> Path:
    """The folder ``bin`` of an environment with ``packages``, which stays beside this one's; made where it is not
    there. Skips the test where it cannot be made."""
    folder = Path(sys.prefix) / name
    marker = folder / f".{packages[0]}"
    if not marker.exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"{packages[0]} cannot be installed here: {made.stderr.strip()[-200:]}")
        marker.touch()
    return folder / "bin"
