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


def unknown(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_target(name)
    assert caught.value.code == "CX401" and caught.value.hint
    return caught.value


def test_unknown_target_names_the_nearest() -> None:
    error = unknown("rtx-pro-600")
    assert "rtx-pro-6000" in error.hint
    assert all(name in error.message for name in NAMES)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("5090", "rtx-5090"), ("RTX 5090", "rtx-5090"), ("GeForce RTX 5090", "rtx-5090"), ("GB10", "dgx-spark"),
        ("DGX-H100", "h100"),
        ("spark", "dgx-spark"), ("T5000", "jetson-thor"), ("jetson_agx_thor", "jetson-thor"), ("H100", "h100"),
        ("nvidia-b200", "b200"), ("RTX PRO 6000", "rtx-pro-6000"), ("L40S", "l40s"),
    ],
)  # fmt: skip
def test_a_target_has_more_than_one_spelling(name: str, target: str) -> None:
    assert load_target(name).name == target


@pytest.mark.parametrize(
    ("name", "capability", "targets"),
    [
        ("rtx-4090", "8.9", {"l40s"}),
        ("4090", "8.9", {"l40s"}),
        ("rtx4070ti", "8.9", {"l40s"}),
        ("l4", "8.9", {"l40s"}),
        ("a6000-ada", "8.9", {"l40s"}),
        ("rtx-6000-ada", "8.9", {"l40s"}),
        ("5080", "12.0", {"rtx-5090", "rtx-pro-6000"}),
        ("rtx-5070-ti", "12.0", {"rtx-5090", "rtx-pro-6000"}),
        ("sm_120", "12.0", {"rtx-5090", "rtx-pro-6000"}),
        ("rtx-pro-5000", "12.0", {"rtx-5090", "rtx-pro-6000"}),
        ("sm_89", "8.9", {"l40s"}),
        ("9.0", "9.0", {"h100", "h200"}),
        ("sm90a", "9.0", {"h100", "h200"}),
        ("gh200", "9.0", {"h100", "h200"}),
        ("gb200", "10.0", {"b200"}),
        ("gb300", "10.3", {"b300"}),
        ("sm_121", "12.1", {"dgx-spark"}),
        ("h800", "9.0", {"h100", "h200"}),
        ("a100", "8.0", set()),
        ("jetson-orin", "8.7", set()),
        ("orin", "8.7", set()),
        ("rtx-3090", "8.6", set()),
        ("a10g", "8.6", set()),
        ("t4", "7.5", set()),
        ("v100", "7.0", set()),
        ("2080ti", "7.5", set()),
        ("a6000", "8.6", set()),
        ("sm_86", "8.6", set()),
        ("b200-sxm", "10.0", {"b200"}),
        ("hopper", "9.0", {"h100", "h200"}),
        ("ad102", "8.9", {"l40s"}),
        ("rtx-6000-pro", "12.0", {"rtx-5090", "rtx-pro-6000"}),
        ("gtx-1080-ti", "6.1", set()),
    ],
)
def test_a_gpu_is_sent_to_targets_whose_engines_load_on_it(name: str, capability: str, targets: set[str]) -> None:
    error = unknown(name)
    assert f"compute capability {capability}" in error.message
    assert {word.strip("`,.:;") for word in error.hint.split()} & set(NAMES) == (targets or {"cpu"})
    assert all(load_target(one).compute_capability == capability for one in targets)
    assert ("not supported" in error.message) == (not targets)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h100,h200", "several targets"),
        ("cuda", "one kind of GPU"),
        ("gpu", "one kind of GPU"),
        ("mi300x", "not a GPU"),
        ("cuda:0", "one kind of GPU"),
        ("rtx", "one kind of GPU"),
        ("m3max", "not a GPU of NVIDIA"),
    ],
)
def test_what_is_no_name_of_a_gpu_gets_a_sentence(name: str, said: str) -> None:
    assert said in unknown(name).message


@pytest.mark.parametrize("name", ["rtx-6090", "h300", "b100x", "l50s"])
def test_another_number_is_never_suggested(name: str) -> None:
    assert "did you mean" not in unknown(name).hint


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
