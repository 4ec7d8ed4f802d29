"""The releases that this project is made for, as its own metadata names them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata

_PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[^;\s]+)\s*;\s*extra\s*==\s*[\"'](?P<extra>[\w-]+)[\"']")


@cache
def pins(extra: str) -> Mapping[str, str]:
    """Package → the one release that ``extra`` installs; empty where this project runs without being installed."""
    try:
        required = metadata.requires("cosmos-export") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (_PIN.fullmatch(text) for text in required)
    return {match["name"]: match["version"] for match in found if match is not None and match["extra"] == extra}


def other_releases(extra: str, installed: Mapping[str, str | None] | None = None) -> list[str]:
    """``torch 2.11.0 (2.13.0)``: what is ``installed``, by default here, of another release than ``extra`` names."""
    found = []
    for name, wanted in pins(extra).items():
        version = installed_release(name) if installed is None else installed.get(name)
        if version is not None and version.partition("+")[0] != wanted:
            found.append(f"{name} {version} ({wanted})")
    return found


def installed_release(name: str) -> str | None:
    """Installed release of the package ``name``; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


JETPACK = "jetpack"


def jetpack_release() -> str | None:
    """Release of JetPack on a Jetson, as its Debian package has it; None where that is not installed."""
    dpkg = shutil.which("dpkg-query")
    if dpkg is None:
        return None
    command = [dpkg, "--show", "--showformat=${Version}", "nvidia-jetpack"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.partition("-")[0].strip() or None if found.returncode == 0 else None


def is_older(release: str, least: str) -> bool:
    """Whether ``release`` comes before ``least``, by the numbers that they begin with."""
    return _numbers(release) < _numbers(least)


def _numbers(release: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", release)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:  # 11.4 is 11.4.0
        numbers.pop()
    return tuple(numbers)
