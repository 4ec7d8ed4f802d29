"""The end-to-end check that runs on a GPU, here on the CPU with small widths; and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from cosmos_export.bench.geometry import tiny_geometry
from cosmos_export.bench.numerics import TINY_CASE, check_numerics, shallow
from cosmos_export.plan import published_subject

pytestmark = pytest.mark.xdist_group("bench")
CPU = torch.device("cpu")


def test_ours_beside_diffusers() -> None:
    rows = check_numerics(tiny_geometry(published_subject("nano").geometry), CPU, case=TINY_CASE, compiled=False)
    assert [row["recipe"] for row in rows] == ["bf16", "fp8-w8a16", "fp8"]
    assert all(row["right"] for row in rows), rows
    bf16, weight_only, w8a8 = (row["error"] for row in rows)
    assert 0 < bf16 < 0.05 and 0 < weight_only < 0.05 and weight_only < w8a8 < 0.2


def test_a_wrong_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import cosmos_export.targets.inductor.functions as inductor

    monkeypatch.setattr(inductor, "swiglu", lambda gate, up: torch.nn.functional.gelu(gate) * up)
    rows = check_numerics(tiny_geometry(published_subject("nano").geometry), CPU, case=TINY_CASE, compiled=False)
    assert not any(row["right"] for row in rows), rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_two_layers_of_true_width_on_the_gpu() -> None:
    geometry = published_subject("nano").geometry
    rows = check_numerics(shallow(geometry), torch.device("cuda"))
    assert all(row["right"] for row in rows), rows
