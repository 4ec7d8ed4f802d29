"""Releases that a target needs: older ones are refused where engines are built, and `doctor` says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cosmos_export import doctor
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.doctor import CheckState, Facts, examine
from cosmos_export.machine import packages
from cosmos_export.machine.packages import is_older, jetpack_release
from cosmos_export.targets import load_target, target_names
from cosmos_export.targets.trt import tensorrt

THOR = load_target("jetson-thor")


@pytest.mark.parametrize(
    ("release", "least", "older"),
    [
        ("11.4.0.106", "11.4.1", True), ("11.4.1", "11.4.1", False), ("11.4.1.2", "11.4.1", False),
        ("11.10.0", "11.4.1", False), ("10.13.3.9", "11.4.1", True), ("11.4", "11.4.0", False), ("12", "11.4.1", False),
        ("7.2.2", "7.2.2", False), ("7.1", "7.2.2", True), ("7.2.1+b9", "7.2.2", True), ("unknown", "1.0", True),
    ],
)  # fmt: skip
def test_order_of_releases(release: str, least: str, older: bool) -> None:
    assert is_older(release, least) is older


def test_thor() -> None:
    assert THOR.least == {"tensorrt-cu13": "11.4.1", "jetpack": "7.2.2"}
    assert "nvfp4" in THOR.refused and "nvfp4" not in THOR.schemes
    assert not any(load_target(name).least for name in target_names() if name != "jetson-thor")


@pytest.mark.parametrize(
    ("installed", "jetpack", "said"),
    [
        ("11.4.0.106", None, "need tensorrt-cu13 11.4.1 or later; this machine has 11.4.0.106"),
        ("11.5.0", "7.1", "need jetpack 7.2.2 or later; this machine has 7.1"),
        ("11.4.1", "7.2.2", None),
        (None, None, None),  # no builder is refused elsewhere
    ],
)
def test_where_engines_are_built(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, jetpack: str | None, said: str | None
) -> None:
    monkeypatch.setattr(tensorrt, "installed_release", lambda name: installed)
    monkeypatch.setattr(tensorrt, "jetpack_release", lambda: jetpack)
    monkeypatch.setattr(tensorrt, "gpus", lambda: (_Thor(),))
    if said is None:
        tensorrt.require_gpu(THOR)
        return
    with pytest.raises(UnsupportedError, match=said) as caught:
        tensorrt.require_gpu(THOR)
    assert caught.value.code == "CX406" and "install" in caught.value.hint


class _Thor:
    compute_capability = "11.0"
    name = "NVIDIA Thor"


def found(versions: dict[str, str | None]) -> list[Any]:
    facts = Facts("3.12", "Linux aarch64", (), versions, 64 << 30, 400 << 30, dict(os.environ), None)
    return [one for one in examine(facts, THOR) if "it needs" in one.found]


def test_doctor() -> None:
    (old,) = found({"tensorrt-cu13": "11.3.0"})
    assert old.state is CheckState.BLOCKER and old.found == "tensorrt-cu13 11.3.0; it needs 11.4.1 or later"
    assert "tensorrt-cu13>=11.4.1" in old.hint
    assert [one.found for one in found({"tensorrt-cu13": "11.4.1", "jetpack": "7.0"})] == [
        "jetpack 7.0; it needs 7.2.2 or later"
    ]
    assert not found({"tensorrt-cu13": "11.4.1", "jetpack": "7.2.2"}) and not found({})
    assert packages.JETPACK in doctor._versions()


def test_jetpack_as_debian_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "dpkg-query"
    tool.write_text("#!/bin/sh\nprintf 7.2.2-b17\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jetpack_release() == "7.2.2"
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert jetpack_release() is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert jetpack_release() is None
