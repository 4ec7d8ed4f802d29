"""Quantization in the IR: where it goes, what it computes, and that what is lowered computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from quantized import SCHEMES, Tiny, sources_on_disk, uniform
from tiny_cosmos import BACKBONES, assert_close, distance

from cosmos_export.diagnostics import InternalError, UserError
from cosmos_export.evaluation.gates import linear_losses
from cosmos_export.ir import ops, packing
from cosmos_export.ir.formats import Format
from cosmos_export.ir.graph import is_weight, spec_of
from cosmos_export.ir.interpreter import read_weights
from cosmos_export.ir.ops import aten
from cosmos_export.ir.spec import Part, Transform, WeightBinding, WeightSource
from cosmos_export.ir.text import print_program
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.assign_precision import AssignPrecision, misplaced
from cosmos_export.passes.base import CannotApply
from cosmos_export.passes.insert_quantization import InsertQuantization
from cosmos_export.passes.options import Ranges
from cosmos_export.passes.pipeline import run_passes
from cosmos_export.precision import schemes
from cosmos_export.precision.sites import KINDS
from cosmos_export.progress import Silent
from cosmos_export.targets.onnx import weights as weights_module
from cosmos_export.targets.onnx.weights import layout, read_source, write_weights

FP8, INT4, NVFP4 = (schemes.SCHEMES[name].weight for name in ("fp8", "int4", "nvfp4"))
assert FP8 is not None and INT4 is not None and NVFP4 is not None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    return cache(lambda backbone: Tiny(backbone, tmp_path_factory.mktemp(backbone)))


@pytest.fixture(scope="module", params=BACKBONES)
def model(request: pytest.FixtureRequest, tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny(request.param)


@pytest.fixture(scope="module")
def omni(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("omni")


def labels(program: Any) -> dict[tuple[str, ...], Any]:
    return {
        node.meta["weight"].keys: node.meta["precision"]
        for graph in program.graphs.values()
        for node in graph.weights.values()
        if "precision" in node.meta
    }


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_fp8_rounds_as_ml_dtypes() -> None:
    x = torch.randn(4096) * torch.logspace(-4, 3, 4096)
    theirs = x.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    ours = packing.to_fp8(x, torch.tensor(1.0)).view(torch.uint8).numpy()
    assert np.array_equal(ours, theirs.view(np.uint8))


def test_e2m1_rounds_as_ml_dtypes_and_packs_low_nibble_first() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat([torch.randn(505) * 3, ties, -ties, torch.tensor([0.0, -0.0, 7.0, -9.0, 6.0])]).reshape(2, -1)
    theirs = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn)
    values = packing.round_e2m1(x)
    assert np.array_equal(values.numpy(), theirs.astype(np.float32))
    codes = packing.e2m1_codes(values)
    assert np.array_equal(codes.numpy(), theirs.view(np.uint8))
    packed = packing.nibbles(codes)
    assert torch.equal(packed & 15, codes[:, 0::2]) and torch.equal(packed >> 4, codes[:, 1::2])


def test_int4_is_symmetric_in_groups_and_zero_groups_stay_zero() -> None:
    rows = torch.randn(3, 256)
    rows[1, :128] = 0
    scale = packing.int4_scale(rows, 128, torch.float32)
    values = packing.to_int4(rows, scale, 128)
    assert values[1, :128].abs().max() == 0 and scale[1, 0] == 1
    assert values[0].abs().max() == 7
    back = ops.DEQUANTIZE_GROUPS(values, scale)
    assert distance(back, rows) < 0.13


@pytest.mark.parametrize(("format", "limit"), [(FP8, 0.0265), (INT4, 0.117), (NVFP4, 0.095)])
def test_errors_of_gaussian_weights(omni: Tiny, tmp_path: Path, format: Format, limit: float) -> None:
    """The published table's weight-only errors, within 5 %."""
    torch.manual_seed(0)
    w = torch.randn(512, 1024)
    source = sources_on_disk(tmp_path / "w.safetensors", {"w": w})["w"]
    binding = WeightBinding((source,), Transform.IDENTITY, torch.float32)
    value = read_weights(read_source)
    parts = {part: value(binding.packed(format, part, group=128)) for part in (Part.VALUES, Part.SCALE)}
    if format is NVFP4:
        parts[Part.BLOCK_SCALE] = value(binding.packed(format, Part.BLOCK_SCALE))
    back = {
        FP8: lambda v, s, b: ops.DEQUANTIZE(v, s, torch.float32),
        INT4: lambda v, s, b: ops.DEQUANTIZE_GROUPS(v, s),
        NVFP4: lambda v, s, b: ops.DEQUANTIZE_BLOCKS(v, b, s, torch.float32),
    }[format](parts[Part.VALUES], parts[Part.SCALE], parts.get(Part.BLOCK_SCALE))
    assert distance(back, w) == pytest.approx(limit, rel=0.05)


