"""What a model writes in place, imported: equal to torch, or refused where something else reads the same memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cosmos_export.capture.importer import Importer
from cosmos_export.diagnostics import InternalError
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.interpreter import run_graph

X = torch.arange(12.0).reshape(3, 4)


def imported(forward: Callable[[torch.Tensor], torch.Tensor]) -> Graph:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": forward(x)}

    exported = torch.export.export(Model(), (X,), strict=False)
    return Importer(exported, "g", {"x": (3, 4)}, {}, {}).run()


def a_slice(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[:, 1:3] = x[:, :2]
    return y


def every_second(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[..., slice(1, 4, 2)] = x[..., :2]
    return y


def a_slice_of_a_row(x: torch.Tensor) -> torch.Tensor:
    """As the published rotary embedding does it: twice, through a view that is read afterwards."""
    y = x + 1
    row = y[0]
    row[..., :2] = y[1, ..., :2]
    row[..., 3:] = y[2, ..., 3:]
    return y + row


def rows_by_index(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(5, 4)
    y[torch.arange(1, 4)] = x
    return y


def all_of_it(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y.copy_(x * 2)
    return y


def through_a_view_of_the_same_shape(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y.to(torch.float32).view(3, 4).copy_(x * 2)
    return y


def a_copy_keeps_what_it_was(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    kept = y.clone()
    y[1:] = x[1:]
    return y * kept


def the_view_of_what_nobody_reads(x: torch.Tensor) -> torch.Tensor:
    y = (x + 1).transpose(0, 1)
    y[1:].copy_(y[1:] * 2)
    return y


def rows_from_both_ends(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[2] = x[0]
    y[-1, -3:9] = x[1, :3]
    return y + y[-1]


def all_through_a_slice(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[:, 1:3] = x[:, :2]
    y[:] = y * 2
    return y


def a_copy_of_the_same_type(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y.to(torch.float32, copy=True)[1:] = x[1:]
    return y


def in_a_block_without_autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x + 1
    y[1:] = x[:2]
    return y


WRITES = [
    a_slice, every_second, a_slice_of_a_row, rows_by_index, all_of_it, through_a_view_of_the_same_shape,
    a_copy_keeps_what_it_was, the_view_of_what_nobody_reads, in_a_block_without_autocast, rows_from_both_ends,
    all_through_a_slice, a_copy_of_the_same_type,
]  # fmt: skip


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
def test_a_write_in_place_is_a_new_value_of_what_it_wrote_into(forward: Callable[..., torch.Tensor]) -> None:
    graph = imported(forward)
    assert not any(str(node.target).split(".")[1].endswith("_") for node in graph.calls())
    torch.testing.assert_close(run_graph(graph, {"x": X}, {}.__getitem__)["y"], forward(X), rtol=0, atol=0)


def another_view(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    first = y[0]
    y[:, 1:3] = x[:, :2]
    return first


def what_was_transposed(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y.transpose(0, 1)[1:] = x.transpose(0, 1)[1:]
    return y


def what_may_be_a_copy(x: torch.Tensor) -> torch.Tensor:
    y = (x + 1).transpose(0, 1)
    y.contiguous().copy_(x.transpose(0, 1) * 2)
    return y


def before_an_identity_that_says_nothing(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    same = torch.nn.functional.dropout(y, training=False)
    y[1:].copy_(y[1:] * 2)
    return same


READS = [another_view, what_was_transposed, what_may_be_a_copy, before_an_identity_that_says_nothing]


@pytest.mark.parametrize("forward", READS, ids=lambda f: f.__name__)
def test_memory_that_is_read_after_a_write_elsewhere_is_refused(forward: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(InternalError, match=r"is read after `\w+` wrote into its memory") as refused:
        imported(forward)
    assert refused.value.code == "CX202"


def test_a_write_that_returns_nothing_is_refused() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._foreach_add_([y], 1.0)
        return y

    with pytest.raises(InternalError, match="writes in place and returns nothing"):
        imported(forward)


def test_a_block_that_chooses_types_is_refused() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.transpose(0, 1)

    with pytest.raises(InternalError, match="chooses types by itself"):
        imported(forward)
