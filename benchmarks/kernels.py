"""Every kernel at the shapes of a workload: checked against its reference, then timed beside the libraries.

    python benchmarks/kernels.py -o benchmarks/results/kernels-h100.json      # on a GPU
    python benchmarks/kernels.py --sweep                                      # other tiles of the matrix kernels
    TRITON_INTERPRET=1 python benchmarks/kernels.py --dry-run                 # anywhere: tiny shapes, interpreted

Inputs are random and fresh for the check and for the timing. "of the ceiling" is against what the same card reaches in
a large copy (bytes per second, each tensor once) or a large product (operations per second) just before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu import ceilings, device_for, machine, median_s

from cosmos_export.kernels import activation_quantize as act
from cosmos_export.kernels import gemm_w4a16 as w4
from cosmos_export.kernels import gemm_w8a8 as w8
from cosmos_export.kernels import joint_attention as attention
from cosmos_export.kernels import norm_quantize as norm
from cosmos_export.kernels import qkv_pack as pack
from cosmos_export.kernels import sampler_step as sampler
from cosmos_export.kernels.candidates import CANDIDATES, Candidate
from cosmos_export.kernels.interpret import device_rounding
from cosmos_export.kernels.launch import FP8, Tile

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Shape:
    """A model's width and a workload's rows."""

    name: str
    rows: int
    prompt: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    latent: tuple[int, ...]


NANO = {"hidden": 4096, "inner": 12288, "heads": 32, "kv_heads": 8, "head": 128}
SHAPES = {
    "480p": Shape("nano 480p 189f", 18_720, 1615, latent=(1, 48, 48, 30, 52), **NANO),
    "720p": Shape("nano 720p 189f", 44_160, 1615, latent=(1, 48, 48, 45, 80), **NANO),
    "policy": Shape("nano policy", 3_093, 132, latent=(1, 48, 9, 33, 40), **NANO),
    "tiny": Shape("tiny", 33, 7, 128, 256, 4, 2, 16, (1, 4, 3, 5, 6)),
}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: how to make operands, what computes on them, and what is right."""

    kernel: str
    unit: str
    """``bytes`` or ``flops``."""
    ceiling: str
    amount: float
    """Bytes moved (each tensor once) or operations."""
    candidates: list[Candidate]
    operands: Callable[[int], tuple[Any, ...]]
    """Operands from a seed."""
    check: Callable[[Candidate, torch.device], float]
    """Relative error of a candidate with fresh inputs, at the size that is timed and of its last rows."""
    limit: float
    tiles: tuple[Tile, ...] = ()
    tiled: Callable[..., Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


_OURS = "triton"
"""Beginning of the names of this project's candidates; their tile follows after a space."""
_LAST = 512
"""Rows that are compared: at the end, where an offset that does not fit its type is wrong."""
_QUERIES = 256
"""The same of attention's queries, over all keys."""


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    difference = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return difference if difference == difference else float("inf")  # NaN never passes


def of_last_rows(found: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor, wanted_scale: torch.Tensor) -> float:
    """Error of quantized rows and of their scale: one, or one per row."""
    values, scale = found
    scale = scale[-_LAST:] if scale.numel() > 1 else scale
    return max(error(values[-_LAST:].float(), wanted.float()), error(scale, wanted_scale))


class Cases:
    """The cases of one shape on one device."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.s, self.device = shape, device
        self._seed = 0

    def random(
        self, *size: int, dtype: torch.dtype = BF16, seed: int | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        self._seed += 1
        generator = torch.Generator(self.device).manual_seed(self._seed if seed is None else seed)
        return (torch.randn(*size, device=self.device, generator=generator) * scale).to(dtype)

    def __iter__(self) -> Iterator[Case]:
        yield self.attention(BF16)
        yield self.attention(FP8)
        yield self.qkv_pack(False)
        yield self.qkv_pack(True)
        for static in (True, False):
            yield self.norm(static)
            yield self.activation(True, static)
        yield self.activation(False, True)
        yield self.sampler()
        for outputs, depth in self.products():
            yield self.w8a8(outputs, depth)
        yield self.w4a16()

    def products(self) -> list[tuple[int, int]]:
        """Outputs and depth of the linears of a layer: merged QKV, output, merged gate and up, down."""
        s = self.s
        width = s.heads * s.head
        return [
            (width + 2 * s.kv_heads * s.head, s.hidden),
            (s.hidden, width),
            (2 * s.inner, s.hidden),
            (s.hidden, s.inner),
        ]

    def _attention_operands(self, queries: int, dtype: torch.dtype, seed: int, mean: float = 0.0) -> tuple[Any, ...]:
        """``mean``: of the values, which are drawn around it."""
        s = self.s
        q = self.random(queries, s.heads, s.head, dtype=dtype, seed=seed)
        own, prefix = (
            [
                self.random(rows, s.kv_heads, s.head, dtype=dtype, seed=seed + first),
                (self.random(rows, s.kv_heads, s.head, seed=seed + first + 1) + mean).to(dtype),
            ]
            for rows, first in ((s.rows, 1), (s.prompt, 3))
        )
        if dtype == FP8:  # values as the packing kernel leaves them, for the matrix unit's order
            own[1] = own[1].permute(1, 2, 0).contiguous().permute(2, 0, 1)
            prefix[1] = prefix[1].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return (q, *own, *prefix, s.head**-0.5)

    def attention(self, dtype: torch.dtype) -> Case:
        s, narrow = self.s, dtype == FP8
        name = "joint_attention_fp8" if narrow else "joint_attention"

        def check(candidate: Candidate, device: torch.device) -> float:
            # Sums over many keys lose most where the values have a mean.
            found = []
            scales = tuple(torch.ones(n, device=device) for n in (s.heads, s.kv_heads, s.kv_heads)) if narrow else None
            for mean in (0.0, 1.0):
                query, *others = self._attention_operands(s.rows, dtype, 1000, mean)
                wanted = attention.reference(query[-_QUERIES:], *others, scales=scales)
                found.append(error(candidate.run(query, *others)[-_QUERIES:], wanted))
            return max(found)

        def tiled(tile: Tile) -> Callable[..., Any]:
            ones = tuple(torch.ones(n, device=self.device) for n in (s.heads, s.kv_heads, s.kv_heads))
            return lambda *operands: attention.joint_attention(*operands, scales=ones if narrow else None, tile=tile)

        return Case(
            name, "flops", "fp8_flops" if narrow else "bf16_flops", 4 * s.heads * s.head * s.rows * (s.rows + s.prompt),
            CANDIDATES[name], lambda seed: self._attention_operands(s.rows, dtype, seed), check,
            0.06 if narrow else 6e-3, attention.CANDIDATE_TILES, tiled,
        )  # fmt: skip

    def qkv_pack(self, narrow: bool) -> Case:
        s = self.s
        widths = [s.heads * s.head, s.kv_heads * s.head, s.kv_heads * s.head]
        scales = tuple(torch.full((n,), 0.02, device=self.device) for n in (s.heads, s.kv_heads, s.kv_heads))
        options: dict[str, Any] = {"scales": scales, "transpose_value": True} if narrow else {}

        def operands(seed: int, rows: int = s.rows) -> tuple[Any, ...]:
            q, k, v = self.random(rows, sum(widths), seed=seed).split(widths, dim=1)
            weights = [self.random(s.head, seed=seed + i) for i in (1, 2)]
            angles = self.random(rows, s.head // 2, dtype=F32, seed=seed + 3)
            return q, k, v, *weights, angles.cos().to(BF16), angles.sin().to(BF16), 1e-6

        def run(*given: Any) -> Any:
            return pack.qkv_pack(*given, **options)

        def check(candidate: Candidate, device: torch.device) -> float:
            given = operands(2000)
            rows = [t[-_LAST:] if isinstance(t, torch.Tensor) and len(t) == s.rows else t for t in given]
            wanted = pack.reference(*rows, scales=scales if narrow else None)
            found = candidate.run(*given)
            return max(error(a[-_LAST:].float(), b.float()) for a, b in zip(found, wanted, strict=True))

        moved = s.rows * sum(widths) * (2 + (1 if narrow else 2)) + s.rows * s.head * 2
        return Case(
            f"qkv_pack{'_fp8' if narrow else ''}", "bytes", "copy_bytes_per_s", moved, [Candidate("triton", run)],
            operands, check, 0.02, pack.CANDIDATE_TILES,
            lambda tile: lambda *g: pack.qkv_pack(*g, **options, tile=tile),
        )  # fmt: skip

    def norm(self, static: bool) -> Case:
        s = self.s

        def operands(seed: int, rows: int = s.rows) -> tuple[Any, ...]:
            scale = torch.tensor([0.02], device=self.device) if static else None
            x, delta = (self.random(rows, s.hidden, seed=seed + i) for i in (0, 1))
            return x, self.random(s.hidden, seed=seed + 2), 1e-6, scale, delta

        def run(x: Any, w: Any, eps: float, scale: Any, delta: Any) -> Any:
            return norm.norm_quantize(x, w, eps, scale, delta=delta)

        def check(candidate: Candidate, device: torch.device) -> float:
            x, w, eps, scale, delta = operands(3000)
            wanted, wanted_scale = norm.reference(x[-_LAST:], w, eps, scale, delta=delta[-_LAST:])
            return of_last_rows(candidate.run(x, w, eps, scale, delta), wanted, wanted_scale)

        return Case(
            f"norm_quantize_{'static' if static else 'row'}", "bytes", "copy_bytes_per_s",
            s.rows * s.hidden * (2 + 2 + 2 + 1), [Candidate("triton", run)], operands, check, 0.02,
        )  # fmt: skip

    def activation(self, gated: bool, static: bool) -> Case:
        s = self.s

        def operands(seed: int, rows: int = s.rows) -> tuple[Any, ...]:
            scale = torch.tensor([0.05], device=self.device) if static else None
            merged = self.random(rows, 2 * s.inner if gated else s.inner, seed=seed)
            return merged[:, : s.inner], merged[:, s.inner :] if gated else None, scale

        def check(candidate: Candidate, device: torch.device) -> float:
            x, up, scale = operands(4000)
            wanted, wanted_scale = act.reference(x[-_LAST:], up if up is None else up[-_LAST:], scale)
            return of_last_rows(candidate.run(x, up, scale), wanted, wanted_scale)

        name = f"activation_quantize_{'gated' if gated else 'relu2'}_{'static' if static else 'row'}"
        moved = s.rows * s.inner * ((4 if gated else 2) + 1)
        run = [Candidate("triton", act.activation_quantize)]
        return Case(name, "bytes", "copy_bytes_per_s", moved, run, operands, check, 0.02)

    def sampler(self) -> Case:
        s = self.s

        def operands(seed: int) -> tuple[Any, ...]:
            row = self.random(10, dtype=F32, seed=seed, scale=0.3)
            velocities = [self.random(*s.latent, seed=seed + i) for i in (1, 2)]
            state = [self.random(*s.latent, dtype=F32, seed=seed + i) for i in (3, 4, 5, 6)]
            mask = (self.random(s.latent[2], seed=seed + 7) > -0.5).to(BF16)
            return row, *velocities, *state, mask, torch.empty(s.latent, dtype=BF16, device=self.device)

        def run(row: Any, cond: Any, uncond: Any, x: Any, last: Any, m0: Any, m1: Any, mask: Any, narrow: Any) -> Any:
            sampler.unipc_step(row, cond, uncond, x, last, m0, m1, masks=[(2, mask)], narrow=narrow)
            return x, last, m0, m1

        def check(candidate: Candidate, device: torch.device) -> float:
            given = operands(5000)
            before = [t.clone() for t in given[:7]]
            wanted = sampler.reference(*[t.double() for t in before], masks=[(2, given[7])])
            return max(error(a, b) for a, b in zip(candidate.run(*given), wanted, strict=True))

        count = 1
        for size in s.latent:
            count *= size
        moved = count * (2 * 2 + 4 * 4 + 4 * 4 + 2)
        return Case(
            "sampler_step", "bytes", "copy_bytes_per_s", moved, [Candidate("triton", run)], operands, check, 1e-5
        )

    def w8a8(self, outputs: int, depth: int) -> Case:
        s = self.s

        def operands(seed: int, rows: int = s.rows) -> tuple[Any, ...]:
            a, w = self.random(rows, depth, dtype=FP8, seed=seed), self.random(outputs, depth, dtype=FP8, seed=seed + 1)
            scales = [torch.tensor([value], device=self.device) for value in (0.5, 0.25)]
            return a, w, *scales

        def check(candidate: Candidate, device: torch.device) -> float:
            a, *others = operands(6000)
            return error(candidate.run(a, *others)[-_LAST:], w8.reference(a[-_LAST:], *others))

        return Case(
            f"gemm_w8a8 {outputs}×{depth}", "flops", "fp8_flops", 2 * s.rows * outputs * depth, CANDIDATES["gemm_w8a8"],
            operands, check, 6e-3, w8.CANDIDATE_TILES, lambda tile: lambda *g: w8.gemm_w8a8(*g, tile=tile, fast=True),
        )  # fmt: skip

    def w4a16(self) -> Case:
        """The reasoner's: a prompt's rows."""
        s = self.s
        outputs, depth = 2 * s.inner, s.hidden

        def operands(seed: int, rows: int = s.prompt) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(seed)
            values = torch.randint(-8, 8, (outputs, depth), generator=generator)
            scales = self.random(outputs, depth // 128, seed=seed, scale=0.01)
            return self.random(rows, depth, seed=seed + 1), w4.pack(values).to(self.device), scales

        def check(candidate: Candidate, device: torch.device) -> float:
            given = operands(7000)
            return error(candidate.run(*given), w4.reference(*given))

        return Case(
            f"gemm_w4a16 {outputs}×{depth}", "flops", "bf16_flops", 2 * s.prompt * outputs * depth,
            CANDIDATES["gemm_w4a16"], operands, check, 8e-3, w4.CANDIDATE_TILES,
            lambda tile: lambda *g: w4.gemm_w4a16(*g, tile=tile),
        )  # fmt: skip


def measure(
    case: Case, device: torch.device, limits: dict[str, float], runs: int, sweep: bool
) -> Iterator[dict[str, Any]]:
    """A row for each candidate, and with ``sweep`` for each tile."""
    candidates = list(case.candidates)
    if sweep and case.tiled is not None:
        for tile in case.tiles:
            if all(size & (size - 1) == 0 for size in tile.sizes):
                name = f"{_OURS} {'×'.join(map(str, tile.sizes))} w{tile.warps} s{tile.stages}"
                candidates.append(Candidate(name, case.tiled(tile)))
    for candidate in candidates:
        row: dict[str, Any] = {"kernel": case.kernel, "candidate": candidate.name}
        reason = candidate.unavailable(device)
        if reason:
            yield row | {"skipped": reason}
            continue
        try:
            wrong = case.check(candidate, device)
            operands = case.operands(8000)
            seconds = median_s(lambda run=candidate.run, given=operands: run(*given), device, runs=runs)
            del operands
        except Exception as failure:  # a candidate that does not run on this card is a result, not an end
            yield row | {
                "failed": f"{type(failure).__name__}: {str(failure).splitlines()[0][:160] if str(failure) else ''}"
            }
            continue
        rate = case.amount / seconds
        yield row | {
            "error": wrong, "right": wrong <= case.limit, "seconds": seconds, case.unit + "_per_s": rate,
            "of_ceiling": rate / limits[case.ceiling],
        }  # fmt: skip


def is_wrong(row: dict[str, Any]) -> bool:
    """One of this project's kernels does not compute its reference or does not run. That a library does not, or that a
    tile does not fit, is a result."""
    candidate = row.get("candidate", _OURS)
    return candidate.startswith(_OURS) and (not row.get("right", True) or ("failed" in row and " " not in candidate))


def text(row: dict[str, Any]) -> str:
    state = row.get("skipped") or row.get("failed")
    if state:
        return f"| {row['kernel']} | {row['candidate']} | – | – | – | {state} |"
    rate = row.get("flops_per_s")
    speed = f"{rate / 1e12:.0f} TFLOP/s" if rate else f"{row['bytes_per_s'] / 1e9:.0f} GB/s"
    verdict = "right" if row["right"] else "WRONG"
    cells = (row["kernel"], row["candidate"], f"{1e3 * row['seconds']:.3f} ms", speed, f"{row['of_ceiling']:.0%}")
    return f"| {' | '.join(cells)} | {verdict}, {row['error']:.1e} |"


def run(names: list[str], device: torch.device, *, dry_run: bool, sweep: bool, runs: int) -> dict[str, Any]:
    """Every case of the shapes ``names``; prints each row as it is known."""
    limits = ceilings(device, dry_run)
    document: dict[str, Any] = {"ceilings": limits, "shapes": {}}
    print(
        f"ceilings: copy {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, bf16 {limits['bf16_flops'] / 1e12:.0f} and fp8 "
        f"{limits['fp8_flops'] / 1e12:.0f} TFLOP/s"
    )
    print("| kernel | by | time | speed | of the ceiling | against the reference |\n|---|---|---|---|---|---|")
    for name in names:
        rows = document["shapes"][SHAPES[name].name] = []
        for case in Cases(SHAPES[name], device):
            for row in measure(case, device, limits, runs, sweep):
                rows.append(row)
                print(text(row), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="480p,720p,policy", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--sweep", action="store_true", help="also every candidate tile of the Triton kernels")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    names = ["tiny"] if arguments.dry_run else arguments.shapes.split(",")
    device = device_for(arguments.dry_run)
    runs = 1 if arguments.dry_run else arguments.runs
    with device_rounding() if arguments.dry_run else nullcontext():
        found = run(names, device, dry_run=arguments.dry_run, sweep=arguments.sweep, runs=runs)
    document = {
        "benchmark": "kernels", "command": f"python benchmarks/kernels.py {' '.join(sys.argv[1:])}".strip(),
        "dry_run": arguments.dry_run, "machine": machine(), **found,
    }  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    wrong = [row for rows in found["shapes"].values() for row in rows if is_wrong(row)]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
