"""The releases that this project is made for, as its own metadata names them."""

from __future__ import annotations

import re
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
