"""Kernels compiled ahead of time, without a GPU: machine code and PTX for a compute capability, and what it takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cosmos_export.kernels.description import CAPABILITIES
from cosmos_export.kernels.launch import Variant
from cosmos_export.kernels.loops import loops

MODULES = (
    "joint_attention", "qkv_pack", "norm_quantize", "activation_quantize", "sampler_step", "gemm_w8a8", "gemm_w4a16",
)  # fmt: skip
"""Every kernel module, in the order of a generator layer."""
HOPPER = 90


@dataclass(frozen=True)
class Binary:
    """One variant for one capability."""

    variant: str
    capability: int
    entry: str
    """Name of the kernel in the code."""
    cubin: bytes
    ptx: str
    shared_bytes: int
    threads: int
    registers: int
    spilled_bytes: int
    """Bytes per thread in local memory, where registers do not suffice."""


def variants(capability: int) -> Iterator[Variant]:
    """The forms of every kernel for ``capability``."""
    for name in MODULES:
        yield from import_module(f"cosmos_export.kernels.{name}").variants(capability)


def compile_variant(variant: Variant, capability: int) -> Binary:
    """Machine code of ``variant`` for ``capability`` (of `CAPABILITIES`). Needs no GPU and no driver.

    ValueError for another capability, and where Triton runs as an interpreter (``TRITON_INTERPRET``).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if capability not in CAPABILITIES:
        raise ValueError(f"capability {capability} is not one of {CAPABILITIES}")
    if not hasattr(variant.kernel, "arg_names") or type(variant.kernel).__name__ == "InterpretedFunction":
        raise ValueError("kernels are interpreted in this process (TRITON_INTERPRET); they cannot be compiled in it")
    source = ASTSource(
        fn=variant.kernel, signature=_signature(variant), constexprs=dict(variant.constants), attrs=_attributes(variant)
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Binary(
        variant.name, capability, compiled.metadata.name, compiled.asm["cubin"], compiled.asm["ptx"],
        compiled.metadata.shared, 32 * compiled.metadata.num_warps, registers, spilled,
    )  # fmt: skip


def _signature(variant: Variant) -> dict[str, str]:
    """Every argument in the kernel's order; a compile-time constant has the type of one."""
    names = variant.kernel.arg_names
    missing = [name for name in names if name not in variant.signature and name not in variant.constants]
    unknown = [name for name in (*variant.signature, *variant.constants) if name not in names]
    if missing or unknown:
        raise ValueError(f"variant {variant.name}: lacks {missing}, has unknown {unknown}")
    return {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names}


def _attributes(variant: Variant) -> dict[tuple[int], list[list[Any]]]:
    names = variant.kernel.arg_names
    aligned = [n for n in names if variant.signature.get(n, "").startswith("*") or n in variant.divisible]
    return {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in variant.constants}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of its stack, as the disassembler that ships with Triton reports them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(knobs.nvidia.cuobjdump.path), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise ValueError(f"cuobjdump reports no resources: {text[:200]}")
    return int(registers[1]), int(stack[1])


def main() -> int:
    """``python -m cosmos_export.kernels.ahead``: every variant for every capability, and the loops of those for Hopper
    in clocks of a multiprocessor, as tables."""
    print("| kernel | sm | registers | spilled | shared | code | threads |\n|---|---|---|---|---|---|---|")
    for capability in CAPABILITIES:
        for variant in variants(capability):
            b = compile_variant(variant, capability)
            sizes = (f"{b.spilled_bytes} B", f"{b.shared_bytes // 1024} KiB", f"{len(b.cubin) // 1024} KiB")
            row = (b.variant, capability, b.registers, *sizes, b.threads)
            print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)
    print(
        "\n| loop on 90 | instructions | matrix units | schedulers | exponentials | at most |",
        "|---" * 6 + "|",
        sep="\n",
    )
    for variant in variants(HOPPER):
        for loop in loops(compile_variant(variant, HOPPER).cubin, variant.warps):
            clocks = [f"{c:.0f}" for c in (loop.matrix_clocks, loop.issue_clocks, loop.exponential_clocks)]
            print(f"| {' | '.join([variant.name, str(loop.instructions), *clocks, f'{loop.bound:.0%}'])} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
