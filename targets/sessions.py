"""Sessions run graphs: one interface for every backend. A generator sees no more of a backend than this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PROMPT, STEP = "input_ids", "timestep"
"""Inputs of the caller that make a graph one of the prompt, or one of the step."""


class Value(Protocol):
    """A tensor where its backend keeps it. It lives until nothing refers to it, over any number of runs."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def numpy(self) -> Array:
        """Its elements on the host, in the type they have on the device; waits for the run that makes them."""


class Session(Protocol):
    """One graph, ready to run."""

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        """Type of every input, by name."""

    @property
    def outputs(self) -> tuple[str, ...]: ...

    def run(self, feeds: Mapping[str, Array | Value]) -> dict[str, Value]:
        """Outputs by name. ``feeds`` has every input, as an array (cast to the input's type) or as a value of the same
        backend, and may have more. Its arrays may be changed as soon as this returns.

        ToolError CX501 where the backend fails.
        """

    def close(self) -> None:
        """Give its memory back. Values it made stay."""


class Executor(Protocol):
    """A device with one verified bundle: what a backend opens."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    def open(self, graph: str) -> Session:
        """A session for ``graph`` of the bundle. ToolError CX502 where it cannot be loaded."""

    def close(self) -> None:
        """Give the device back."""
