"""Targets as data: complete, strict, and clear about what cannot be built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_export.diagnostics import InternalError, UserError
from cosmos_export.kernels.description import CAPABILITIES
from cosmos_export.targets import load_target, target_names
from cosmos_export.targets.backends import backend_of, backends
from cosmos_export.targets.description import parse_target

ROOT = Path(__file__).resolve().parents[2]
NAMES = target_names()

VALID = """
title = "a GPU"
backend = "tensorrt-rtx"
compute_capability = "12.0"
memory_bytes = 1
bandwidth_bytes_per_s = 1
unified_memory = false
precisions = ["bf16"]
traps = []
source = ["a data sheet"]
[peak_flops]
bf16 = 1e12
[refused]
mxfp8 = "slow"
"""


def test_every_target_loads() -> None:
    assert set(NAMES) == {path.stem for path in (ROOT / "targets").glob("*.toml")} >= {"cpu", "h100", "rtx-5090"}
    for name in NAMES:
        target = load_target(name)
        assert target.name == name
        assert (target.compute_capability is None) == (not backend_of(target).needs_gpu)


def test_capabilities_and_order_of_rates() -> None:
    capabilities = {name: load_target(name).compute_capability for name in NAMES}
    assert capabilities["rtx-pro-6000"] == capabilities["rtx-5090"] == "12.0"
    assert capabilities["dgx-spark"] == "12.1" and capabilities["l40s"] == "8.9"
    assert capabilities["h100"] == capabilities["h200"] == "9.0"
    assert (capabilities["b200"], capabilities["b300"], capabilities["jetson-thor"]) == ("10.0", "10.3", "11.0")
    for name in NAMES:
        peaks = load_target(name).peak_flops
        rates = [peaks[kind] for kind in ("bf16", "fp8", "nvfp4") if kind in peaks]
        assert rates == sorted(rates)


def test_kernels_are_compiled_for_every_gpu_that_takes_them() -> None:
    """Plugins of TensorRT, and kernels in PyTorch's graphs."""
    for target in map(load_target, NAMES):
        own = [backends()[name] for name in (target.backend, *target.other_backends)]
        if any(backend.takes_kernels or backend.compiles_when_run for backend in own):
            assert int((target.compute_capability or "").replace(".", "")) in CAPABILITIES, target.name


def test_fp4_is_legal_only_where_tensor_cores_have_it() -> None:
    assert [name for name in NAMES if "nvfp4" in load_target(name).precisions] == [
        *("b200", "b300", "dgx-spark", "rtx-5090", "rtx-pro-6000")
    ]


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        load_target("rtx-pro-600")
    assert caught.value.code == "CX401"
    assert "rtx-pro-6000" in caught.value.hint
    assert all(name in caught.value.message for name in NAMES)


@pytest.mark.parametrize("name", ["../pyproject", "", "zzz"])
def test_names_are_looked_up_not_opened(name: str) -> None:
    with pytest.raises(UserError, match="unknown target"):
        load_target(name)


def test_a_target_may_have_several_backends() -> None:
    target = load_target("h200")
    assert target.on(None) is target.on("inductor") is target
    other = target.on("tensorrt")
    assert (other.backend, other.other_backends, other.name) == ("tensorrt", ("inductor",), "h200")
    with pytest.raises(UserError, match="has no backend `tensorrt-rtx`; it has inductor and tensorrt") as caught:
        target.on("tensorrt-rtx")
    assert caught.value.code == "CX407"


def test_valid_text_parses() -> None:
    assert parse_target("test", VALID).peak_flops["bf16"] == 1e12


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "a GPU"', 'title = "a GPU"\ncolour = "green"', "colour"),
        ("traps = []\n", "", "traps"),
        ("memory_bytes = 1", 'memory_bytes = "1"', "not a int"),
        ("memory_bytes = 1\n", "", "a GPU needs"),
        ("memory_bytes = 1", "memory_bytes = -1", "positive"),
        ('"12.0"', '"sm120"', "sm120"),
        ('["bf16"]', '["bf17"]', "bf17"),
        ('mxfp8 = "slow"', 'bf16 = "slow"', "both"),
        ('source = ["a data sheet"]', "source = []", "source"),
        ("title", "= title", "TOML"),
    ],
)
def test_a_wrong_description_fails(old: str, new: str, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        parse_target("test", VALID.replace(old, new, 1))


def test_importing_targets_imports_nothing_heavy() -> None:
    modules = (
        "cosmos_export.targets.trt.tensorrt_rtx, cosmos_export.targets.trt.engine_inspector, cosmos_export.cli.targets"
    )
    code = f"import sys, {modules}; print([m for m in ('torch', 'onnx', 'tensorrt_rtx', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
