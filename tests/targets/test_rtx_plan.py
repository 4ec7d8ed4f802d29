"""What the builder makes of the graphs the compiler lowers to, read from the plan inside the engine.

Nothing runs on a GPU here: these tests pin which kernels a plan contains, not what they compute.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from target_graphs import (
    FP16,
    FP32,
    HEAD_DIM,
    HIDDEN,
    LINEAR_WIDTH,
    concat_tokens,
    generator,
    generator_profile,
    linear,
    patchify,
    span,
)

from cosmos_export.diagnostics import UserError
from cosmos_export.targets import load_target
from cosmos_export.targets.trt.engine_inspector import (
    EngineExpectation,
    PlanGraph,
    check_engine,
    inspect_engine,
    read_header,
)
from cosmos_export.targets.trt.tensorrt_rtx import build_engine

pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")

BF16_LAYER = EngineExpectation(
    attention=1,
    gemm_type="bf16",
    attention_type="bf16",
    attention_scale=HEAD_DIM**-0.5,
    compute_capability="12.0",
    stream_capturable=True,
)

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def run(model: onnx.ModelProto, *profiles: Any, target: str = "rtx-pro-6000", **options: Any) -> Path:
        onnx.save_model(model, tmp_path / "graph.onnx")
        engine = tmp_path / "graph.engine"
        build_engine(tmp_path / "graph.onnx", engine, target=load_target(target), profiles=profiles, **options)
        return engine

    return run


def only_graph(engine: Path) -> PlanGraph:
    (graph,) = inspect_engine(engine).graphs
    return graph


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_one_fused_attention_a_layer(build: Build, layers: int) -> None:
    summary = inspect_engine(build(generator(layers), generator_profile(layers)))
    assert check_engine(summary, replace(BF16_LAYER, attention=layers)) == []
    # q+k+v, o, gate+up, down: parallel linears are one product.
    assert summary.graphs[0].gemm_types() == {"bf16": 4 * layers}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"causal": True}])
def test_attention_forms_fuse(build: Build, flat: bool, options: dict[str, bool]) -> None:
    shapes = {key: value for key, value in options.items() if key == "rotary"}
    summary = inspect_engine(build(generator(flat=flat, **options), generator_profile(flat=flat, **shapes)))
    assert check_engine(summary, BF16_LAYER) == []


@pytest.mark.parametrize("target", ["dgx-spark", "l40s"])
def test_other_capabilities_fuse(build: Build, target: str) -> None:
    summary = inspect_engine(build(generator(), generator_profile(), target=target))
    assert check_engine(summary, replace(BF16_LAYER, compute_capability=load_target(target).compute_capability)) == []
    assert "expected 12.0 alone" in check_engine(summary, BF16_LAYER)[0]


@pytest.mark.parametrize(("flat", "literal"), [(True, 1.0), (False, 0.1767578125)])
def test_one_sided_scale_is_exact(build: Build, flat: bool, literal: float) -> None:
    """Flat heads: the product joins the norm of q. Heads second: the kernel holds the BF16 literal, 0.01 % off."""
    graph = only_graph(build(generator(flat=flat), generator_profile(flat=flat)))
    assert [attention.scale for attention in graph.attention] == [literal]


def test_default_scale_is_wrong_and_found(build: Build) -> None:
    """The builder splits the scale into two BF16 square roots: every logit is a quarter of a percent too small."""
    summary = inspect_engine(build(generator(one_sided_scale=False), generator_profile()))
    assert check_engine(summary, BF16_LAYER) == [
        "profile 0: attention 0 scales logits by 0.176334, exact 0.176777: -0.25%"
    ]


def test_fp16_accumulates_in_fp16_and_is_found(build: Build) -> None:
    summary = inspect_engine(build(generator(dtype=FP16), generator_profile()))
    problems = check_engine(summary, replace(BF16_LAYER, gemm_type="fp16", attention_type="fp16"))
    assert problems == ["profile 0: attention 0 accumulates in fp16, planned fp32"]


@pytest.mark.parametrize("tokens", [(1, 64, 1024), (64, 64, 64)])
@pytest.mark.parametrize("flat", [True, False])
def test_fp32_attention_decomposes_only_when_allowed(build: Build, tokens: tuple[int, int, int], flat: bool) -> None:
    und = (tokens[0], tokens[1], tokens[2])
    profile = generator_profile(flat=flat, tokens=tokens, und=und)
    summary = inspect_engine(build(generator(dtype=FP32, flat=flat), profile, decomposable_attention=True))
    problems = " ".join(check_engine(summary, replace(BF16_LAYER, gemm_type="fp32", attention_type=None)))
    assert "0 fused attention kernels, expected 1" in problems and "softmax outside fused attention" in problems
    assert ("stored scores" in problems) == (tokens[0] < tokens[2])
    assert check_engine(summary, EngineExpectation(attention=0, gemm_type="fp32")) == []


def test_decomposable_attention_still_fuses_where_it_can(build: Build) -> None:
    summary = inspect_engine(build(generator(), generator_profile(), decomposable_attention=True))
    assert check_engine(summary, BF16_LAYER) == []


@pytest.mark.parametrize("und", [(0, 32, 512), (0, 0, 512), (0, 0, 0)])
@pytest.mark.parametrize("flat", [True, False])
def test_empty_prompt_is_accepted(build: Build, flat: bool, und: tuple[int, int, int]) -> None:
    summary = inspect_engine(build(generator(flat=flat), generator_profile(flat=flat, und=und)))
    assert check_engine(summary, BF16_LAYER) == []


@pytest.mark.parametrize("extra", [(0, 8, 16), (0, 0, 0)])
def test_empty_token_sequence_is_accepted(build: Build, extra: tuple[int, int, int]) -> None:
    shapes = {"a": span(lambda n: (1, n, HIDDEN), (1, 64, 1024)), "b": span(lambda n: (1, n, HIDDEN), extra)}
    graph = only_graph(build(concat_tokens(), shapes))
    assert graph.gemm_types() == {"bf16": 1}


def test_shape_arithmetic(build: Build) -> None:
    """Shape, Gather, Div, Pad, Reshape, Range and Slice with computed sizes, for odd heights too."""
    shapes = {"latents": ((1, 48, 1, 2, 2), (1, 48, 5, 33, 40), (1, 48, 48, 45, 80))}
    summary = inspect_engine(build(patchify(), shapes))
    expect = EngineExpectation(attention=0, gemm_type="bf16", stream_capturable=True)
    assert check_engine(summary, expect) == []
    assert summary.graphs[0].kernels == 5 and not any(gemm.scores for gemm in summary.graphs[0].gemms)


LINEAR_SHAPES = {"x": span(lambda n: (1, n, LINEAR_WIDTH), (1, 64, 1024))}


@pytest.mark.parametrize(
    ("scheme", "external", "expected"),
    [
        ("bf16", False, "bf16"),
        ("bf16", True, "bf16"),
        ("fp8", False, "fp8"),
        ("fp8", True, "fp8"),
        ("fp8-w8a16", False, "fp8-weight"),
        ("int4", False, "int4-weight"),
    ],
)
def test_gemm_types(build: Build, scheme: str, external: bool, expected: str) -> None:
    summary = inspect_engine(build(linear(scheme, external=external), LINEAR_SHAPES))
    assert summary.graphs[0].gemm_types() == {expected: 1}
    assert check_engine(summary, EngineExpectation(attention=0, gemm_type=expected)) == []
    problems = check_engine(summary, EngineExpectation(attention=0, gemm_type="nvfp4"))
    assert len(problems) == 1 and f"1 of 1 GEMMs compute in {expected}, planned nvfp4" in problems[0]
    assert (
        check_engine(summary, EngineExpectation(attention=0, gemm_type="nvfp4", other_gemms={"MatMul*": expected}))
        == []
    )


def test_dequantized_weights_are_found(build: Build) -> None:
    """Parallel weight-only FP8 linears: the builder widens and joins all the weights first, on every call."""
    summary = inspect_engine(build(linear("fp8-w8a16", copies=3), LINEAR_SHAPES))
    problems = check_engine(summary, EngineExpectation(attention=0, gemm_type="bf16"))
    assert len(problems) == 1 and "whole weights are dequantized on every call" in problems[0]
    assert check_engine(summary, EngineExpectation(attention=0, gemm_type="bf16", weight_dequantize=True)) == []


def test_int4_of_a_single_group_is_dequantized(build: Build) -> None:
    """Where one group spans all inputs, the scales are one row, and the builder fuses the dequantization no more."""
    shapes = {"x": span(lambda n: (1, n, 128), (1, 64, 1024))}
    graph = only_graph(build(linear("int4", width=128), shapes))
    assert graph.gemm_types() == {"bf16": 1} and len(graph.dequantize) == 1


def test_two_profiles(build: Build) -> None:
    engine = build(generator(), generator_profile(), generator_profile(tokens=(1, 2048, 4096)))
    summary = inspect_engine(engine)
    assert [graph.profile for graph in summary.graphs] == [0, 1]
    assert check_engine(summary, replace(BF16_LAYER, profiles=2)) == []
    assert check_engine(summary, BF16_LAYER) == ["contains profiles [0, 1], expected 1"]
    small, large = (graph.activation_bytes for graph in summary.graphs)
    assert small < large
    ceiling = replace(BF16_LAYER, profiles=2, max_activation_bytes=small)
    assert check_engine(summary, ceiling) == [
        f"profile 1: activations take {large} bytes at the largest shapes, planned at most {small}"
    ]


def test_another_version_is_not_guessed(build: Build) -> None:
    engine = build(linear("bf16"), LINEAR_SHAPES)
    data = bytearray(engine.read_bytes())
    data[25] += 1
    engine.write_bytes(data)
    summary = inspect_engine(engine)
    assert summary.graphs == () and summary.header.compute_capabilities == ()
    assert summary.not_inspected == "engines of version 1.8.1.116 are not decoded (known: 1.7.1.116)"
    assert check_engine(summary, EngineExpectation(attention=0, gemm_type="bf16")) == [
        f"plan not inspected: {summary.not_inspected}"
    ]


def test_files_that_are_no_engine(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "other.engine"
    for data in (b"", b"vtrt", b"x" * 4096):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a TensorRT-RTX engine"):
            read_header(path)
    engine = build(linear("bf16"), LINEAR_SHAPES)
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(UserError, match="its header says") as caught:
        inspect_engine(engine)
    assert caught.value.code == "CX430"


def test_an_engine_without_text_is_not_passed(tmp_path: Path) -> None:
    path = tmp_path / "bare.engine"
    header = b"vtrt".ljust(16, b"\0") + struct.pack("<Q", 256) + bytes((1, 7, 1, 116)) + b"\0" * 4 + b"\x10"
    path.write_bytes(header.ljust(256, b"\0"))
    summary = inspect_engine(path)
    assert summary.not_inspected == "the engine carries no plan text"
    assert check_engine(summary, EngineExpectation(attention=0, gemm_type="bf16"))
