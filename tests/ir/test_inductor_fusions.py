"""This project's kernels in compiled graphs: found by dataflow, switched one by one, and the graph computes what it
did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import Tiny
from test_denoise_loop import closed, schedule
from test_inductor import inputs_of, on, requested
from test_inductor_quantized import inputs_of as quantized_inputs
from test_inductor_quantized import loaded
from tiny_cosmos import Compiled, assert_close, distance

from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.interpreter import run_graph
from cosmos_export.kernels import operators
from cosmos_export.kernels.description import KERNELS
from cosmos_export.kernels.interpret import device_rounding
from cosmos_export.passes.pipeline import FUSIONS, fuse_kernels
from cosmos_export.targets.inductor.executable import Executable
from cosmos_export.targets.inductor.functions import narrow_values, packed_linear, quantize
from cosmos_export.targets.inductor.specialise import CompileSettings, specialise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Kernels run on the GPU if there is one, else in Triton's interpreter with the device's rounding."""


@pytest.fixture(autouse=True)
def _rounding() -> Iterator[None]:
    with device_rounding() if DEVICE.type == "cpu" else nullcontext():
        yield


def run(graph: Any, weights: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], **settings: Any) -> Any:
    """Results on the host, of operations one after another."""
    graph = fuse_kernels(graph, settings.pop("kernels", ()))
    executable = Executable(graph, on(DEVICE, weights), DEVICE, CompileSettings(compiled=False, **settings))
    return on(torch.device("cpu"), executable(on(DEVICE, inputs)))


def calls(graph: Any, inputs: dict[str, torch.Tensor], *kernels: str) -> list[Any]:
    found = specialise(fuse_kernels(graph, kernels), {name: tuple(t.shape) for name, t in inputs.items()})
    return [node.target for chunk in found.chunks for node in chunk.module.graph.nodes if node.op == "call_function"]


def stepped(body: Any, compiled: Compiled) -> dict[str, torch.Tensor]:
    """Inputs of a step; what is a mask is 0 or 1."""
    inputs = inputs_of(body, compiled, requested(compiled, compiled.final))
    columns = inputs["action_columns"]
    return inputs | {"action_columns": (torch.arange(columns.numel()) < 7).to(columns.dtype)}


def test_the_sampler_and_the_projections_of_a_closed_loop(compiled: Compiled) -> None:
    """Both branches, guidance and sampler, in fp32: the same numbers."""
    body = closed(compiled, schedule()).graphs["generator"]
    inputs = stepped(body, compiled)
    layers, latents = compiled.config["num_hidden_layers"], 3 if compiled.config["sound_gen"] else 2
    found = calls(body, inputs, "qkv-pack", "sampler-step")
    assert found.count(operators.qkv_pack) == layers and found.count(operators.unipc_step) == latents
    weights = {name: compiled.weights(node.meta["weight"]) for name, node in body.weights.items()}
    plain = run(body, weights, inputs)
    fused = run(body, weights, inputs, kernels=frozenset({"qkv-pack", "sampler-step"}))
    assert_close(fused, plain, 2e-6)
    held = inputs["vision_mask"] == 0
    same = fused["vision_sample_next"][:, :, held] == inputs["vision_sample"][:, :, held]
    assert held.any() and same.all()  # bit for bit


def test_an_unguided_step(compiled: Compiled) -> None:
    body = closed(compiled, schedule(guidance=1.0)).graphs["generator"]
    inputs = stepped(body, compiled)
    assert operators.unipc_step in calls(body, inputs, "sampler-step")
    weights = {name: compiled.weights(node.meta["weight"]) for name, node in body.weights.items()}
    plain = run(body, weights, inputs)
    fused = run(body, weights, inputs, kernels=frozenset({"sampler-step"}))
    assert_close(fused, plain, 2e-6)


