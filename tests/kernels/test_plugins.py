"""Kernels in the form TensorRT launches: the same results as by their own launch, and PTX with nothing else in it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from kernel_device import DEVICE

from cosmos_export.diagnostics import ToolError
from cosmos_export.kernels import activation_quantize as act
from cosmos_export.kernels import joint_attention as attention
from cosmos_export.kernels import norm_quantize as norm
from cosmos_export.kernels import plugins
from cosmos_export.kernels import qkv_pack as pack
from cosmos_export.kernels import sampler_step as sampler
from cosmos_export.kernels.description import CAPABILITIES, evaluate
from cosmos_export.kernels.launch import FP8, quantize
from cosmos_export.targets.trt.plugins import read_document

BF16 = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def made(kernel: str, inputs: Sequence[torch.Tensor], **settings: object) -> list[torch.Tensor]:
    return plugins.run(plugins.FORMS[kernel](90, **settings), inputs)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found.float(), wanted.float())


@pytest.mark.parametrize(("rows", "prefix"), [(7, 5), (130, 0), (129, 140)])
def test_joint_attention(rows: int, prefix: int) -> None:
    query = random(rows, 4, 16)
    key, value, prefix_key, prefix_value = (
        random(n, 2, 16, seed=seed) for n, seed in ((rows, 1), (rows, 2), (prefix, 3), (prefix, 4))
    )
    operands = (query, key, value, prefix_key, prefix_value)
    (found,) = made("joint_attention", operands, kind="bf16", heads=4, kv_heads=2, size=16, scale=0.25, narrow=False)
    assert same(found, attention.joint_attention(*operands, 0.25))


def test_joint_attention_in_fp8() -> None:
    """Values lie transposed, in rows that end with what is never read."""
    steps = [torch.tensor(s, device=DEVICE) for s in (0.01, 0.02, 0.03)]
    query, key, value = (quantize(random(rows, heads, 16, seed=rows), s) for rows, heads, s in (
        (37, 4, steps[0]), (37, 2, steps[1]), (37, 2, steps[2])
    ))  # fmt: skip
    prefix_key, prefix_value = (quantize(random(9, 2, 16, seed=8), s) for s in steps[1:])

    def transposed(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((x.shape[1], x.shape[2], -(-x.shape[0] // 16) * 16), 7.0, device=x.device)
        wide[:, :, : x.shape[0]] = x.float().permute(1, 2, 0)
        return wide.to(FP8)

    scales = [s.expand(n).contiguous() for s, n in zip(steps, (4, 2, 2), strict=True)]
    operands = (query, key, transposed(value), prefix_key, transposed(prefix_value), *scales)
    (found,) = made("joint_attention", operands, kind="bf16", heads=4, kv_heads=2, size=16, scale=1.0, narrow=True)
    wanted = attention.joint_attention(
        query, key, value, prefix_key, prefix_value, 1.0, scales=(scales[0], scales[1], scales[2])
    )
    assert same(found, wanted)


@pytest.mark.parametrize("weight", [BF16, torch.float32])
def test_norm_quantize(weight: torch.dtype) -> None:
    x, delta, scale = random(5, 48), random(5, 48, seed=1), torch.tensor(0.02, device=DEVICE)
    w = random(48, dtype=weight, seed=2)
    form = {"kind": "bf16", "weight": "bf16" if weight is BF16 else "fp32", "width": 48, "eps": 1e-6}
    (found,) = made("norm_quantize", (x, w, scale), add=False, **form)
    assert same(found, norm.norm_quantize(x, w, 1e-6, scale)[0])
    found, total = made("norm_quantize", (x, delta, w, scale), add=True, **form)
    wanted = torch.empty_like(x)
    assert same(found, norm.norm_quantize(x, w, 1e-6, scale, delta=delta, total=wanted)[0]) and same(total, wanted)


def test_activation_quantize() -> None:
    scale = torch.tensor(0.02, device=DEVICE)
    merged = random(5, 96)
    halves = {"kind": "bf16", "width": 48, "stride": 96}
    (found,) = made(
        "activation_quantize", (merged, merged, scale), step=1, offset=0, up_offset=48, gated=True, **halves
    )
    assert same(found, act.activation_quantize(merged[:, :48], merged[:, 48:], scale)[0])
    (found,) = made("activation_quantize", (merged, merged, scale), step=2, offset=0, up_offset=1, gated=True, **halves)
    assert same(found, act.activation_quantize(merged[:, ::2], merged[:, 1::2], scale)[0])
    plain = {"kind": "bf16", "width": 96, "stride": 96}
    (found,) = made("activation_quantize", (merged, merged, scale), step=1, offset=0, up_offset=0, gated=False, **plain)
    assert same(found, act.activation_quantize(merged, None, scale)[0])


def test_qkv_pack() -> None:
    merged, w_q, w_k = random(6, 8 * 16), random(16, seed=1), random(16, seed=2)
    cos, sin = random(3, 8, seed=3), random(3, 8, seed=4)
    found = made(
        "qkv_pack", (merged, w_q, w_k, cos, sin), kind="bf16", weight="bf16", table="bf16", stride=128, heads=4,
        kv_heads=2, size=16, eps=1e-6,
    )  # fmt: skip
    query, key, value = merged.split((64, 32, 32), dim=1)
    wanted = pack.qkv_pack(query, key, value, w_q, w_k, cos, sin, 1e-6)
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("guided", "axes"), [(True, (2,)), (False, ()), (True, (0, 1))])
def test_unipc_step(guided: bool, axes: tuple[int, ...]) -> None:
    row = random(10, dtype=torch.float32)
    cond, uncond = random(4, 3, 5, seed=1), random(4, 3, 5, seed=2)
    state = [random(4, 3, 5, dtype=torch.float32, seed=seed) for seed in (3, 4, 5, 6)]
    masks = [(random(cond.shape[axis], seed=7) > 0).to(BF16) for axis in axes]
    operands = [row, cond, uncond if guided else cond, *state, *masks, *[row] * (2 - len(masks))]
    found = made("unipc_step", operands, kind="bf16", masks=("bf16",) * len(axes), rank=3, axes=axes, guided=guided)
    wanted = tuple(torch.empty_like(state[0]) for _ in range(3))
    sampler.unipc_step(
        row, cond, uncond if guided else None, *state, masks=list(zip(axes, masks, strict=True)), into=wanted
    )
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


def test_operands_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_quantize takes contiguous bf16, bf16, fp32, not fp32"):
        made(
            "norm_quantize", [random(5, 8, dtype=torch.float32)] * 3, kind="bf16", weight="bf16", width=8, eps=1e-6,
            add=False,
        )  # fmt: skip


FORMS = [
    plugins.Form(kernel, tuple(settings.items()))
    for kernel, settings in (
        ("joint_attention", {"kind": "bf16", "heads": 32, "kv_heads": 8, "size": 128, "scale": 0.088, "narrow": False}),
        ("joint_attention", {"kind": "bf16", "heads": 32, "kv_heads": 8, "size": 128, "scale": 1.0, "narrow": True}),
        ("norm_quantize", {"kind": "bf16", "weight": "bf16", "width": 4096, "eps": 1e-6, "add": True}),
        ("norm_quantize", {"kind": "bf16", "weight": "fp32", "width": 2048, "eps": 1e-5, "add": False}),
        (
            "activation_quantize",
            {"kind": "bf16", "width": 12288, "stride": 24576, "step": 2, "offset": 0, "up_offset": 1, "gated": True},
        ),
        (
            "qkv_pack",
            {"kind": "bf16", "weight": "bf16", "table": "bf16", "stride": 6144, "heads": 32, "kv_heads": 8,
             "size": 128, "eps": 1e-6},
        ),
        ("unipc_step", {"kind": "bf16", "masks": ("bf16",), "rank": 5, "axes": (2,), "guided": True}),
    )
]  # fmt: skip
"""Every plugin, at the width of Nano or Edge."""
UNITS = {90: "wgmma.mma_async", **dict.fromkeys((100, 103, 110), "tcgen05.mma"), 120: "mma.sync"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_they_compile_to_ptx_that_is_complete(tmp_path: Path, capability: int) -> None:
    from triton import knobs

    names = plugins.compile_plugins(FORMS, capability, tmp_path)
    assert set(names) == {path.name for path in tmp_path.iterdir()} and len(names) == 1 + len(FORMS)
    assembler = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    for form, record in zip(FORMS, read_document(tmp_path), strict=True):
        path = tmp_path / f"{record.name}.ptx"
        ptx = path.read_text()
        assert (record.name, record.threads % 32) == (form.name, 0)
        listed = re.search(rf"\.entry {record.entry}\(([^)]*)\)", ptx)
        assert listed is not None
        kinds = ["u64"] * len(record.inputs) + ["u32"] * len(record.integers) + ["u64"] * len(record.outputs)
        assert re.findall(r"\.param \.(\w+)", listed[1]) == kinds
        assert str(Path(__file__).parents[2]) not in ptx and ".loc" not in ptx and ".py" not in ptx
        if form.kernel == "joint_attention":
            assert UNITS[capability] in ptx
        architecture = re.search(r"\.target (\w+)", ptx)
        assert architecture is not None
        subprocess.run(
            [str(assembler.path), f"-arch={architecture[1]}", str(path), "-o", str(tmp_path / "x.cubin")], check=True
        )
        (tmp_path / "x.cubin").unlink()


def test_scratch_memory_that_is_read_is_no_plugin() -> None:
    ptx = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n{ ld.param.b64 %r, [f_param_%d]; }"
    assert plugins.own_parameters(ptx.replace("%d", "0"), "f", 1).count(".param .u64") == 1
    with pytest.raises(ValueError, match="f reads f_param_1, which is scratch memory"):
        plugins.own_parameters(ptx.replace("%d", "1"), "f", 1)
    with pytest.raises(ValueError, match="has 2 parameters, and takes 3"):
        plugins.own_parameters(ptx.replace("%d", "0"), "f", 3)


def test_a_kernel_that_does_not_compile_is_said(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"CX466: kernels do not compile for capability 75: (?s:.*)is not one of"):
        plugins.compile_plugins(FORMS[:1], 75, tmp_path)


def test_sizes_are_numbers_or_symbols() -> None:
    class Symbol:
        def __init__(self, text: str) -> None:
            self.text = text

        def __mul__(self, other: object) -> Symbol:
            return Symbol(f"({self.text}*{other.text if isinstance(other, Symbol) else other})")

    def shown(size: plugins.Size) -> object:
        found = evaluate(size, lambda i, axis: Symbol(f"s{i}{axis}"), lambda a, b: Symbol(f"ceil({a.text}/{b})"))
        return found.text if isinstance(found, Symbol) else found

    assert shown(7) == 7 and shown(("cdiv", 7, 2)) == 4 and shown(("product", 1)) == 1 and shown(("product", 2, 3)) == 6
    assert shown(("cdiv", ("size", 0, 1), 128)) == "ceil(s01/128)"
    assert shown(("product", 1, ("size", 3, 0), ("size", 3, 1))) == "((s30*s31)*1)"
    assert shown(("product", 4, ("size", 3, 0))) == "(s30*4)"
    with pytest.raises(ValueError, match="not one of size, cdiv, product"):
        shown(("sum", 1, 2))
