"""Gate G0: quantized graphs against the reference on the same codes. Chance passes, and planted faults do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import build_harness as harness
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

import cosmos_export.compiler.published as published
import cosmos_export.compiler.stages as stages
from cosmos_export.compiler.driver import build
from cosmos_export.compiler.evidence import BuildResult
from cosmos_export.compiler.forms import make_forms
from cosmos_export.compiler.precision import pass_options
from cosmos_export.evaluation.cases import CASES
from cosmos_export.evaluation.followed import DIVISION
from cosmos_export.evaluation.parity import RUNTIME_LIMIT, Measured, Parity
from cosmos_export.ir.interpreter import read_weights
from cosmos_export.ir.program import Program
from cosmos_export.targets.onnx.weights import read_source

pytestmark = pytest.mark.xdist_group("codes")
WEIGHTS = "diffusion_pytorch_model.safetensors"
CASE = CASES[6:7]
"""Inverse dynamics: of all, the one whose codes differ on this checkpoint."""


@pytest.fixture(scope="module")
def large_branches(shared: Path, omni: Path) -> Path:
    """A checkpoint of random weights whose branches are as large as the stream, as those of a trained model are."""
    path = shared / "omni-large-branches"

    def make() -> None:
        harness.copy_checkpoint(omni, path)
        generator, file = torch.Generator().manual_seed(3), path / "transformer" / WEIGHTS
        tensors = {}
        for name, value in load_file(file).items():
            drawn = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                drawn = (1.0 if "norm" in name else 0.0) + 0.1 * drawn
            else:
                drawn = drawn / value.shape[-1] ** 0.5
            tensors[name] = drawn.to(value.dtype)
        save_file(tensors, file, metadata={"format": "pt"})

    return harness.once(path, make)


@dataclass(frozen=True)
class Compared:
    """A quantized build, and what compares its models with its program."""

    result: BuildResult
    folder: Path
    program: Program
    body: str
    parity: Parity

    def g0(self, folder: Path) -> Measured:
        return self.parity.quantized(self.program, folder, ".cpu.onnx", body=self.body)


def compared(checkpoint: Path, output: Path, **options: Any) -> Compared:
    patch = pytest.MonkeyPatch()
    patch.setattr(published, "Parity", partial(Parity, cases=CASE))
    patch.setattr(stages, "capture", harness.remembered_capture)
    try:
        request = harness.transformer_only(checkpoint, output, quality="report", steps=8, **options)
        result = build(request)
    finally:
        patch.undo()
    plan, plain = result.job, result.program
    assert plain is not None
    made = make_forms(plain, pass_options(plan), plan.precision.step_keys())
    (name, program), *_ = [*made.variants.items(), (plain.loop.body, made.program)]
    weights = read_weights(read_source)
    parity = Parity(plan.checkpoint, plan.modalities, plan.outputs, weights, cases=CASE)
    return Compared(result, output / "onnx", program, name, parity)


@pytest.fixture(scope="module")
def fp8(shared: Path, large_branches: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    scales = harness.scale_table(large_branches, shared / "large-branches-scales")
    output = tmp_path_factory.mktemp("codes") / "large-branches.bundle"
    return compared(large_branches, output, recipe="fp8", calibration=scales)


def g0_of(result: BuildResult) -> list[Measured]:
    return [m for m in result.parity if m.stage.endswith("as quantized")]


# -- what is right passes ---------------------------------------------------------------------------------------------


def test_codes_that_fall_to_the_other_side_are_no_bug(fp8: Compared) -> None:
    """Run freely, the two runtimes are 1.3e-2 apart on this checkpoint, by two codes of 21,120."""
    measured = g0_of(fp8.result)
    assert [m.limit for m in measured] == [RUNTIME_LIMIT] * 2
    assert all(m.value < 1e-5 for m in measured)
    details = measured[1].details
    assert details["activations rounded"] > 10_000 and details["wrong codes"] == 0
    assert details["codes of ONNX Runtime alone"] < 100 and details["codes apart at most"] <= 1
    assert not measured[0].details  # the first and last steps round no activation
    assert fp8.result.manifest is not None
    volatile = fp8.result.manifest.volatile.measured
    assert volatile[f"{measured[1].stage}: activations rounded"] == details["activations rounded"]


def test_a_runtime_that_adds_in_another_order_passes(fp8: Compared, tmp_path: Path) -> None:
    """Every value that is rounded moved by a few bits: many codes change, each is that of its own value."""

    def nudge(model: onnx.ModelProto) -> None:
        for node in quantizers(model):
            between(model, node, 0, "Mul", np.float32(1 + 2e-5))

    measured = fp8.g0(edited(fp8, tmp_path, nudge))
    assert measured.passed and measured.details["codes of ONNX Runtime alone"] > 3
    assert measured.details["wrong codes"] == 0
    assert measured.details["results apart by these codes"] > 10 * measured.value


# -- what is wrong does not -------------------------------------------------------------------------------------------


def edited(of: Compared, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """The models of the bundle with that of the loop's body changed."""
    for file in of.folder.iterdir():
        os.link(file, folder / file.name)
    path = folder / f"{of.body}.cpu.onnx"
    model = onnx.load(str(path), load_external_data=False)
    edit(model)
    path.unlink()
    path.write_bytes(model.SerializeToString())
    return folder


def quantizers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "QuantizeLinear"]


