"""Values that readers do not expect: paths, texts, numbers and shapes of JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CANARY = "__import__('os').system('touch CANARY')"
"""Python that leaves a trace where it is evaluated; the worker's audit hook sees the call."""

OUTSIDE = "outside"
"""Name of folders beside and above a tree that no reader of a bundle may touch."""

MAX_BYTES = 1 << 25
"""Largest size of what is repeated: mutations of mutations would grow without end."""

PATHS = (
    f"../{OUTSIDE}/secret", f"../../{OUTSIDE}/secret", f"../../../{OUTSIDE}/secret", f"../{OUTSIDE}/secret.json",
    f"../../{OUTSIDE}/secret.json", f"x/../../{OUTSIDE}/secret", "/dev/zero", "/dev/stdin", "CON", "nul.txt", "a\\b",
    "./x", "a//b", "..", ".", "/", "~", "a/" * 300, "x" * 300, "file:///dev/zero", "data/\udcff",
)  # fmt: skip

TEXTS = (
    "", " ", "\0", "\ud800", "\x1b]0;owned\x07", "\x1b[31mred\x1b[0m", "\u202e", "a\nb", "nan", "1e400", "true", "null",
    "%s%n", "{0.__class__.__init__.__globals__}", "{episode_index:0>3000000000}", "{{1/0}}", "{{ messages + 1 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 3000000000 }}",
    "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", CANARY, f"0*{CANARY}", "lambda: 0", "x" * 70_000, "F64",
    "bfloat16", "cuda:99", "../x", "ſ", "É" * 40, "0", "-1", "9" * 400,
)  # fmt: skip

NUMBERS: tuple[int | float, ...] = (
    0, 1, -1, 2, 3, 7, -2, 16, 255, 256, 65_535, 65_536, 100_000, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63,
    2**64, -(2**63), 10**9, 10**15, 10**30, 10**400, 0.0, -0.0, 0.1, 0.5, 1.5, -0.5, 1e-320, 1e-30, 1e30, 3.5e38, 1e308,
    -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """JSON text that no value stands for."""

    text: str


SHAPES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [{}], [None], {"": None}, {"dim": "x"}, {"dim": CANARY}, {"node": "x"},
    {"add": [CANARY, 1]}, {"pow": [9, {"pow": [9, {"pow": [9, 9]}]}]}, {"mul": [10**30, 10**30]}, {"floordiv": [1, 0]},
    [0] * 10_000, [-5], [1e308, 2.5], [True], ["a", 1], {"a": 1, "b": 2}, Raw("[" * 50_000 + "]" * 50_000),
    Raw('{"a":' * 3000 + "0" + "}" * 3000), Raw('{"a":1,"a":2}'), Raw("1e999999"), Raw("-"), Raw("0x10"), Raw("'x'"),
    Raw('"\\ud800"'), Raw('"\t"'), Raw("[1,]"), Raw("NaN"), Raw("1" * 5000),
)  # fmt: skip