# -- where it goes ----------------------------------------------------------------------------------------------------


def test_sites_follow_from_dataflow(model: Tiny) -> None:
    program = model.assigned(uniform("fp8"))
    found = labels(program)
    edge, layers = model.backbone == "edge", 2
    for keys, precision in found.items():
        # The reader's own rule: `to_*` and `mlp.` are the reasoner's, `add_*` and `mlp_moe_gen.` the generator's.
        reasoner = any(part in keys[0] for part in ("to_q", "to_k", "to_v", "to_out", ".mlp."))
        assert precision.tower == ("und" if reasoner else "gen"), keys
        assert f"layers.{precision.layer}." in keys[0]
    kinds = [(p.tower, p.kind) for p in found.values()]
    assert {kind for _, kind in kinds} == set(KINDS) - {"attention.core", "attention.kv"}
    assert all(kinds.count(("gen", kind)) == layers for kind in ("attention.out", "mlp.gate_up", "mlp.down"))
    by_kind = {(p.tower, p.kind, p.layer): keys for keys, p in found.items()}
    assert len(by_kind["gen", "attention.qkv", 0]) == 3
    assert len(by_kind["gen", "mlp.gate_up", 0]) == (1 if edge else 2)
    heads = [k for g in program.graphs.values() for n in g.weights.values() for k in n.meta["weight"].keys]
    assert "proj_in.weight" in heads and not any("proj_" in key for keys in found for key in keys)


def test_sites_do_not_follow_from_names(omni: Tiny) -> None:
    program = omni.program.copy()
    for graph in program.graphs.values():
        for i, node in enumerate(graph.weights.values()):
            binding = node.meta["weight"]
            node.meta["weight"] = replace(
                binding, sources=tuple(replace(s, key=f"{i}.{j}") for j, s in enumerate(binding.sources))
            )
        for node in graph.nodes:
            node.meta["module"] = ""
    AssignPrecision(uniform("fp8")).run(program)
    assert list(labels(program).values()) == list(labels(omni.assigned(uniform("fp8"))).values())


def test_a_linear_of_two_kinds_is_refused(omni: Tiny) -> None:
    """Attention's output projection whose result an activation reads, too: one weight, two kinds."""
    program = omni.program.copy()
    graph = program.graphs[program.loop.body]
    out = next(n for n in graph.calls(aten.linear.default) if "to_add_out" in n.args[1].meta["weight"].keys[0])
    relu = graph.call(aten.relu.default, out, before=out.next)
    graph.set_outputs({**graph.outputs, "more": relu})
    with pytest.raises(CannotApply, match=r"attention\.out and mlp\.gate_up at once"):
        AssignPrecision(uniform("fp8")).run(program)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_running_twice_changes_nothing(model: Tiny, scheme: str) -> None:
    program = model.quantized(scheme)
    before = print_program(program)
    assert not InsertQuantization(model.ranges).run(program).modified
    assert not AssignPrecision(uniform(scheme)).run(program).modified
    assert print_program(program) == before


def test_the_identity_recipe_changes_nothing(model: Tiny) -> None:
    labelled, quantized = (print_program(p) for p in (model.assigned(uniform("bf16")), model.quantized("bf16")))
    assert quantized.partition("\n")[2] == labelled.partition("\n")[2]  # the first line names the last pass


def test_one_quantizer_for_each_value(model: Tiny) -> None:
    """Unmerged, three linears read one norm; their ranges are joined."""
    graph = model.quantized("fp8").graphs["generator"]
    quantizers = graph.calls(ops.QUANTIZE)
    assert len({n.args[0] for n in quantizers}) == len(quantizers) == 8
    linears = [n for n in graph.calls(aten.linear.default) if not is_weight(n.args[1])]
    assert len(linears) == 8 and all(spec_of(n.args[0]).dtype is torch.bfloat16 for n in linears)


