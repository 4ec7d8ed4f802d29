"""Gate G0 on NVFP4: blocks of a runtime beside the reference on the runtime's own codes, on one rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from cosmos_export.evaluation.followed import Counts, Followed, Roundings
from cosmos_export.evaluation.models import OnnxModel
from cosmos_export.ir import ops
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.interpreter import run_graph
from cosmos_export.ir.spec import TensorSpec
from cosmos_export.targets.onnx.lowering import lower

ROWS, COLUMNS = 24, 64
Edit = Callable[[onnx.ModelProto], None]


def rounding() -> Graph:
    graph = Graph("blocks")
    x = graph.add_input("x", TensorSpec(torch.float32, (ROWS, COLUMNS)))
    scale = graph.add_constant("scale", torch.tensor(0.002))
    graph.set_outputs({"y": graph.call(ops.REQUANTIZE_BLOCKS, x, scale)})
    return graph


def values() -> torch.Tensor:
    """Blocks of very different size, one of zeros, and one beyond what its scale can say."""
    drawn = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    drawn *= torch.logspace(-3, 1, ROWS).reshape(-1, 1)
    drawn[3, :16] = 0.0
    drawn[5, 16] = 1000.0
    return drawn


def followed(folder: Path, edit: Edit = lambda _: None, moved: float = 1.0) -> Counts:
    """What gate G0 counts where ONNX Runtime has the model as ``edit`` leaves it, and its input times ``moved``."""
    graph, x = rounding(), values()
    model, places = lower(graph, {}, "none.weights", compute=torch.float32), Roundings(graph)
    edit(model)
    (folder / "blocks.onnx").write_bytes(model.SerializeToString())
    shown = places.find(model)
    assert len(shown) == 2 and not places.missing
    seen = OnnxModel(folder / "blocks.onnx", shown)({"x": (x * moved).numpy()})
    counts = Counts()
    run_graph(
        graph, {"x": x}, lambda _: pytest.fail("there is no weight"), {}, compute=torch.float32,
        follow=Followed(places, seen, counts),
    )  # fmt: skip
    assert counts.values == ROWS * COLUMNS
    return counts


def test_the_runtime_has_the_codes_of_its_own_values(tmp_path: Path) -> None:
    found = followed(tmp_path)
    assert found.wrong == found.moved == 0 and found.error == 0.0


def test_values_that_fall_to_the_other_side_are_no_bug(tmp_path: Path) -> None:
    """The runtime's values are others in the last bits: some codes move, each is that of the runtime's own value."""
    found = followed(tmp_path, moved=1 + 2e-3)
    assert found.moved > 0 and found.wrong == 0
    assert found.error == pytest.approx(2e-3, rel=1e-3)


def operation(before: str, after: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        (node,) = [n for n in model.graph.node if n.op_type == before]
        node.op_type = after

    return edit


def scale_times(factor: float) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        (scale,) = [i for i in model.graph.initializer if numpy_helper.to_array(i).tolist() == pytest.approx(0.002)]
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * factor, scale.name))

    return edit


def one_block_for_another(model: onnx.ModelProto) -> None:
    """Steps of blocks are read in another order."""
    node = next(n for n in model.graph.node if n.op_type == "Cast")
    name = "planted_flip"
    order = numpy_helper.from_array(torch.arange(COLUMNS // 16).flip(0).numpy(), "planted_order")
    model.graph.initializer.append(order)
    place = list(model.graph.node).index(node)
    # ONNX Runtime gathers no FP8: in float32, after the cast.
    made = onnx.helper.make_node("Gather", [node.output[0], "planted_order"], [name], axis=1)
    for reader in model.graph.node:
        for at, read in enumerate(reader.input):
            if read == node.output[0]:
                reader.input[at] = name
    model.graph.node.insert(place + 1, made)


FAULTS: dict[str, Edit] = {
    "rounded down": operation("Round", "Floor"),
    "the smallest of a block for the largest": operation("ReduceMax", "ReduceMin"),
    "scale x1.1": scale_times(1.1),
    "scale x0.5": scale_times(0.5),
    "steps of other blocks": one_block_for_another,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(tmp_path: Path, fault: str) -> None:
    found = followed(tmp_path, FAULTS[fault])
    assert found.wrong > ROWS and found.error == float("inf")
