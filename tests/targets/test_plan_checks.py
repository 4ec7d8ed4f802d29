"""What is planned for an engine against what is in it, on contents written down here."""

from __future__ import annotations

import pytest

from cosmos_export.targets.trt.checks import WantedEngine, plan_check
from cosmos_export.targets.trt.engine_inspector import EngineSummary, FusedAttention, Gemm, PlanGraph, PlanHeader


def contents(attentions: int) -> EngineSummary:
    attention = tuple(FusedAttention(f"mha_{i}", "bf16", "fp32", 1.0) for i in range(attentions))
    gemm = Gemm("gemm", ("MatMul_0",), ("bf16", "bf16"), "bf16", scores=False)
    graph = PlanGraph(0, 3, attention, (gemm,), (), (), 0, 0, 0, stream_capturable=True)
    return EngineSummary(PlanHeader((1, 7, 1, 116), 64, ("12.0",)), (graph,))


def wanted(attentions: int) -> WantedEngine:
    return WantedEngine("denoise", "12.0", 1, attentions, False, layer_weights={"MatMul_0": 16}, in_loop=True)


@pytest.mark.parametrize(("planned", "found", "passed"), [(2, 4, True), (2, 3, False), (0, 0, True), (0, 2, False)])
def test_the_body_of_a_loop_may_be_unrolled(planned: int, found: int, passed: bool) -> None:
    """A multiple of the attentions of its graph is expected; of a body without any, there is none."""
    assert plan_check(wanted(planned), contents(found)).passed is passed