def test_a_range_that_is_missing_is_named(omni: Tiny) -> None:
    amax = dict(omni.ranges.amax)
    gone = next(key for key in amax if "mlp_moe_gen.down_proj" in key)
    del amax[gone]
    with pytest.raises(UserError) as caught:
        omni.quantized("fp8", Ranges(amax))
    assert caught.value.code == "CX312" and gone in caught.value.message
    omni.quantized("fp8-w8a16", Ranges())  # needs none


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_onnx_runtime_computes_the_fake_quantized_program(model: Tiny, scheme: str) -> None:
    """Gate G0, allowed 1e-3: measured below 1e-6."""
    program = model.quantized(scheme)
    assert_close(model.run_onnx(program), model.run(program), 1e-5, scheme)


def test_schemes_rank_as_they_should(model: Tiny) -> None:
    exact = model.run(model.program)
    found = {scheme: model.run(model.quantized(scheme)) for scheme in SCHEMES}
    worst = {s: max(distance(v, exact[k]) for k, v in r.items() if v.numel()) for s, r in found.items()}
    assert 0 < worst["fp8-w8a16"] < 0.08 and worst["fp8"] < 0.1 and worst["int4"] < 0.35 and worst["nvfp4"] < 0.35
    assert worst["fp8"] < min(worst["int4"], worst["nvfp4"])


def test_steps_choose_among_schemes_that_share_weights(omni: Tiny) -> None:
    def over_steps(tower: str, kind: str, layer: int) -> tuple[str, ...]:
        if kind == "attention.core":
            return ("bf16",)
        return ("fp8-w8a16", "fp8", "fp8-w8a16") if tower == "gen" else ("fp8-w8a16",)

    assigned = omni.assigned(over_steps)
    programs = []
    for step in range(3):
        program = assigned.copy()
        InsertQuantization(omni.ranges, step).run(program)
        programs.append(program)
    stored = [{n.meta["weight"] for g in p.graphs.values() for n in g.weights.values()} for p in programs]
    assert stored[0] == stored[1] == stored[2]
    counts = [len(p.graphs["generator"].calls(ops.QUANTIZE)) for p in programs]
    assert counts == [0, 8, 0]


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [16 << 20, 300], ids=["one chunk", "a row at a time"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_holds_what_the_interpreter_computes(
    omni: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, chunk: int
) -> None:
    monkeypatch.setattr(weights_module, "_CHUNK_BYTES", chunk)
    program = omni.quantized(scheme)
    stored = layout(n.meta["weight"] for g in program.graphs.values() for n in g.weights.values())
    path = tmp_path / "weights.bin"
    write_weights(path, stored, "weights", Silent())
    data = path.read_bytes()
    for binding, place in stored.items():
        raw, value = data[place.offset : place.offset + place.size_bytes], omni.weights(binding)
        if binding.dtype is torch.int4:
            value = packing.nibbles(value)
        elif binding.dtype is torch.float4_e2m1fn_x2:
            value = packing.nibbles(packing.e2m1_codes(value))
        assert raw == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), str(binding)


def _fp8(folder: Path, name: str, *weights: torch.Tensor) -> list[WeightSource]:
    """Weights as a published FP8 checkpoint stores them."""
    tensors = {}
    for i, w in enumerate(weights):
        scale = w.abs().amax() / 448
        tensors |= {f"{i}.weight": (w / scale).to(torch.float8_e4m3fn), f"{i}.weight_scale": scale}
    found = sources_on_disk(folder / name, tensors)
    return [replace(found[f"{i}.weight"], scale=found[f"{i}.weight_scale"]) for i in range(len(weights))]


def test_a_weight_that_is_fp8_already_keeps_its_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    value = read_weights(read_source)
    (source,) = _fp8(tmp_path, "one", torch.randn(64, 64) * 0.05)
    binding = WeightBinding((source,), Transform.IDENTITY, torch.bfloat16)
    values, scale = (binding.packed(FP8, part) for part in (Part.VALUES, Part.SCALE))
    assert torch.equal(value(values).view(torch.uint8), read_source(source).view(torch.uint8))
    assert source.scale is not None and torch.equal(value(scale), read_source(source.scale))
    wide = read_source(source).float() * read_source(source.scale)
    assert torch.equal(value(binding), wide.bfloat16())
    stored = layout([values, scale, binding])
    write_weights(tmp_path / "out", stored, "weights", Silent())
    data = (tmp_path / "out").read_bytes()
    assert data[: 64 * 64] == read_source(source).view(torch.uint8).numpy().tobytes()
    place = stored[binding]
    assert data[place.offset : place.offset + place.size_bytes] == wide.bfloat16().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("transform", [Transform.CONCATENATE, Transform.INTERLEAVE])
