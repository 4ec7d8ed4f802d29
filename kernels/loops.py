"""Upper bounds for the loops of a kernel: the machine code that a loop of matrix products issues, by where it runs.

An upper bound, and no measurement: of an iteration it counts what the matrix units take, what the four schedulers of a
multiprocessor issue (an instruction a clock each) and what the exponential units take (an eighth of a warp a clock).
They work side by side, so an iteration takes at least the most of the three; memory and waiting come on top.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SCHEDULERS = 4
"""Schedulers of a multiprocessor; a warp belongs to one of them."""
_EXPONENTIAL_CLOCKS = 8
"""Clocks for which an exponential of a warp occupies the unit of its scheduler."""
_GROUP_WARPS = 4
"""Warps that issue one asynchronous product together."""
_FLOPS_A_CLOCK = {"HGMMA": 4096, "QGMMA": 8192}
"""Dense operations per clock of a Hopper multiprocessor: 989 and 1979 TFLOP/s on 132 of them at 1.83 GHz (NVIDIA H100
data sheet)."""
_LABEL = re.compile(r"\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.a-z]*)(.*)")
_JUMP = re.compile(r"`\(\.(L_x_\d+)\)")
_PRODUCT = re.compile(r"([HQ]GMMA)\.(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class MachineLoop:
    """A loop that has products of matrix units, in clocks of a multiprocessor that runs one program."""

    instructions: int
    """Instructions of each warp per iteration."""
    matrix_clocks: float
    issue_clocks: float
    exponential_clocks: float

    @property
    def bound(self) -> float:
        """Share of the matrix units' rate that the loop can reach at most."""
        return self.matrix_clocks / max(self.matrix_clocks, self.issue_clocks, self.exponential_clocks)


def loops(cubin: bytes, warps: int) -> list[MachineLoop]:
    """Loops of ``cubin``, for Hopper, in the order of the code; programs of ``warps`` warps."""
    found = []
    for body in _bodies(_disassembled(cubin)):
        products = [match for name in body if (match := _PRODUCT.match(name))]
        if products:
            groups = warps / _GROUP_WARPS
            clocks = sum(2 * int(p[2]) * int(p[3]) * int(p[4]) / _FLOPS_A_CLOCK[p[1]] for p in products)
            exponentials = sum(name.startswith("MUFU") for name in body)
            each = warps / SCHEDULERS
            found.append(
                MachineLoop(len(body), groups * clocks, each * len(body), each * _EXPONENTIAL_CLOCKS * exponentials)
            )
    return found


def _disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(knobs.nvidia.nvdisasm.path), "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _bodies(code: str) -> Iterator[list[str]]:
    """Names of the instructions between each jump back and where it goes."""
    places: dict[str, int] = {}
    names: list[str] = []
    for line in code.splitlines():
        if label := _LABEL.match(line.strip()):
            places[label[1]] = len(names)
        elif instruction := _INSTRUCTION.search(line):
            names.append(instruction[1])
            target = _JUMP.search(instruction[2])
            if target and instruction[1].startswith("BRA") and target[1] in places:
                yield names[places[target[1]] :]
