"""The system: its kind, its processors, its disks, and the Python that runs."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path


def cores() -> int:
    """Processors of the machine; 1 where the system does not tell."""
    return os.cpu_count() or 1


def free_disk(folder: Path) -> int:
    """Bytes that are free on the disk of ``folder``, which exists. OSError where the system does not tell."""
    return shutil.disk_usage(folder).free


def system() -> str:
    """The kind of system and of processor, such as ``Linux x86_64``."""
    return f"{platform.system()} {platform.machine()}"


def processor() -> str:
    """The kind of processor, such as ``x86_64``."""
    return platform.machine()


def python_version() -> str:
    """Version of the Python that runs, such as ``3.11.9``."""
    return platform.python_version()