def test_fp8_weights_that_are_merged_keep_their_bytes_and_scales(tmp_path: Path, transform: Transform) -> None:
    torch.manual_seed(0)
    value = read_weights(read_source)
    parts = [torch.randn(32, 64) * s for s in (0.1, 0.02, 0.05)]
    first, *rest = (WeightBinding((s,), Transform.IDENTITY, torch.bfloat16) for s in _fp8(tmp_path, "three", *parts))
    merged = first.merged(tuple(rest), transform)
    values, scale = (merged.packed(FP8, part) for part in (Part.VALUES, Part.SCALE))
    assert scale.shape == (96,)
    back = ops.DEQUANTIZE(value(values), value(scale), torch.float32)
    once = [read_source(s).float() * read_source(s.scale) for s in merged.sources if s.scale is not None]
    together = transform is Transform.INTERLEAVE
    assert torch.equal(back, torch.stack(once, dim=1).flatten(0, 1) if together else torch.cat(once))
    stored = layout([values, scale])
    write_weights(tmp_path / "out", stored, "weights", Silent())
    data = (tmp_path / "out").read_bytes()
    for binding, place in stored.items():
        written = data[place.offset : place.offset + place.size_bytes]
        assert written == value(binding).contiguous().view(torch.uint8).numpy().tobytes()


# -- pre-scales -------------------------------------------------------------------------------------------------------


def _with_pre_scales(omni: Tiny, folder: Path, shared: bool = True) -> Ranges:
    """A pre-scale for every linear of the generator's layers: one for each value that is read, or one a linear."""
    torch.manual_seed(1)
    program = omni.assigned(uniform("int4"))
    tensors, names = {}, {}
    for keys, precision in labels(program).items():
        for i, key in enumerate(keys):
            linear = key.removesuffix(".weight")
            group = f"{precision.tower}.{precision.kind}.{precision.layer}" + ("" if shared else f".{i}")
            width = omni.sources[key].shape[1]
            tensors.setdefault(group, torch.rand(width) + 0.5)
            names[linear] = group
    sources = sources_on_disk(folder / "scales.safetensors", tensors)
    return Ranges({}, {linear: sources[group] for linear, group in names.items()})


def test_pre_scales_go_into_the_norm_before(omni: Tiny, tmp_path: Path) -> None:
    ranges = _with_pre_scales(omni, tmp_path)
    program = omni.assigned(uniform("int4"))
    result = InsertQuantization(ranges).run(program)
    assert result.changes["pre-scales in norms"] == 7 and result.changes["pre-scales multiplied"] == 6
    exact, plain = omni.run(omni.program), omni.run(omni.quantized("int4"))
    scaled = omni.run(program)
    for name, value in scaled.items():
        if value.numel():
            assert distance(value, exact[name]) < 1.5 * distance(plain[name], exact[name])
    assert_close(omni.run_onnx(program), scaled, 1e-5)


def _with_low_rank(omni: Tiny, folder: Path, rank: int = 8) -> Ranges:
    """The largest singular vectors of every scaled weight; linears that read one value share the right ones."""
    ranges = _with_pre_scales(omni, folder)
    groups: dict[str, list[str]] = {}
    for linear, source in ranges.pre_scales.items():
        groups.setdefault(source.key, []).append(linear)
    tensors = {}
    for group, linears in groups.items():
        factors = read_source(ranges.pre_scales[linears[0]])
        weights = [read_source(omni.sources[f"{linear}.weight"]).float() / factors for linear in linears]
        u, s, v = torch.linalg.svd(torch.cat(weights), full_matrices=False)
        tensors[f"{group}.down"] = v[:rank].contiguous()
        parts = (u[:, :rank] * s[:rank]).split([len(weight) for weight in weights])
        tensors |= {f"{linear}.up": part.contiguous() for linear, part in zip(linears, parts, strict=True)}
    sources = sources_on_disk(folder / "low_rank.safetensors", tensors)
    low_rank = {n: (sources[f"{s.key}.down"], sources[f"{n}.up"]) for n, s in ranges.pre_scales.items()}
    return Ranges({}, ranges.pre_scales, low_rank)