def constant(model: onnx.ModelProto, value: Any) -> str:
    name = f"planted_{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def between(
    model: onnx.ModelProto, node: onnx.NodeProto, operand: int, kind: str, value: Any, **attributes: int
) -> None:
    """``node`` reads its ``operand`` through an operation with ``value``."""
    name, place = f"{node.name}_planted", list(model.graph.node).index(node)
    made = helper.make_node(kind, [node.input[operand], constant(model, value)], [name], name=name, **attributes)
    node.input[operand] = name
    model.graph.node.insert(place, made)


def read(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))


def ranges_times(factor: float) -> Callable[[onnx.ModelProto], None]:
    """The input range of the first quantizer wrong, in its quantization and in its dequantization."""

    def edit(model: onnx.ModelProto) -> None:
        first = quantizers(model)[0]
        scale = constant(model, (read(model, first.input[1]) * factor).astype(np.float32))
        for node in model.graph.node:
            if node is first or (node.op_type == "DequantizeLinear" and node.input[0] == first.output[0]):
                node.input[1] = scale

    return edit


def weight_scale_doubled(model: onnx.ModelProto) -> None:
    given = {i.name for i in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in given)
    reader = next(n for n in model.graph.node if node.output[0] in n.input)
    between(model, reader, list(reader.input).index(node.output[0]), "Mul", np.float32(2.0))


def weights_swapped(model: onnx.ModelProto) -> None:
    packed = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT8E4M3FN and len(i.dims) == 2]
    by_shape: dict[tuple[int, ...], list[onnx.TensorProto]] = {}
    for tensor in packed:
        by_shape.setdefault(tuple(tensor.dims), []).append(tensor)
    a, b, *_ = next(group for group in by_shape.values() if len(group) > 1)
    kept = {entry.key: entry.value for entry in a.external_data}
    for tensor, values in ((a, {e.key: e.value for e in b.external_data}), (b, kept)):
        for entry in tensor.external_data:
            entry.value = values[entry.key]


def one_quantizer_of_another_scale(model: onnx.ModelProto) -> None:
    first = quantizers(model)[0]
    first.input[1] = constant(model, (read(model, first.input[1]) * 1.05).astype(np.float32))


def a_zero_that_is_not_zero(model: onnx.ModelProto) -> None:
    codes = numpy_helper.from_array(read(model, quantizers(model)[0].input[2]), "planted_zero")
    codes.raw_data = b"\x20"
    model.graph.initializer.append(codes)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            node.input[2] = "planted_zero"


def a_quantizer_left_out(model: onnx.ModelProto) -> None:
    first = quantizers(model)[0]
    after = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == first.output[0])
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == after.output[0]:
                node.input[place] = first.input[0]
    for node in (first, after):
        model.graph.node.remove(node)


def codes_towards_zero(model: onnx.ModelProto) -> None:
    """Every code is rounded once more, from 0.93 of it."""
    for node in quantizers(model):
        reader = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == node.output[0])
        place, code = list(model.graph.node).index(reader), reader.input[0]
        names = [f"{node.name}_planted_{index}" for index in range(3)]
        model.graph.node.insert(place, helper.make_node("Cast", [code], names[:1], to=onnx.TensorProto.FLOAT))
        less = helper.make_node("Mul", [names[0], constant(model, np.float32(0.93))], [names[1]])
        model.graph.node.insert(place + 1, less)
        narrow = helper.make_node("Cast", [names[1]], [names[2]], to=onnx.TensorProto.FLOAT8E4M3FN)
        model.graph.node.insert(place + 2, narrow)
        reader.input[0] = names[2]


def an_output_permuted(model: onnx.ModelProto) -> None:
    product = next(n for n in model.graph.node if n.op_type == "Gemm")
    reader = next(n for n in model.graph.node if product.output[0] in n.input)
    between(model, reader, list(reader.input).index(product.output[0]), "Gather", np.roll(np.arange(64), 1), axis=1)


FAULTS: Mapping[str, Callable[[onnx.ModelProto], None]] = {
    **{f"range x{factor:g}": ranges_times(factor) for factor in (0.05, 0.3, 0.6, 0.9, 1.1, 100.0, 10000.0)},
    "weight scale doubled": weight_scale_doubled,
    "weights swapped": weights_swapped,
    "scale of one quantizer": one_quantizer_of_another_scale,
    "zero that is not zero": a_zero_that_is_not_zero,
    "quantizer left out": a_quantizer_left_out,
    "codes towards zero": codes_towards_zero,
    "output permuted": an_output_permuted,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fp8: Compared, tmp_path: Path, fault: str) -> None:
    measured = fp8.g0(edited(fp8, tmp_path, FAULTS[fault]))
    assert not measured.passed and measured.value > 10 * RUNTIME_LIMIT, measured


def test_a_code_is_another_only_next_to_a_boundary(fp8: Compared, tmp_path: Path) -> None:
    """A runtime that multiplies by the reciprocal of the scale may be off by what a division may, and no more."""

    def reciprocal(error: float) -> Callable[[onnx.ModelProto], None]:
        def edit(model: onnx.ModelProto) -> None:
            for node in quantizers(model):
                node.input[1] = constant(model, (read(model, node.input[1]) * np.float32(1 + error)).astype(np.float32))

        return edit

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert fp8.g0(edited(fp8, tmp_path / "a", reciprocal(DIVISION))).passed
    assert fp8.g0(edited(fp8, tmp_path / "b", reciprocal(1e-3))).value == inf
