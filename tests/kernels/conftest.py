"""Kernels run on the GPU if there is one, else in Triton's interpreter with the device's rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="the kernels need Triton (kernels extra)")

from kernel_device import DEVICE

from cosmos_export.kernels.interpret import device_rounding


@pytest.fixture(autouse=True)
def rounding() -> Iterator[None]:
    if DEVICE != "cpu":
        yield
        return
    with device_rounding():
        yield
