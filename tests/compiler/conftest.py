"""Checkpoints and bundles that several tests read. Each is made once a run, whichever worker asks first."""

from __future__ import annotations

from pathlib import Path

import build_harness as harness
import pytest


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "build"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def omni(shared: Path) -> Path:
    return harness.checkpoint(shared, "omni", "bfloat16")


@pytest.fixture(scope="session")
def edge(shared: Path) -> Path:
    return harness.checkpoint(shared, "edge", "bfloat16")


@pytest.fixture(scope="session")
def omni_fp32(shared: Path) -> Path:
    return harness.checkpoint(shared, "omni", "float32")


@pytest.fixture(scope="session")
def omni_bundle(shared: Path, omni: Path) -> harness.Built:
    """As a user builds it: the command line, all defaults but the target and the other components."""
    return harness.command_line_build(shared, "omni.bundle", omni, *harness.TRANSFORMER_ONLY)


@pytest.fixture(scope="session")
def edge_bundle(shared: Path, edge: Path) -> harness.Built:
    return harness.command_line_build(shared, "edge.bundle", edge, *harness.TRANSFORMER_ONLY)


@pytest.fixture(scope="session")
def scales(shared: Path, omni: Path) -> Path:
    """Ranges of every activation of ``omni``."""
    return harness.scale_table(omni, shared / "omni-scales")


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in this process share one capture of each checkpoint; everything after it is done every time."""
    import cosmos_export.compiler.components as components
    import cosmos_export.compiler.stages as stages

    monkeypatch.setattr(stages, "capture", harness.remembered_capture)
    monkeypatch.setattr(components, "capture_codec", harness.remembered_codec)
