"""Planned and found contents of engines, as checks of a manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from cosmos_export.bundle import EngineCheck
from cosmos_export.targets.trt.common import EngineReport
from cosmos_export.targets.trt.engine_inspector import EngineExpectation, EngineSummary, check_engine, narrow_share


@dataclass(frozen=True)
class WantedEngine:
    """Planned contents of an engine."""

    graph: str
    compute_capability: str
    profiles: int
    attention: int
    """Attentions of its graph; 0 where they are written out and the builder is to find them."""
    decomposable_attention: bool
    plugins: int = 0
    """Nodes of its model that are this project's kernels."""
    dtype: str = "bf16"
    """Type that it computes in, where ``gemm_types`` says no other."""
    fp8_attention: int = 0
    """Attentions with FP8 operands."""
    attention_scale: float = 1.0
    gemm_types: Mapping[str, str] = field(default_factory=dict)
    """Nodes of the model, as shell patterns → the type that they multiply in."""
    layer_weights: Mapping[str, int] = field(default_factory=dict)
    """Nodes that multiply by the weights of layers → elements of the weight."""
    in_loop: bool = False
    """It is the body of a loop, which a builder may unroll a few times."""


def capability_check(wanted: WantedEngine, found: EngineSummary) -> EngineCheck:
    """The engine is for the target's compute capability and no other."""
    capabilities = ", ".join(found.header.compute_capabilities) or "none"
    passed = capabilities == wanted.compute_capability
    return EngineCheck(wanted.graph, "compute capability", wanted.compute_capability, capabilities, passed)


def plan_check(wanted: WantedEngine, found: EngineSummary) -> EngineCheck:
    """The text of an engine's layers against what was planned for them. An engine without attention and layers is a few
    element-wise kernels, nothing that could fall back: only its compute capability is compared."""
    if not wanted.attention and not wanted.layer_weights:
        return capability_check(wanted, found)
    # No fused attention computes in fp32.
    fused, kind, types, weights = wanted.dtype != "fp32", wanted.dtype, wanted.gemm_types, wanted.layer_weights
    attends = "fp8" if wanted.fp8_attention == wanted.attention else kind
    expected = EngineExpectation(
        attention=_unrolled(wanted, found) if fused else 0,
        gemm_type=kind,
        compute_capability=wanted.compute_capability,
        profiles=wanted.profiles,
        # Where some layers attend in fp8 and some do not, their number is checked and not which is which.
        attention_type=None if not fused or 0 < wanted.fp8_attention < wanted.attention else attends,
        attention_scale=wanted.attention_scale,
        other_gemms=types,
        layer_weights=weights,
        narrow_share=sum(weights[name] for name in types) / sum(weights.values()) if types else 0.0,
    )
    number = wanted.attention
    text = f"{number} fused attention kernels, {wanted.fp8_attention} in fp8, nothing stored O(S²)"
    if not wanted.fp8_attention:
        text = f"{number} fused attention kernels, nothing stored O(S²)"
    if not fused:
        text = f"{number} attentions as matrix products over stored scores (no fused kernel computes in {kind})"
    products, said = f"every GEMM in {kind}", "as planned"
    if types:
        listed = ", ".join(f"{count} in {other}" for other, count in sorted(Counter(types.values()).items()))
        products = f"GEMMs of the layers: {listed}; every other in {kind}"
        share = min(narrow_share(g, weights) for g in found.graphs) if found.graphs else 0.0
        said = f"as planned: {share:.1%} of the layers' weights in 8 or 4 bit"
    problems = check_engine(found, expected)
    return EngineCheck(wanted.graph, "plan", f"{text}, {products}", "; ".join(problems) or said, not problems)


def _unrolled(wanted: WantedEngine, found: EngineSummary) -> int:
    """Attentions that the engine should have: those of its graph, or a multiple, as a builder unrolls a short loop."""
    if not wanted.in_loop or not wanted.attention:
        return wanted.attention
    counts = {len(graph.attention) for graph in found.graphs}
    return next((n for n in counts if len(counts) == 1 and n and n % wanted.attention == 0), wanted.attention)


def report_checks(wanted: WantedEngine, report: EngineReport) -> list[EngineCheck]:
    """Checks of an engine by its builder's own inspector."""
    fused = "nothing decomposed" if not wanted.decomposable_attention else "may be decomposed"
    found = f"{report.attention} attentions parsed, none of which the builder may decompose"
    layers = f"{report.layers} layers" + "".join(f", {n} × {kind}" for kind, n in report.layers_in.items())
    checks = [
        EngineCheck(
            wanted.graph, "attention", f"{wanted.attention} attentions, {fused}",
            found if not wanted.decomposable_attention else f"{report.attention} attentions parsed",
            report.attention >= wanted.attention or wanted.decomposable_attention,
        ),
        EngineCheck(wanted.graph, "layers", "an engine that loads", layers, bool(report.layers)),
    ]  # fmt: skip
    if wanted.plugins:
        text, parsed = f"{wanted.plugins} kernels of this bundle", f"{report.plugins} plugins parsed"
        checks.append(EngineCheck(wanted.graph, "plugins", text, parsed, report.plugins == wanted.plugins))
    return checks
