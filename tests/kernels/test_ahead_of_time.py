"""Every kernel becomes machine code for Hopper and every Blackwell on this machine, with the instructions it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from cosmos_export.kernels import ahead
from cosmos_export.kernels.description import CAPABILITIES

# In a process of its own: here the kernels may be interpreted.
_SCRIPT = """
import json, re, sys
from cosmos_export.kernels.ahead import compile_variant, variants
from cosmos_export.kernels.loops import loops
capability = int(sys.argv[1])
for variant in variants(capability):
    b = compile_variant(variant, capability)
    found = [i for i in ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "e4m3", "kind::f8f6f4") if i in b.ptx]
    record = {"name": b.variant, "entry": b.entry in b.ptx, "cubin": len(b.cubin), "elf": b.cubin[:4] == b"\\x7fELF",
              "shared": b.shared_bytes, "registers": b.registers, "spilled": b.spilled_bytes, "found": found,
              "restarts": len(re.findall(r"wgmma\\.mma_async[^;]*, 0, 1, 1(?:, [01], [01])?;", b.ptx)),
              "bounds": [loop.bound for loop in loops(b.cubin, variant.warps)],
              "sm": f".target sm_{capability}" in b.ptx}
    print(json.dumps(record))
"""
SHARED_LIMITS = {**dict.fromkeys((90, 100, 103, 110), 227 * 1024), 120: 99 * 1024}
MATRIX = {90: "wgmma.mma_async", **dict.fromkeys((100, 103, 110), "tcgen05.mma"), 120: "mma.sync"}


@cache
def records_of(capability: int) -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _SCRIPT, str(capability)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in result.stdout.splitlines()]
    return {record["name"]: record for record in records}


@pytest.fixture(params=CAPABILITIES)
def compiled(request: pytest.FixtureRequest) -> tuple[int, dict[str, dict[str, Any]]]:
    return request.param, records_of(request.param)


def test_every_variant_compiles(compiled: tuple[int, dict[str, dict[str, Any]]]) -> None:
    capability, records = compiled
    assert {name.split("_")[0] for name in records} == {"joint", "qkv", "norm", "activation", "unipc", "gemm"}
    for record in records.values():
        assert record["elf"] and record["entry"] and record["sm"] and record["cubin"] > 1000, record
        assert record["shared"] <= SHARED_LIMITS[capability], record
        assert 0 < record["registers"] <= 255


def test_matrix_kernels_use_the_matrix_units(compiled: tuple[int, dict[str, dict[str, Any]]]) -> None:
    capability, records = compiled
    for name, record in records.items():
        if name.startswith(("joint", "gemm")):
            assert MATRIX[capability] in record["found"], record
        if "fp8" in name or "w8a8" in name or "quantize" in name:
            assert {"e4m3", "kind::f8f6f4"} & set(record["found"]), record


def test_hopper_adds_blocks_of_fp8_products_in_fp32() -> None:
    """Its FP8 units keep 13 bits of a running sum: none runs over more than a block."""
    records = records_of(90)
    passes = 4  # whole and last blocks of the own rows and of the prompt
    assert records["joint_attention_bf16"]["restarts"] == passes, "q·k alone starts at zero"
    assert records["joint_attention_fp8"]["restarts"] == 2 * passes, "q·k and p·v start at zero in every block"


@pytest.mark.parametrize(
    ("kernel", "loops", "least"),
    [("joint_attention_bf16", 4, 1.0), ("joint_attention_fp8", 4, 0.85), ("gemm_w8a8_static", 1, 1.0),
     ("gemm_w8a8_row", 1, 1.0), ("gemm_w4a16", 1, 0.85)],
)  # fmt: skip
def test_hoppers_loops_leave_room_for_its_matrix_units(kernel: str, loops: int, least: float) -> None:
    """Those over whole blocks, of attention its own and the prompt's: the last blocks have masks."""
    bounds = records_of(90)[kernel]["bounds"]
    assert len(bounds) == loops and all(bound >= least for bound in bounds[::2])


def test_memory_bound_kernels_keep_everything_in_registers(
    compiled: tuple[int, dict[str, dict[str, Any]]],
) -> None:
    for name, record in compiled[1].items():
        if not name.startswith(("joint", "gemm", "unipc")):
            assert record["spilled"] == 0, record


def test_another_capability_is_refused() -> None:
    variant = next(iter(ahead.variants(90)))
    with pytest.raises(ValueError, match="is not one of"):
        ahead.compile_variant(variant, 75)