@pytest.fixture(scope="module", params=["omni", "edge"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp(request.param))


def test_quantization_behind_norms_and_activations(tiny: Tiny, tmp_path: Path) -> None:
    graph = tiny.quantized("fp8").graphs["generator"]
    inputs, layers = quantized_inputs(graph, tiny), tiny.config["num_hidden_layers"]
    again, weights = loaded(graph, tmp_path)
    plain = run(again, weights, inputs)
    exact = run(tiny.program.graphs["generator"], _weights(tiny), inputs)
    # The first norm of the first layer reads no sum that a kernel could make; every other one does.
    expected = {
        "norm-quantize": {operators.add_norm_quantize: 2 * layers - 1, operators.norm_quantize: 1},
        "activation-quantize": {operators.activation_quantize: layers},
    }
    for kernel, counts in expected.items():
        found = calls(again, inputs, kernel)
        if tiny.backbone == "omni":
            assert {target: found.count(target) for target in counts} == counts
        else:
            assert sum(found.count(target) for target in counts) == sum(counts.values())
        fused = run(again, weights, inputs, kernels=frozenset({kernel}))
        for name, value in plain.items():
            if value.numel():
                # A sum of squares in another order moves some values by a step of E4M3.
                assert distance(fused[name], value) < 0.5 * distance(value, exact[name]), (kernel, name)


def test_fp8_attention_is_quantized_by_what_is_before_it(tiny: Tiny) -> None:
    """Our kernel alone between chunks that the compiler fuses, for any length of the prompt."""
    wide, graph = tiny.program.graphs["generator"], tiny.program.graphs["generator"].copy()
    for node in graph.calls(ops.JOINT_ATTENTION):
        *operands, scale = node.args
        scales = graph.add_constant(f"scales_{node.name}", torch.tensor([0.02, 0.02, 0.02]))
        graph.replace(node, graph.call(ops.JOINT_ATTENTION_FP8, *operands, scales, scale, before=node, like=node))
    graph.eliminate_dead_code()
    chosen: dict[str, Any] = {"attention": "triton", "open_dims": frozenset({"und_len"})}
    inputs = quantized_inputs(graph, tiny)
    chunks = specialise(graph, {name: tuple(t.shape) for name, t in inputs.items()}, CompileSettings(**chosen)).chunks
    targets = [[n.target for n in chunk.module.graph.nodes if n.op == "call_function"] for chunk in chunks]
    assert all(target == [operators.joint_attention_fp8] for target in targets[1::2])
    assert [chunk.compiled for chunk in chunks] == [n % 2 == 0 for n in range(len(chunks))]
    assert all(t.count(quantize) == 3 and t.count(narrow_values) == 2 for t in targets[:-1:2])
    found = run(graph, _weights(tiny), inputs, **chosen)
    plain = run_graph(graph, inputs, tiny.weights)
    exact = run_graph(wide, inputs, tiny.weights)
    for name, value in plain.items():
        if value.numel():
            moved = distance(value, exact[name])
            assert distance(found[name], exact[name]) < 1.2 * moved, name
            assert distance(found[name], value) < 2 * moved, name  # both round to E4M3, in another order


def _weights(tiny: Tiny) -> dict[str, torch.Tensor]:
    return {n: tiny.weights(node.meta["weight"]) for n, node in tiny.program.graphs["generator"].weights.items()}


def test_a_product_of_packed_weights() -> None:
    """The kernel on the form in which a bundle has INT4."""
    from cosmos_export.kernels import gemm_w4a16 as w4
    from cosmos_export.targets.inductor.functions import dequantize_groups

    values = torch.randint(-8, 8, (24, 256), generator=torch.Generator().manual_seed(0))
    x, scales = torch.randn(9, 256).bfloat16(), (torch.rand(24, 2) * 0.1).bfloat16()
    bias = torch.randn(24).bfloat16()
    found = packed_linear(*(t.to(DEVICE) for t in (x, w4.pack(values), scales, bias))).cpu()
    wide = dequantize_groups(w4.pack(values), scales.float())
    assert distance(found, torch.nn.functional.linear(x.float(), wide, bias.float())) < 5e-3


def test_fusions_are_passes_and_no_setting() -> None:
    with pytest.raises(ValueError, match="passes put all but w4a16 into a graph"):
        specialise(Graph("empty"), {}, CompileSettings(kernels=frozenset({"norm-quantize"})))
    assert set(CompileSettings().kernels) == set() and set(KERNELS) - {"w4a16"} == FUSIONS
