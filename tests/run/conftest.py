"""Checkpoints and bundles of the request tests, made once a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "compiler"), str(TESTS / "bundle")]

from subjects import Subjects  # noqa: E402


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all workers of this run; the build tests have the same."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "build"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subjects]:
    """For tests of the xdist group ``run-parity``: another worker would build the bundles again."""
    import build_harness as harness

    import cosmos_export.compiler.components as components
    import cosmos_export.compiler.stages as stages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "capture", harness.remembered_capture)
        patch.setattr(components, "capture_codec", harness.remembered_codec)
        yield Subjects(tmp_path_factory.mktemp("subjects"))
