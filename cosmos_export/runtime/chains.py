"""Graphs that were cut into parts: one session for all of them, whose values stay where the backend keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cosmos_export.targets.sessions import Array, Executor, Session, Value


class ChainSession:
    """The ``parts`` of a graph one after the other, as its one session. ``inputs`` and ``outputs`` are the graph's."""

    def __init__(self, parts: Sequence[Session], inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._parts = tuple(parts)
        types: dict[str, np.dtype[Any]] = {}
        for part in parts:
            types = {**part.inputs, **types}
        self._inputs = {name: types[name] for name in inputs if name in types}
        self._outputs = tuple(outputs)

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Array | Value]) -> dict[str, Value]:
        given = dict(feeds)
        made: dict[str, Value] = {}
        for index, part in enumerate(self._parts):
            results = part.run(given)
            made |= {name: value for name, value in results.items() if name in self._outputs}
            later = {name for one in self._parts[index + 1 :] for name in one.inputs}
            # What no later part reads is given back before the next one runs.
            given = {name: value for name, value in {**given, **results}.items() if name in later}
        return {name: made[name] for name in self._outputs}

    def close(self) -> None:
        for part in self._parts:
            part.close()


@dataclass(frozen=True)
class ChainedExecutor:
    """``inner``, which knows parts alone, with the graphs that they are parts of."""

    inner: Executor
    chains: Mapping[str, Sequence[str]]
    contracts: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    """Names of the inputs and of the outputs of each of those graphs."""

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def device(self) -> str:
        return self.inner.device

    def open(self, graph: str) -> Session:
        if graph not in self.chains:
            return self.inner.open(graph)
        opened: list[Session] = []
        try:
            for part in self.chains[graph]:
                opened.append(self.inner.open(part))
        except BaseException:
            for session in opened:
                session.close()
            raise
        return ChainSession(opened, *self.contracts[graph])

    def close(self) -> None:
        self.inner.close()
