"""The capture: each helper that the adapter replaces equals the stock one; modalities; the real geometries."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import Cosmos3OmniTransformer
from tiny_cosmos import (
    Case,
    assert_close,
    published_config,
    random_model,
    request,
    sources_of_model,
    stock_forward,
    tiny_config,
    weights_of_model,
)

from cosmos_export.capture import adapter, export
from cosmos_export.capture.export import exported
from cosmos_export.capture.model import (
    available_modalities,
    build_empty_model,
    capture,
    compute_dtypes,
    input_dtype,
    program_dims,
)
from cosmos_export.diagnostics import CosmosExportError, InternalError, UserError
from cosmos_export.ir.interpreter import run_program
from cosmos_export.ir.spec import Rate
from cosmos_export.ir.verifier import verify
from cosmos_export.machine.packages import other_releases, pins
from cosmos_export.passes.pipeline import default_passes, run_passes

CONFIG = tiny_config("omni")
MASKS = [[1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 1.0], [0.0] * 5]
GRIDS = [(4, 6), (5, 6), (4, 7), (5, 7)]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(CONFIG)


def noisy(mask: list[float]) -> torch.Tensor:
    return torch.tensor(mask).nonzero().flatten()


def masked(mask: list[float]) -> adapter.RowMask:
    return adapter.RowMask(torch.tensor(mask))


def patchify(model: Any, grid: tuple[int, int], mask: list[float]) -> tuple[Any, Any]:
    latent = torch.randn(1, 4, 5, *grid)
    return adapter._patchify(model, [latent]), Cosmos3OmniTransformer._patchify_and_pack_latents(model, [latent])


def add_time(model: Any, grid: tuple[int, int], mask: list[float]) -> tuple[Any, Any]:
    shape = (5, *((s + 1) // 2 for s in grid))
    cells = shape[1] * shape[2]
    tokens, row = torch.randn(5 * cells, 64), torch.randn(1, 64)
    ours = adapter._add_time_to_noisy_rows(model, tokens, row, [masked(mask)], [shape])
    stock = Cosmos3OmniTransformer._apply_timestep_embeds_to_noisy_tokens(
        model, tokens, row.expand(int(sum(mask)) * cells, 64), [noisy(mask)], [shape]
    )
    return ours, stock


def unpatchify(model: Any, grid: tuple[int, int], mask: list[float]) -> tuple[Any, Any]:
    """The stock helper gets the noisy rows only; ours all rows and the mask."""
    shape = (5, *((s + 1) // 2 for s in grid))
    rows = torch.randn(5, shape[1] * shape[2], 16)
    ours = adapter._unpatchify(model, rows.flatten(0, 1), [shape], [masked(mask)], [(5, *grid)])
    stock = Cosmos3OmniTransformer._unpatchify_and_unpack_latents(
        model, rows[noisy(mask)].flatten(0, 1), [shape], [noisy(mask)], [(5, *grid)]
    )
    return ours[0] + 0.0, stock[0]


def unpack_sound(model: Any, grid: tuple[int, int], mask: list[float]) -> tuple[Any, Any]:
    rows = torch.randn(5, 8)
    every = torch.arange(5)
    ours = adapter._unpack_sound(model, rows, [(5, 1, 1)], [masked([1.0] * 5)])
    return ours, Cosmos3OmniTransformer._unpack_sound_latents(model, rows, [(5, 1, 1)], [every])


def pack_action(model: Any, grid: tuple[int, int], mask: list[float]) -> tuple[Any, Any]:
    rows, domain = torch.randn(5, 10), torch.tensor([3])
    ours_rows, ours_ids = adapter._pack_action(model, [rows], [(5, 1, 1)], [domain])
    stock_rows, stock_ids = Cosmos3OmniTransformer._pack_action_latents(model, [rows], [(5, 1, 1)], [domain])
    return (ours_rows, ours_ids.expand(5)), (stock_rows, stock_ids)


def unpack_action(model: Any, grid: tuple[int, int], mask: list[float]) -> tuple[Any, Any]:
    rows = torch.randn(5, 10)
    ours = adapter._unpack_action(model, rows, [(5, 1, 1)], [masked(mask)])
    stock = Cosmos3OmniTransformer._unpack_action_latents(model, rows[noisy(mask)], [(5, 1, 1)], [noisy(mask)])
    return ours[0] + 0.0, stock[0]


def domain_linear(model: Any, grid: tuple[int, int], mask: list[float]) -> tuple[Any, Any]:
    head, rows, domain = model.action_proj_in, torch.randn(5, 10), torch.tensor([7])
    ours = adapter._domain_linear(head, rows, domain)
    stock = type(head).forward(head, rows, domain.expand(5))
    return ours, stock


REPLACEMENTS: dict[str, tuple[Callable[..., Any], float]] = {
    "_patchify_and_pack_latents": (patchify, 0.0),
    "_apply_timestep_embeds_to_noisy_tokens": (add_time, 0.0),
    "_unpatchify_and_unpack_latents": (unpatchify, 0.0),
    "_unpack_sound_latents": (unpack_sound, 0.0),
    "_pack_action_latents": (pack_action, 0.0),
    "_unpack_action_latents": (unpack_action, 0.0),
    "DomainAwareLinear.forward": (domain_linear, 1e-6),  # one product of five rows against five of one
}


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_replaced_helper_equals_the_stock_one(model: Any, name: str, grid: tuple[int, int], mask: Any) -> None:
    torch.manual_seed(0)
    compare, tolerance = REPLACEMENTS[name]
    with torch.no_grad():
        ours, stock = compare(model, grid, mask)
    if name == "_patchify_and_pack_latents":
        (ours, grids), (stock, stock_grids) = ours, stock
        assert grids == stock_grids
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)


def test_only_these_helpers_are_replaced() -> None:
    """On the instance: the class stays as published, and every replacement is in the table above."""
    published = dict(vars(Cosmos3OmniTransformer))
    model = build_empty_model(CONFIG)
    before = set(vars(model))
    adapter.JointStep(model)
    replaced = set(vars(model)) - before
    heads = {name for name in ("action_proj_in", "action_proj_out") if "forward" in vars(getattr(model, name))}
    assert replaced | {"DomainAwareLinear.forward"} == set(REPLACEMENTS)
    assert heads == {"action_proj_in", "action_proj_out"}
    assert dict(vars(Cosmos3OmniTransformer)) == published


# -- modalities -------------------------------------------------------------------------------------------------------


def test_modalities_follow_from_the_config() -> None:
    assert available_modalities(CONFIG) == ("vision", "sound", "action")
    assert available_modalities(tiny_config("edge")) == ("vision", "action")
    assert available_modalities({}) == ("vision",)


@pytest.mark.parametrize(("asked", "message"), [
    (["vision", "smell"], "modalities ['smell', 'vision'] asked for; this checkpoint generates vision, action"),
    (["vision", "sound"], "modalities ['sound', 'vision'] asked for; this checkpoint generates vision, action"),
    (["action"], "modalities ['action'] asked for; this checkpoint generates vision, action"),
    ([], "modalities [] asked for; this checkpoint generates vision, action"),
])  # fmt: skip
def test_a_modality_the_checkpoint_lacks_is_refused(asked: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        capture(tiny_config("edge"), {}, modalities=asked)
    assert (refused.value.code, refused.value.message) == ("CX210", message)


def test_vision_and_action_without_sound(model: Any) -> None:
    """Also what a checkpoint with no action head gives, but for its inputs."""
    program = capture(CONFIG, sources_of_model(model), modalities=["action", "vision"])
    assert set(program.loop.carried) == {"vision_latent", "action_latent"}
    assert "sound_len" not in program.dims
    assert {k for k in program.unused_keys if k.startswith("audio")} == {
        "audio_proj_in.weight", "audio_proj_in.bias", "audio_proj_out.weight", "audio_proj_out.bias",
        "audio_modality_embed",
    }  # fmt: skip
    run_passes(program, default_passes())
    inputs = request(CONFIG, Case("policy", 3, 5, 4, 9, clean=(0,), actions=4))
    assert_close(run_program(program, inputs, weights_of_model(model)), stock_forward(model, inputs), 1e-5)


def test_a_config_without_sound_or_action() -> None:
    config = tiny_config("omni", layers=1, sound_gen=False, sound_dim=None, action_gen=False, action_dim=None)
    model = random_model(config)
    program = capture(config, sources_of_model(model))
    assert program.loop.carried == {"vision_latent": "vision_velocity"}
    run_passes(program, default_passes())
    inputs = request(config, Case("i2v", 3, 5, 4, 9, clean=(0,)))
    assert_close(run_program(program, inputs, weights_of_model(model)), stock_forward(model, inputs), 1e-5)


# -- contracts --------------------------------------------------------------------------------------------------------


def test_inputs_have_types_rates_and_dims(compiled: Any) -> None:
    program = compiled.captured
    assert {r for n, r in program.rates.items() if n.endswith("_latent")} == {Rate.CARRIED}
    assert program.rates["input_ids"] is Rate.PROMPT and program.rates["timestep"] is Rate.STEP
    assert list(program.dims) == list(program_dims(compiled.config, available_modalities(compiled.config)))
    assert all(dim.meaning and dim.min <= dim.max for dim in program.dims.values())
    assert input_dtype("input_ids", torch.bfloat16) is torch.int64
    assert input_dtype("frame_positions", torch.bfloat16) is torch.float32
    assert input_dtype("vision_mask", torch.bfloat16) is torch.bfloat16
    assert set(program.loop.carried.values()) == set(program.graphs["joint"].outputs)


def test_a_source_that_is_missing_is_named(model: Any) -> None:
    sources = sources_of_model(model)
    del sources["layers.1.self_attn.to_q.weight"]
    with pytest.raises(InternalError, match=r"no source for 1 parameters, first `layers\.1\.self_attn\.to_q\.weight`"):
        capture(CONFIG, sources)


def test_the_time_embedder_computes_in_fp32() -> None:
    model = build_empty_model(CONFIG)
    stored = {n: torch.bfloat16 for n, _ in model.named_parameters()}
    dtypes = compute_dtypes(model, stored)
    assert {n for n, d in dtypes.items() if d is torch.float32} == {n for n in stored if "time_embedder" in n}


def test_another_release_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's own error is no bug of this project there; with the releases that capture is made for it is."""

    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(Exception, match="data-dependent") as own:
        exported(Branch(), {"x": torch.ones(3)}, {"x": {}})
    assert not isinstance(own.value, CosmosExportError)
    monkeypatch.setattr(export, "other_releases", lambda extra: ["torch 2.11.0 (2.13.0)"])
    with pytest.raises(CosmosExportError, match=r"captured with torch 2\.11\.0 \(2\.13\.0\)") as found:
        exported(Branch(), {"x": torch.ones(3)}, {"x": {}})
    assert found.value.code == "CX206" and "[compile]" in found.value.hint


