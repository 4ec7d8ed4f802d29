"""Searches besides ranges: ModelOpt's algorithms as a provider, and what the compiler makes of their results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cosmos_export.calibration import algorithms
from cosmos_export.calibration.algorithms import ALGORITHMS, Algorithm
from cosmos_export.calibration.formats import layout_of, quantized_weight
from cosmos_export.calibration.search import BUDGETED, SearchResult
from cosmos_export.calibration.table import RECIPE_FILE, ScaleTable, read_scale_table, write_scale_table
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.checkpoint.demo import write_demo_checkpoint
from cosmos_export.diagnostics import UnsupportedError, UserError
from cosmos_export.precision.layout import LinearInputs
from cosmos_export.precision.recipe import load_recipe, resolve_recipe
from cosmos_export.precision.stored_recipe import recipe_text
from cosmos_export.targets import load_target

WIDTH = 256
READERS = {"q": ["q", "k"], "down": ["down"]}


@pytest.fixture
def layer() -> nn.Module:
    """Two linears that read one tensor, and one that reads another; some channels of both are far larger."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"q": nn.Linear(WIDTH, 64), "k": nn.Linear(WIDTH, 32), "down": nn.Linear(128, WIDTH)})
    return module.bfloat16().requires_grad_(False)


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = {"q": WIDTH, "down": 128}
    found = {name: torch.randn(64, width, generator=generator) for name, width in spread.items()}
    for values in found.values():
        values[:, ::31] *= 20
    return found


def search(name: str, layer: nn.Module, rows: dict[str, torch.Tensor], **settings: float) -> SearchResult:
    found = Algorithm(name, **settings).search()  # type: ignore[arg-type]
    assert found is not None
    return found(layer, READERS, rows, {key: values.abs().mean(0) for key, values in rows.items()})


