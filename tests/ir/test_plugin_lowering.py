"""Models with this project's kernels as nodes compute what they did: by ONNX's own reference, each node by its
kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from quantized import Tiny
from test_inductor_quantized import inputs_of

from cosmos_export.compiler.keys import plugin_nodes
from cosmos_export.diagnostics import UnsupportedError
from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.interpreter import run_graph
from cosmos_export.kernels.description import NAMESPACE, PLUGINS
from cosmos_export.kernels.interpret import device_rounding
from cosmos_export.kernels.plugins import Form, run
from cosmos_export.passes.pipeline import fuse_kernels
from cosmos_export.progress import Silent
from cosmos_export.targets.onnx.lowering import lower
from cosmos_export.targets.onnx.plugins import Plugins
from cosmos_export.targets.onnx.weights import layout, write_weights

_VIEWS = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
}


def to_torch(array: Any) -> torch.Tensor:
    array = np.asarray(array)
    if array.dtype not in _VIEWS:
        return torch.from_numpy(array.copy())
    plain, dtype = _VIEWS[array.dtype]
    return torch.from_numpy(np.array(array, order="C").view(plain)).view(dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    for kind, (plain, dtype) in _VIEWS.items():
        if tensor.dtype is dtype:
            return tensor.contiguous().view(torch.uint8 if plain is np.uint8 else torch.int16).numpy().view(kind)
    return tensor.numpy()


def as_operation(form: Form) -> type[OpRun]:
    """The plugin as an operation of ONNX's evaluator."""

    class Operation(OpRun):
        op_domain = NAMESPACE

        def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
            assert attributes == {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
            return tuple(to_numpy(t) for t in run(form.plugin(90), [to_torch(x).contiguous() for x in inputs]))

    return type(form.name, (Operation,), {})


@pytest.fixture(autouse=True)
def _rounding() -> Iterator[None]:
    with device_rounding():
        yield


@pytest.fixture(scope="module", params=["omni", "edge"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp(request.param))


def plugins_of(*kernels: str) -> Plugins:
    return Plugins(kernels, lambda graph: fuse_kernels(graph, kernels))


def lowered(graph: Graph, folder: Path, plugins: Plugins | None) -> Path:
    folder = Path(mkdtemp(dir=folder))  # of its own: so are its weights
    stored = layout(node.meta["weight"] for node in graph.weights.values())
    write_weights(folder / "weights.bin", stored, "weights", Silent())
    path = folder / "model.onnx"
    onnx.save(lower(graph, stored, "weights.bin", plugins=plugins), path)
    return path


def evaluated(path: Path, graph: Graph, tiny: Tiny, plugins: Plugins | None = None) -> dict[str, torch.Tensor]:
    operations = [as_operation(form) for form in plugins.forms.values()] if plugins is not None else []
    evaluator = ReferenceEvaluator(str(path), new_ops=operations)
    feed = {name: to_numpy(value) for name, value in inputs_of(graph, tiny).items()}
    found = evaluator.run(None, {name: feed[name] for name in evaluator.input_names})
    return dict(zip(evaluator.output_names, map(to_torch, found), strict=True))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("kernel", [name for name in PLUGINS if name != "sampler-step"])
def test_each_kernel_computes_what_it_replaces(tiny: Tiny, tmp_path: Path, kernel: str) -> None:
    graph = tiny.quantized("fp8").graphs["generator"]
    layers, plugins = tiny.config["num_hidden_layers"], plugins_of(kernel)
    path = lowered(graph, tmp_path, plugins)
    plugins.require_places([graph])
    counts = {"joint-attention": layers, "qkv-pack": layers, "activation-quantize": layers, "norm-quantize": 2 * layers}
    assert plugin_nodes(path).total() == counts[kernel]
    plain = evaluated(lowered(graph, tmp_path, None), graph, tiny)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in inputs_of(graph, tiny).items()}
    exact = run_graph(graph, wide, tiny.weights, compute=torch.float32)
    for name, value in evaluated(path, graph, tiny, plugins).items():
        if value.numel():
            # Both round to bf16 and E4M3, in another order: neither is farther from what is computed in float32.
            assert distance(value, exact[name]) < 1.3 * distance(plain[name], exact[name]), name
            assert distance(value, plain[name]) < 2 * distance(plain[name], exact[name]), name


def test_attention_in_fp8_over_any_number_of_keys(tmp_path: Path) -> None:
    tiny = Tiny("omni", tmp_path)
    program = tiny.program.copy()
    body = program.graphs["generator"]
    for node in body.calls(ops.JOINT_ATTENTION):
        *operands, scale = node.args
        scales = body.add_constant(f"scales_{node.name}", torch.tensor([0.02, 0.02, 0.02]))
        body.replace(node, body.call(ops.JOINT_ATTENTION_FP8, *operands, scales, scale, before=node, like=node))
    body.eliminate_dead_code()
    plugins = plugins_of("joint-attention")
    path = lowered(body, tmp_path, plugins)
    assert set(plugin_nodes(path)) == {"joint_attention"}
    assert dict(next(iter(plugins.forms.values())).settings)["narrow"] is True
    model = onnx.load(str(path), load_external_data=False)
    assert not [node for node in model.graph.node if node.op_type == "Softmax"]
    found, plain = evaluated(path, body, tiny, plugins), evaluated(lowered(body, tmp_path, None), body, tiny)
    wide = tiny.program.graphs["generator"]
    exact = evaluated(lowered(wide, tmp_path, None), wide, tiny)
    for name, value in found.items():
        if value.numel():
            assert distance(plain[name], exact[name]) > 0
            assert distance(value, exact[name]) < 1.2 * distance(plain[name], exact[name]), name


def test_models_of_a_cpu_have_none_and_others_only_what_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    graph = tiny.quantized("fp8").graphs["generator"]
    assert not plugin_nodes(lowered(graph, tmp_path, None))
    before = [node.target for node in graph.nodes]
    assert set(plugin_nodes(lowered(graph, tmp_path, plugins_of("qkv-pack")))) == {"qkv_pack"}
    assert [node.target for node in graph.nodes] == before


def test_a_kernel_without_a_place_is_said(tiny: Tiny, tmp_path: Path) -> None:
    plugins, graph = plugins_of("joint-attention", "norm-quantize", "sampler-step"), tiny.program.graphs["generator"]
    path = lowered(graph, tmp_path, plugins)
    assert plugin_nodes(path) == Counter({"joint_attention": tiny.config["num_hidden_layers"]})
    with pytest.raises(UnsupportedError, match="no place for norm-quantize, sampler-step: residual sum") as refused:
        plugins.require_places([graph])
    assert refused.value.code == "CX458" and "--loop device" in refused.value.hint
