"""The weight file equals the interpreter's values; the ONNX models are legal, run, and have the form builders want."""

from __future__ import annotations

import errno
import hashlib
import resource
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from captured import captured
from safetensors.torch import save_file
from sketch import N, P, Sketch, aten, ops
from tiny_cosmos import Case, assert_close, cases_for, random_model, request, stock_forward, tiny_config

from cosmos_export.diagnostics import InternalError, ToolError
from cosmos_export.ir.interpreter import read_weights, run_program
from cosmos_export.ir.program import Program
from cosmos_export.ir.spec import Transform, WeightBinding, WeightSource
from cosmos_export.passes.pipeline import default_passes, run_passes
from cosmos_export.progress import Silent
from cosmos_export.targets.onnx import weights as weights_module
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.model import OPSET
from cosmos_export.targets.onnx.weights import (
    ALIGNMENT,
    Stored,
    file_size,
    layout,
    numpy_dtype,
    read_source,
    write_weights,
)


def checkpoint(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, WeightSource]:
    """Tensors in a safetensors file, and where each lies: header length (8 bytes), header, data."""
    import json

    save_file(tensors, path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: WeightSource(name, path, 8 + length + header[name]["data_offsets"][0], t.dtype, tuple(t.shape))
        for name, t in tensors.items()
    }


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bindings(tmp_path: Path) -> list[WeightBinding]:
    torch.manual_seed(0)
    sources = checkpoint(
        tmp_path / "model.safetensors",
        {
            "a": torch.randn(5, 7).bfloat16(),
            "b": torch.randn(3, 7).bfloat16(),
            "c": torch.randn(5, 7).bfloat16(),
            "row": torch.randn(9),
            "scale": torch.tensor(0.25),
            "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
            "wide": torch.randn(2, 3, 4),
        },
    )
    a, b, c = (WeightBinding((sources[n],), Transform.IDENTITY, torch.bfloat16) for n in "abc")
    others = [
        WeightBinding((sources[n],), Transform.IDENTITY, sources[n].dtype) for n in ("row", "scale", "eight", "wide")
    ]
    return [
        a,
        a.merged((b, c), Transform.CONCATENATE),
        a.merged((c,), Transform.INTERLEAVE),
        WeightBinding((sources["b"],), Transform.IDENTITY, torch.float32),
        WeightBinding((sources["a"], sources["c"]), Transform.INTERLEAVE, torch.float32),
        *others,
    ]


def stored_values(path: Path, stored: dict[WeightBinding, Stored]) -> Iterable[tuple[WeightBinding, torch.Tensor]]:
    data = path.read_bytes()
    for binding, place in stored.items():
        raw = bytearray(data[place.offset : place.offset + place.size_bytes])
        yield binding, torch.frombuffer(raw, dtype=binding.dtype).reshape(binding.shape)


