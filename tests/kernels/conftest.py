"""Where kernels run in these tests: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the kernels need Triton (kernels extra)")

from interpreter_types import DEVICE, round_as_the_device_does


@pytest.fixture(autouse=True)
def device_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        round_as_the_device_does(monkeypatch)