def test_a_part_of_low_rank_is_multiplied_beside_the_product(omni: Tiny, tmp_path: Path) -> None:
    ranges = _with_low_rank(omni, tmp_path)
    program = omni.assigned(uniform("int4"))
    result = InsertQuantization(ranges).run(program)
    verify(program, stage="low rank")
    assert result.changes["parts of low rank"] == result.changes["int4 linears"]
    assert_close(omni.run_onnx(program), omni.run(program), 1e-5)
    plain, scaled = omni.assigned(uniform("int4")), omni.quantized("int4", replace(ranges, low_rank={}))
    losses, without = (linear_losses(plain, {0: one}, [omni.wide], omni.weights) for one in (program, scaled))
    assert len(losses) == len(without)
    assert sum(a.relative for a in losses) < 0.95 * sum(b.relative for b in without)


@pytest.mark.parametrize("found", [_with_pre_scales, _with_low_rank])
def test_what_was_searched_cancels_where_nothing_is_rounded(
    omni: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Callable[[Tiny, Path], Ranges]
) -> None:
    """(x · s) · (W / s − U·D)ᵀ + (x · s · Dᵀ) · Uᵀ = x · Wᵀ, up to a rounding of the norm's weight times s to bf16."""
    program = omni.assigned(uniform("int4"))
    InsertQuantization(found(omni, tmp_path)).run(program)
    ones = lambda rows, group, dtype: torch.ones(rows.shape[0], rows.shape[1] // group)  # noqa: E731
    monkeypatch.setattr(packing, "int4_scale", ones)
    monkeypatch.setattr(packing, "to_int4", lambda rows, scale, group: rows)
    assert_close(omni.run(program), omni.run(omni.program), 5e-3)


def test_merged_linears_have_one_part_of_low_rank(omni: Tiny, tmp_path: Path) -> None:
    ranges = _with_low_rank(omni, tmp_path)
    some = next(linear for linear in ranges.low_rank if linear.endswith("add_k_proj"))
    lacking = {linear: part for linear, part in ranges.low_rank.items() if linear != some}
    with pytest.raises(UserError) as caught:
        InsertQuantization(replace(ranges, low_rank=lacking)).run(omni.assigned(uniform("int4")))
    assert caught.value.code == "CX355" and "parts of low rank" in caught.value.message


def test_linears_that_read_one_value_have_one_pre_scale(omni: Tiny, tmp_path: Path) -> None:
    program = omni.assigned(uniform("int4"))
    with pytest.raises(UserError) as caught:
        InsertQuantization(_with_pre_scales(omni, tmp_path, shared=False)).run(program)
    assert caught.value.code == "CX355" and "different pre-scales" in caught.value.message


def test_widths_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    from cosmos_export.passes.insert_quantization import _require_width

    binding = WeightBinding(
        (WeightSource("w", tmp_path, 0, torch.bfloat16, (8, 40)),), Transform.IDENTITY, torch.bfloat16
    )
    from cosmos_export.ir.graph import Graph
    from cosmos_export.ir.spec import TensorSpec
    from cosmos_export.passes.assign_precision import Precision

    graph = Graph("g")
    weight = graph.add_weight("w", binding)
    weight.meta["precision"] = Precision("gen", "mlp.down", 3, ("nvfp4",))
    linear = graph.call(aten.linear.default, graph.add_input("x", TensorSpec(torch.bfloat16, (5, 40))), weight)
    with pytest.raises(UserError) as caught:
        _require_width(linear, 16)
    assert caught.value.code == "CX355" and "gen.mlp.down[3] has rows of 40" in caught.value.message
    assert _require_width(linear, 16, 8) == 8


def test_the_reader_and_dataflow_agree_on_towers(omni: Tiny) -> None:
    """Two independent accounts of which tower a tensor belongs to."""
    program = omni.assigned(uniform("fp8"))
    reasoner = (".to_q", ".to_k", ".to_v", ".to_out", ".mlp.")
    towers = {key: "gen" for keys in labels(program) for key in keys}
    towers |= {key: "und" for key in towers if any(part in key for part in reasoner)}
    run_passes(omni.program.copy(), [AssignPrecision(uniform("fp8"), towers)])
    swapped = {key: "und" if tower == "gen" else "gen" for key, tower in towers.items()}
    assert len(misplaced(program, swapped)) == len(labels(program))
    with pytest.raises(InternalError, match="CX360: sites are given to the wrong tower"):
        run_passes(omni.program.copy(), [AssignPrecision(uniform("fp8"), swapped)])