def test_releases_are_those_of_the_extra() -> None:
    pinned = pins("compile")
    assert pinned["torch"].startswith("2.") and {"diffusers", "transformers"} <= set(pinned) and "onnx" not in pinned
    exact = {**pinned, "torch": f"{pinned['torch']}+cpu", "onnx": "0.1"}
    assert other_releases("compile", exact) == [] == other_releases("compile", {})
    assert other_releases("compile", {**exact, "diffusers": "0.1"}) == [f"diffusers 0.1 ({pinned['diffusers']})"]
    assert pins("none") == {}


def test_operations_keep_the_module_they_come_from(omni: Any) -> None:
    modules = {n.meta["module"] for n in omni.captured.graphs["joint"].calls()}
    for module in ("layers.0.self_attn.to_q", "layers.1.mlp_moe_gen", "norm_moe_gen", "proj_in", ""):
        assert module in modules


def test_an_operation_outside_the_dialect_is_named() -> None:
    """The importer says which operation of which module it cannot take."""
    from cosmos_export.capture.importer import Importer

    class Sorts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": x.cummax(0).values}

    exported = torch.export.export(Sorts(), (torch.randn(4),))
    with pytest.raises(InternalError) as refused:
        Importer(exported, "g", {"x": (4,)}, {}, {}).run()
    assert refused.value.code.startswith("CX20")


# -- real geometries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nano", "super", "edge"])
def test_the_real_heads_in_bf16_without_weights(name: str) -> None:
    """One layer, real widths and vocabulary, from shapes alone. q and k norms stay whole, the time embedder in fp32."""
    config = published_config(name, vocab_size=131072 if name == "edge" else 151936, num_embodiment_domains=32)
    program = capture(config, sources_of_model(build_empty_model(config), torch.bfloat16))
    reports = run_passes(program, default_passes())
    verify(program, stage="everything")
    assert not any(r.result.declined for r in reports)
    generator, reasoner = program.graphs["generator"], program.graphs["reasoner"]
    key = reasoner.outputs["key_0"].meta["spec"]
    assert (key.dtype, key.shape[1:]) == (torch.bfloat16, (8, 128))
    assert {str(n.meta["spec"].dtype) for n in generator.outputs.values()} == {"torch.bfloat16"}
    schedule = program.graphs["schedule"]
    assert all(n.meta["weight"].dtype is torch.float32 for n in schedule.weights.values())
    assert all(n.meta["weight"].sources[0].dtype is torch.bfloat16 for n in schedule.weights.values())
    assert SimpleNamespace(**config).num_attention_heads % 8 == 0