@pytest.mark.parametrize("chunk", [16 << 20, 20], ids=["one chunk", "a row at a time"])
def test_the_file_holds_what_the_interpreter_computes(
    bindings: list[WeightBinding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(weights_module, "_CHUNK_BYTES", chunk)
    stored, path = layout(bindings), tmp_path / "weights.bin"
    write_weights(path, stored, "weights", Silent())
    value = read_weights(read_source)
    found = dict(stored_values(path, stored))
    assert found.keys() == set(bindings)
    for binding, tensor in found.items():
        assert torch.equal(tensor.float(), value(binding).float()), str(binding)
    assert path.stat().st_size == file_size(stored)


def test_places_are_aligned_and_do_not_overlap(bindings: list[WeightBinding]) -> None:
    stored = layout([*bindings, bindings[0]])
    assert len(stored) == len(bindings)
    places = sorted(stored.values(), key=lambda s: s.offset)
    assert all(p.offset % ALIGNMENT == 0 for p in places)
    assert all(a.offset + a.size_bytes <= b.offset for a, b in pairwise(places))
    assert file_size({}) == 0


def test_sources_are_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(), "f8": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "f16": torch.randn(3).half(), "f32": torch.randn(2, 2), "i64": torch.arange(4), "scalar": torch.tensor(3.0),
    }  # fmt: skip
    for name, source in checkpoint(tmp_path / "x.safetensors", tensors).items():
        value = read_source(source)
        assert value.dtype is tensors[name].dtype and torch.equal(value.float(), tensors[name].float()), name


def test_a_full_disk_is_an_error_of_the_file_system(
    bindings: list[WeightBinding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_module, "_write", full)
    with pytest.raises(ToolError) as refused:
        write_weights(tmp_path / "weights.bin", layout(bindings), "weights", Silent())
    assert str(refused.value) == (
        "CX440: writing weights.bin (32.1 KiB) failed: No space left on device "
        "(hint: free disk space or choose another output directory)"
    )


def test_a_file_that_cannot_grow_is_one_and_leaves_nothing(bindings: list[WeightBinding], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(ToolError, match="CX440"):
            write_weights(tmp_path / "weights.bin", layout(bindings), "weights", Silent())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_digest_is_the_file_s_and_zeros_are_holes(tmp_path: Path) -> None:
    tensors = {"zero": torch.zeros(4 << 20), "some": torch.cat([torch.zeros(2 << 20), torch.randn(5)])}
    sources = checkpoint(tmp_path / "x.safetensors", tensors)
    stored = layout(WeightBinding((source,), Transform.IDENTITY, source.dtype) for source in sources.values())
    digest = write_weights(tmp_path / "weights.bin", stored, "weights", Silent())
    assert digest == hashlib.sha256((tmp_path / "weights.bin").read_bytes()).hexdigest()
    assert (tmp_path / "weights.bin").stat().st_blocks * 512 < 16 << 20 < (tmp_path / "weights.bin").stat().st_size
    for binding, tensor in stored_values(tmp_path / "weights.bin", stored):
        assert torch.equal(tensor, tensors[binding.sources[0].key])


# -- lowering ---------------------------------------------------------------------------------------------------------


class Lowered:
    """A bf16 program compiled from a checkpoint on disk, and its lowered graphs."""

    def __init__(self, backbone: str, folder: Path) -> None:
        self.config = tiny_config(backbone)
        self.model = random_model(self.config)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.bfloat16())  # rounded once: both sides have the same weights
        tensors = {n: p.detach().bfloat16().contiguous() for n, p in self.model.named_parameters()}
        sources = checkpoint(folder / "model.safetensors", tensors)
        self.program: Program = captured(self.config, sources)
        run_passes(self.program, default_passes())
        self.folder = folder
        graphs = self.program.graphs.values()
        self.stored = layout(n.meta["weight"] for g in graphs for n in g.weights.values())
        write_weights(folder / "weights.bin", self.stored, "weights", Silent())

    def models(self, compute: torch.dtype | None = None) -> dict[str, onnx.ModelProto]:
        return {
            name: lower(graph, self.stored, "weights.bin", compute=compute)
            for name, graph in self.program.graphs.items()
        }


@pytest.fixture(scope="module", params=["omni", "edge"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return Lowered(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("compute", [None, torch.float32], ids=["bf16", "fp32"])
def test_every_model_is_legal_onnx(lowered: Lowered, compute: torch.dtype | None) -> None:
    for name, model in lowered.models(compute).items():
        path = lowered.folder / f"{name}.checked.onnx"
        onnx.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
        assert [o.version for o in model.opset_import] == [OPSET]
        graph = lowered.program.graphs[name]
        assert [i.name for i in model.graph.input] == list(graph.inputs)
        assert [o.name for o in model.graph.output] == list(graph.outputs)


def test_dims_keep_their_names(lowered: Lowered) -> None:
    model = lowered.models()["generator"]
    (latent,) = (i for i in model.graph.input if i.name == "vision_latent")
    dims = [d.dim_param or d.dim_value for d in latent.type.tensor_type.shape.dim]
    assert dims == [1, lowered.config["latent_channel"], "frames", "height", "width"]


def test_weights_are_references_and_two_precisions_share_them(lowered: Lowered) -> None:
    for model in (lowered.models()["generator"], lowered.models(torch.float32)["generator"]):
        external = [i for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
        assert len(external) == len(lowered.program.graphs["generator"].weights)
        places = {(e.key, e.value) for t in external for e in t.external_data if e.key == "location"}
        assert places == {("location", "weights.bin")}
        offsets = {int(e.value) for t in external for e in t.external_data if e.key == "offset"}
        assert offsets <= {s.offset for s in lowered.stored.values()}
        assert model.ByteSize() < 100_000


def test_fp32_compute_of_a_bf16_program_equals_the_stock_model_of_rounded_weights(lowered: Lowered) -> None:
    """Relative L2 ≤ 1e-4: no value is rounded to bf16 on the way, only the weights are."""
    sessions = {}
    for name, model in lowered.models(torch.float32).items():
        path = lowered.folder / f"{name}.fp32.onnx"
        onnx.save(model, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        sessions[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    backbone = "omni" if lowered.config["sound_gen"] else "edge"
    program = lowered.program
    for case in cases_for(backbone):
        inputs = request(lowered.config, case)
        results: dict[str, dict[str, np.ndarray]] = {}
        for name, session in sessions.items():
            fed = {e.input: results[e.source][e.output] for e in program.edges_into(name)}
            fed |= {i: inputs[i].numpy() for i in program.free_inputs(name)}
            names = [o.name for o in session.get_outputs()]
            results[name] = dict(zip(names, session.run(names, fed), strict=True))
        outputs = {k: torch.from_numpy(np.array(v)) for k, v in results["generator"].items()}
        stock = stock_forward(lowered.model, inputs)
        assert_close(outputs, stock, 1e-4, str(case))
        ours = run_program(program, inputs, read_weights(read_source), compute=torch.float32)
        assert_close(ours, stock, 1e-5, f"interpreter, {case}")


def by_type(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == kind]


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def test_attention_is_scaled_once_and_ends_with_the_prompt(lowered: Lowered) -> None:
    """Scale 1 with the query multiplied before, and the keys joined as [own; prompt]: see `_attend`."""
    layers = lowered.config["num_hidden_layers"]
    model = lowered.models()["generator"]
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {i.name: i for i in model.graph.initializer}
    attentions = by_type(model, "Attention")
    assert len(attentions) == layers
    for i, node in enumerate(attentions):
        assert attribute(node, "scale") == 1.0 and attribute(node, "is_causal") == 0
        heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
        assert heads == (lowered.config["num_attention_heads"], lowered.config["num_key_value_heads"])
        scaled = producers[node.input[0]]
        assert scaled.op_type == "Mul" and scaled.input[1] in constants
        factor = onnx.numpy_helper.to_array(constants[scaled.input[1]]).astype(np.float32)
        expected = np.float32(lowered.config["head_dim"] ** -0.5).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert factor == expected
        for operand, name in ((1, f"key_{i}"), (2, f"value_{i}")):
            join = producers[node.input[operand]]
            assert join.op_type == "Concat" and attribute(join, "axis") == 1 and len(join.input) == 2
            last = producers[join.input[1]]
            assert last.op_type == "Reshape" and last.input[0] == name
    causal = by_type(lowered.models()["reasoner"], "Attention")
    assert [attribute(n, "is_causal") for n in causal] == [1] * (layers - 1)
    assert {attribute(n, "scale") for n in causal} == {1.0}


def test_building_blocks_arrive_as_one_operation(lowered: Lowered) -> None:
    model = lowered.models()["generator"]
    norms = by_type(model, "RMSNormalization")
    layers = lowered.config["num_hidden_layers"]
    assert len(norms) == 4 * layers + 1
    assert {attribute(n, "stash_type") for n in norms} == {1}
    assert len(by_type(model, "RotaryEmbedding")) == 2 * layers
    assert not by_type(model, "ReduceMean") and not by_type(model, "Softmax")


def compare_with_runtime(program: Program, inputs: dict[str, torch.Tensor], **options: Any) -> None:
    graph = program.graphs["body"]
    model = lower(graph, {}, "none", **options)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(list(graph.outputs), {k: v.numpy() for k, v in inputs.items()})
    expected = run_program(program, inputs, read_weights(read_source))
    for value, name in zip(found, graph.outputs, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.array(value)), expected[name], rtol=1e-5, atol=1e-6)


def test_operations_that_the_final_program_does_not_hold_lower_too() -> None:
    """The table serves every stage; each operation with dims in its operands is run."""
    s = Sketch()
    x, y = s.input("x", (N, 6)), s.input("y", (P, 6))
    call = s.call
    outputs = {
        "sub": call(aten.sub.Tensor, x, N + 2 * P),
        "div": call(aten.div.Tensor, call(aten.exp.default, x), 3.0),
        "pow": call(aten.pow.Tensor_Scalar, call(aten.exp.default, x), 1.5),
        "square": call(aten.pow.Tensor_Scalar, x, 2),
        "pad": call(aten.constant_pad_nd.default, x, [1, 0, 0, P], 2.0),
        "strided": call(aten.slice.Tensor, x, 1, 0, 6, 2),
        "rows": call(aten.slice.Tensor, call(aten.cat.default, [x, y], 0), 0, N, N + P),
        "range": call(aten.arange.start, N, N * P + N, dtype=torch.float32),
        "fill": call(aten.full.default, [N, P], 2.0, dtype=torch.int64),
        "expand": call(aten.expand.default, call(aten.unsqueeze.default, x, 0), [3, N, 6]),
        "flat": call(aten.view.default, x, [N * 6]),
        "relu": call(aten.relu.default, call(aten.neg.default, x)),
        "silu": call(aten.silu.default, x),
        "matmul": call(aten.matmul.default, x, call(aten.permute.default, y, [1, 0])),
        "mask": call(aten.where.self, s.constant("m", torch.tensor([True, False] * 3)), x, call(aten.cos.default, x)),
        "select": call(aten.select.int, x, 1, 4),
        "int": call(aten._to_copy.default, call(aten.mul.Tensor, x, 10.0), dtype=torch.int64),
        "plain": call(ops.SWIGLU, x, call(aten.sin.default, x)),
    }  # fmt: skip
    program = s.program(**outputs)
    compare_with_runtime(program, {"x": torch.randn(4, 6), "y": torch.randn(3, 6)})


def test_bf16_constants_are_computed_in_the_type_asked_for() -> None:
    s = Sketch()
    x = s.input("x", (N, 4), dtype=torch.bfloat16)
    filled = s.call(aten.full.default, [N, 4], 0.5, dtype=torch.bfloat16)
    program = s.program(y=s.call(aten.mul.Tensor, s.call(aten.add.Tensor, x, filled), 0.1))
    model = lower(program.graphs["body"], {}, "none", compute=torch.float32)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x_value = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    (y,) = session.run(None, {"x": x_value})
    np.testing.assert_allclose(y, (x_value + 0.5) * np.float32(0.1), rtol=1e-6)


def test_an_operation_without_an_onnx_form_is_named() -> None:
    s = Sketch()
    rows = s.call(aten.arange.start, 0, 4, dtype=torch.int64)
    program = s.program(y=s.call(aten.index_put.default, s.input("x", (4, 2)), [rows], s.input("v", (4, 2))))
    with pytest.raises(InternalError) as refused:
        lower(program.graphs["body"], {}, "none")
    assert refused.value.message == "`index_put_default`: no ONNX form of aten.index_put.default"


def test_a_dim_that_no_input_shows_is_named() -> None:
    s = Sketch()
    y = s.call(aten.expand.default, s.call(aten.unsqueeze.default, s.input("x", (N,)), 0), [P, N])
    with pytest.raises(InternalError) as refused:
        lower(s.program(y=y).graphs["body"], {}, "none")
    assert refused.value.message == "graph `body`: no input shows the dim prompt"


def test_a_linear_of_more_than_rows_is_named() -> None:
    s = Sketch()
    y = s.call(aten.linear.default, s.input("x", (N, 2, 4)), s.input("w", (3, 4)))
    with pytest.raises(InternalError, match=r"a linear of rows is \[N, in\], not float32\[rows, 2, 4\]"):
        lower(s.program(y=y).graphs["body"], {}, "none")


def test_numpy_has_a_type_for_each() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool):
        assert numpy_dtype(dtype).itemsize == dtype.itemsize


def test_the_case_of_the_whole_is_a_case(lowered: Lowered) -> None:
    """The bf16 program itself, run as it is, stays within bf16 rounding of the fp32 stock model."""
    inputs = request(lowered.config, Case("i2v", 5, 5, 6, 33, clean=(0,)))
    typed = {k: v.bfloat16() if k.endswith(("_latent", "_mask")) else v for k, v in inputs.items()}
    outputs = run_program(lowered.program, typed, read_weights(read_source))
    assert outputs["vision_velocity"].dtype is torch.bfloat16
    assert_close({"vision_velocity": outputs["vision_velocity"]}, stock_forward(lowered.model, inputs), 0.03)
