"""Loss of a running sum of FP8 products on Hopper, emulated: why attention adds its blocks of keys in fp32.

    python benchmarks/fp8_sums.py [-o FILE.json]

Hopper's FP8 units align 32 products and what they are added to at the largest exponent among them and keep 13 bits
behind its point (SageAttention 2, arXiv:2411.10958; DeepSeek-V3, arXiv:2412.19437). Here this is done in fp64 for E4M3
operands: a linear's, and the probabilities and values of attention over as many keys as a video has. "promoted" starts
at zero again for every block and adds blocks exactly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

STEP, BITS = 32, 13
"""Products of one instruction, and the bits that are kept of each."""
BLOCKS = (None, 64, 128)
PEAK = 256.0
"""Largest probability, as the kernel scales them before it rounds them."""


def added(total: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """``total`` [N] and ``products`` [32, N] in one instruction."""
    terms = torch.cat((products, total[None]))
    exponent = torch.frexp(terms.abs().amax(0)).exponent - 1
    kept = torch.trunc(torch.ldexp(terms, BITS - exponent))
    return torch.ldexp(kept.sum(0), exponent - BITS)


def product(row: torch.Tensor, matrix: torch.Tensor, block: int | None) -> torch.Tensor:
    """``row`` [K] · ``matrix`` [K, N]; with ``block``, sums of so many products are added exactly."""
    whole, running = (torch.zeros(matrix.shape[1], dtype=torch.float64) for _ in range(2))
    for start in range(0, len(row), STEP):
        if block is not None and start % block == 0:
            whole, running = whole + running, torch.zeros_like(running)
        part = slice(start, start + STEP)
        running = added(running, row[part, None] * matrix[part])
    return whole + running


def narrow(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).to(torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = {}
    for depth in (4096, 12288):
        cases[f"linear, depth {depth}"] = narrow(torch.randn(depth)), narrow(torch.randn(depth, 256))
    for name, keys in (("480p", 18720), ("720p", 44160)):
        scores = torch.randn(keys)
        probabilities = narrow((scores - scores.max()).exp() * PEAK)
        for mean in (0.0, 1.0):
            cases[f"attention, {name}, values N({mean:g}, 1)"] = probabilities, narrow(torch.randn(keys, 128) + mean)
    rows = []
    print("| sum | " + " | ".join("running" if b is None else f"promoted, {b}" for b in BLOCKS) + " |")
    print("|---" * (len(BLOCKS) + 1) + "|")
    for name, (row, matrix) in cases.items():
        exact = row @ matrix
        errors = [float((product(row, matrix, block) - exact).norm() / exact.norm()) for block in BLOCKS]
        rows += [{"sum": name, "block": b, "error": e} for b, e in zip(BLOCKS, errors, strict=True)]
        print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    if arguments.output:
        document = {"benchmark": "fp8-sums", "emulated": True, "torch": torch.__version__, "sums": rows}
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
