"""One progress over all stages of a build: a task whose units are the seconds that the plan expects of each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.codecs import CODECS
from cosmos_export.checkpoint.finite import TASK as LOOK_AT_WEIGHTS
from cosmos_export.compiler.selection import codec_tensors_bytes
from cosmos_export.plan.sizes import (
    CAPTURE_S_PER_LAYER,
    CODEC_S,
    ENGINE_BYTES_PER_S,
    HASH_BYTES_PER_S,
    WEIGHT_BYTES_PER_S,
    typical,
)
from cosmos_export.plan.subject import graph_tensors
from cosmos_export.progress import Progress

TASK = "build"
UNITS = 1000
_START_S = 4.0
"""Importing what capture needs."""
_ENGINE_S = 1.0
_LOOP = "denoise"


class Overall:
    """A `Progress` that also advances one task over all that ``expected`` names, in that order.

    A task that begins ends those before it: a resumed build skips what is finished. What is not named moves nothing.
    """

    def __init__(self, inner: Progress, expected: Mapping[str, float]) -> None:
        self._inner = inner
        self._expected = dict(expected)
        self._starts: dict[str, float] = {}
        start = 0.0
        for task, seconds in self._expected.items():
            self._starts[task] = start
            start += seconds
        self._total = start or 1.0
        self._units: dict[str, int | None] = {}
        self._shown = 0

    def __enter__(self) -> Overall:
        self._inner.begin(TASK, UNITS)
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.end(TASK)

    def begin(self, task: str, total: int | None = None) -> None:
        self._units[task] = total
        self._advance(task, 0.0)
        self._inner.begin(task, total)

    def update(self, task: str, completed: int) -> None:
        total = self._units.get(task)
        if total:
            self._advance(task, min(1.0, completed / total))
        self._inner.update(task, completed)

    def end(self, task: str) -> None:
        self._advance(task, 1.0)
        self._inner.end(task)

    def _advance(self, task: str, share: float) -> None:
        if task not in self._starts:
            return
        reached = self._starts[task] + share * self._expected[task]
        self._shown = max(self._shown, int(UNITS * reached / self._total))
        self._inner.update(TASK, self._shown)


def expected_seconds(checkpoint: Checkpoint, components: Sequence[str], loops: int | None) -> dict[str, float]:
    """Seconds that each task of a build is expected to take, by its name, in the order in which they come.

    ``loops``: how many engines are loops on the device; None: there are no engines.
    """
    geometry = checkpoint.geometry
    graphs = {name: sum(_stored(checkpoint, t.name) for t in own) for name, own in graph_tensors(geometry).items()}
    codecs = {name: codec_tensors_bytes(checkpoint, name) for name in components if name in CODECS}
    read = sum(graphs.values()) + sum(codecs.values())
    found = {LOOK_AT_WEIGHTS: read / typical(HASH_BYTES_PER_S), "tokenizer": _START_S}
    for name, size in codecs.items():  # their engines are built beside what follows
        stem = name.replace("-", "_")
        found[f"components {name}"] = typical(CODEC_S)  # it is captured first, then its weights are written
        found[f"weights of {stem}"] = size / typical(WEIGHT_BYTES_PER_S)
    found["capture"] = geometry.num_hidden_layers * typical(CAPTURE_S_PER_LAYER)
    for name, size in graphs.items():
        found[f"weights of {name}"] = size / typical(WEIGHT_BYTES_PER_S)
    if loops is not None:
        for name, size in _engines(loops, graphs).items():
            found[f"build {name}.engine"] = _ENGINE_S + size / typical(ENGINE_BYTES_PER_S)
    found["hashing inputs"] = 0.2 * sum(graphs.values()) / typical(HASH_BYTES_PER_S)
    return found


def _engines(loops: int, graphs: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the towers' engines, in the order they are built. ``loops``: how many run on the device alone."""
    found = {n: size for n, size in graphs.items() if n != "schedule" and not (loops and n == "generator")}
    if loops:
        names = [f"{_LOOP}_{i}" for i in range(1, loops + 1)] if loops > 1 else [_LOOP]
        found |= dict.fromkeys(names, graphs["generator"])
    return found


def _stored(checkpoint: Checkpoint, name: str) -> int:
    entry = checkpoint.tensors.get(name)
    return 0 if entry is None else entry.size_bytes