def error(layer: nn.Module, rows: dict[str, torch.Tensor], found: SearchResult, name: str, reads: str) -> float:
    """Relative error of a linear in INT4 with what was found."""
    weight, x = layer.get_parameter(f"{name}.weight").float(), rows[reads]
    pre = found.pre_scales.get(name, torch.ones(weight.shape[1]))
    down, up = found.low_rank.get(name, (torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1)))
    scaled, part = weight / pre, up @ down
    packed = layout_of("int4").decode(quantized_weight("int4", scaled - part, LinearInputs(None)))
    result = (x * pre) @ (packed.float() + part).T
    return float((result - x @ weight.T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("name", ["modelopt-awq", "modelopt-svdquant"])
def test_the_provider_finds_what_lowers_the_error(name: str, layer: nn.Module, rows: dict[str, torch.Tensor]) -> None:
    pytest.importorskip("modelopt")
    found, ours = search(name, layer, rows), search("awq", layer, rows)
    assert set(found.pre_scales) == {"q", "k", "down"}
    assert torch.equal(found.pre_scales["q"], found.pre_scales["k"])
    for linear, reads in (("q", "q"), ("k", "q"), ("down", "down")):
        plain, theirs = error(layer, rows, SearchResult(), linear, reads), error(layer, rows, found, linear, reads)
        assert theirs < 0.9 * plain
        same = error(layer, rows, ours, linear, reads)
        # Two searches on one grid of exponents may stop at neighbours.
        assert theirs == pytest.approx(same, rel=0.1) if name == "modelopt-awq" else theirs < same


def test_a_part_of_low_rank_is_shared_by_what_reads_one_tensor(layer: nn.Module, rows: dict[str, torch.Tensor]) -> None:
    pytest.importorskip("modelopt")
    found = search("modelopt-svdquant", layer, rows, rank=8)
    (down, up), (same, other) = found.low_rank["q"], found.low_rank["k"]
    assert torch.equal(down, same) and down.shape == (8, WIDTH)
    assert (up.shape, other.shape) == ((64, 8), (32, 8))
    # It is the best of its rank: the singular vectors of both weights together, scaled.
    weight = torch.cat([layer.get_parameter(f"{n}.weight").float() / found.pre_scales[n] for n in ("q", "k")])
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(torch.cat([up, other]) @ down, (u[:, :8] * s[:8]) @ v[:8], rtol=0, atol=1e-3)


def test_schemes_within_a_budget(layer: nn.Module, rows: dict[str, torch.Tensor]) -> None:
    pytest.importorskip("modelopt")
    sizes = {name: layer.get_parameter(f"{name}.weight").numel() for name in ("q", "k", "down")}
    spent = {}
    for bits in (5.0, 7.0, 12.0):
        schemes = search("modelopt-auto", layer, rows, bits=bits).schemes
        assert schemes.keys() == sizes.keys() and schemes["q"] == schemes["k"]
        used = sum(sizes[name] * BUDGETED[scheme] for name, scheme in schemes.items())
        spent[bits] = used / sum(sizes.values())
        assert spent[bits] <= bits + 0.1
    assert spent[5.0] < spent[7.0] <= spent[12.0]
    everything = search("modelopt-auto", layer, rows, bits=16.0).schemes
    assert set(everything.values()) == {"bf16"}


def test_a_chosen_recipe_is_a_recipe(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_demo_checkpoint(tmp_path / "c", layers=3))
    schemes = {}
    for name, tensor in checkpoint.expected.items():
        if tensor.linear:
            narrow = tensor.layer == 1 or tensor.kind == "attention.qkv"
            schemes[name.removesuffix(".weight")] = "int4" if narrow else "fp8"
            if (tensor.tower, tensor.kind, tensor.layer) == ("generator", "mlp.down", 2):
                schemes[name.removesuffix(".weight")] = "bf16"
    text = recipe_text(checkpoint, schemes, "Mine", "It's so.")
    table = ScaleTable({"layers.0.self_attn.to_q.input_amax": 1.0}, {}, "0" * 64, recipe=text)
    write_scale_table(table, tmp_path / "scales")
    read_scale_table(tmp_path / "scales")
    recipe = load_recipe(str(tmp_path / "scales" / RECIPE_FILE))
    found = resolve_recipe(recipe, (), load_target("rtx-pro-6000"), layers=3, steps=8)
    assert (recipe.name, recipe.title, recipe.summary) == ("recipe", "Mine", "It's so.")
    assert found.scheme("und", "mlp.down", 0) == "fp8-w8a16" and found.scheme("und", "mlp.down", 1) == "int4"
    assert [found.scheme("gen", "mlp.down", 0, step) for step in (0, 4, 7)] == ["fp8-w8a16", "fp8", "fp8-w8a16"]
    assert [found.scheme("gen", "mlp.down", layer, 4) for layer in (1, 2)] == ["int4", "bf16"]
    assert found.scheme("gen", "attention.qkv", 2, 0) == "int4"
    (tmp_path / "bad.toml").write_text("title = 1")
    for file, code in (("bad.toml", "CX351"), ("none.toml", "CX350")):
        with pytest.raises(UserError) as caught:
            load_recipe(str(tmp_path / file))
        assert caught.value.code == code


def test_parts_of_low_rank_are_kept_in_the_table(tmp_path: Path) -> None:
    linear = "layers.0.self_attn.to_q"
    down, up = np.arange(12, dtype=np.float32).reshape(2, 6), np.ones((4, 2), np.float32)
    given = {"amax": {f"{linear}.input_amax": 1.0}, "pre_scales": {linear: np.ones(6, np.float32)}}
    write_scale_table(ScaleTable(**given, checkpoint="0" * 64, low_rank={linear: (down, up)}), tmp_path / "scales")
    found = read_scale_table(tmp_path / "scales").low_rank[linear]
    np.testing.assert_array_equal(found[0], down)
    np.testing.assert_array_equal(found[1], up)
    with pytest.raises(UserError, match="part of low rank"):
        ScaleTable(**given, checkpoint="0" * 64, low_rank={linear: (down, up[:, :1])})


@pytest.mark.parametrize(
    ("name", "settings"),
    [("magic", {}), ("awq", {"rank": 8}), ("modelopt-awq", {"bits": 5.0}), ("modelopt-svdquant", {"rank": 0}),
     ("modelopt-auto", {"bits": 4.0})],
)  # fmt: skip
def test_settings_that_there_are_not(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(UserError) as caught:
        Algorithm(name, **settings)  # type: ignore[arg-type]
    assert caught.value.code == "CX325" and caught.value.hint


def test_without_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "find_spec", lambda name: None)
    for name in ALGORITHMS:
        if name.startswith("modelopt"):
            with pytest.raises(UnsupportedError) as caught:
                Algorithm(name).search()
            assert caught.value.code == "CX326" and ".[modelopt]" in caught.value.hint
    assert Algorithm("awq").search() is not None and Algorithm().search() is None
