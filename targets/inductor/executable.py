"""The inductor backend: graphs after all passes as compiled torch code, and on a GPU as captured CUDA graphs.

A graph is specialised to the sizes of one call (`specialise`), and `torch.compile` makes fused kernels of it. On a GPU
the compiled function is captured when sizes come again, and replayed: a replay has no work on the host. A closed loop
is captured with all its steps. Weights are arguments, not constants of the code: one copy on the device serves every
size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from cosmos_export.ir.dims import bind
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.targets.inductor.specialise import CompiledPart, CompileSettings, specialise

_WARM_UP = 2
_CAPTURES = 2
"""Captured graphs that an executable keeps, one for each set of sizes: a prompt and its negative one have two."""
_SIZES = 256
"""Sizes that an executable remembers to have checked."""
Function = Callable[..., dict[str, torch.Tensor]]
Sizes = tuple[tuple[str, tuple[int, ...]], ...]


class Executable:
    """A graph with its weights on one device, compiled for the sizes it is called with, except those of open dims."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        settings: CompileSettings | None = None,
    ) -> None:
        self.graph = graph
        self.device = device
        self.settings = settings or CompileSettings()
        self._fixed = {name: weights[name] for name in graph.weights}
        self._fixed |= {name: node.meta["constant"].to(device) for name, node in graph.constants.items()}
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._plains: dict[Any, Function] = {}
        self._plain_of: dict[Sizes, Function] = {}
        self._captured: dict[tuple[Any, Sizes], Captured] = {}
        self._too_large: set[tuple[Any, Sizes]] = set()
        self._seen: list[tuple[Any, Sizes]] = []

    @property
    def inputs(self) -> dict[str, torch.dtype]:
        return {name: spec_of(node).dtype for name, node in self.graph.inputs.items()}

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object] | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs by name. ``inputs`` are on the device and of the graph's types.

        ``tokens`` names what an input's value comes from, where that never changes: an input with the token of the last
        call is not read again. What a captured graph returns is overwritten by its next call.
        """
        sizes: Sizes = tuple((name, tuple(inputs[name].shape)) for name in self.graph.inputs)
        with torch.no_grad(), self._current():
            return self._run((None, sizes), self._plain(sizes), inputs, tokens or {})

    def loop(
        self, steps: Steps, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object] | None = None
    ) -> dict[str, torch.Tensor]:
        """Values of ``steps.returned`` after all of ``steps``. ``inputs``: of the carried state the first value, of
        rows those of every step, [steps, …]; ``tokens`` as for a call.
        """
        sizes: Sizes = tuple(
            (name, tuple(inputs[name].shape[1:] if name in steps.rows else inputs[name].shape))
            for name in self.graph.inputs
        )
        if self._captures and not self.settings.whole_loop:
            steady = {n: t for n, t in (tokens or {}).items() if n not in steps.rows and n not in steps.carried}
            return unrolled(lambda now: self(now, steady), steps)(inputs)
        with torch.no_grad(), self._current():
            body = self._plain(sizes)
            once = unrolled(body, replace(steps, count=1))
            return self._run((steps.key, sizes), unrolled(body, steps), inputs, tokens or {}, once)

    def _run(
        self,
        key: tuple[Any, Sizes],
        function: Function,
        inputs: Mapping[str, torch.Tensor],
        tokens: Mapping[str, object],
        warm: Function | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sizes that come again are captured: those of a prompt whose length no other has are not worth it."""
        if key in self._captured:
            return self._captured[key](inputs, tokens)
        if self._captures and key in self._seen and key not in self._too_large:
            self._make_room(_CAPTURES - 1)
            example = {name: inputs[name] for name in self.graph.inputs}
            try:
                self._captured[key] = Captured(function, example, warm)
                return self._captured[key](inputs, tokens)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                self._too_large.add(key)  # what is captured has memory of its own beside the rest
        self._seen = [*self._seen, key][-_CAPTURES:]
        try:
            return function(inputs)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
            self._make_room(0)
        return function(inputs)

    def _make_room(self, most: int) -> None:
        """Keep ``most`` captured graphs, the newest: each holds its own activations, gigabytes at 720p."""
        while len(self._captured) > most:
            del self._captured[next(iter(self._captured))]
        if not most and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _current(self) -> AbstractContextManager[Any]:
        """Streams, graphs and Triton's launches are those of the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @property
    def _captures(self) -> bool:
        return self.device.type == "cuda" and self.settings.captured

    def _plain(self, sizes: Sizes) -> Function:
        """The graph for ``sizes`` and every other value of the open dims. ValueError as from `specialise`."""
        if sizes not in self._plain_of:
            binding = bind((name, spec_of(self.graph.inputs[name]).shape, shape) for name, shape in sizes)
            key = tuple((name, value) for name, value in binding.items() if name not in self.settings.open_dims)
            if key not in self._plains:
                self._plains[key] = self._specialised(sizes)
            if len(self._plain_of) >= _SIZES:
                self._plain_of.clear()
            self._plain_of[sizes] = self._plains[key]
        return self._plain_of[sizes]

    def _specialised(self, sizes: Sizes) -> Function:
        found = specialise(self.graph, dict(sizes), self.settings, self.device)
        steps = [(self._code(chunk), chunk.operands, chunk.results) for chunk in found.chunks]
        last = {name: i for i, (_, operands, _) in enumerate(steps) for name in operands}
        fixed, device, outputs = self._fixed, self.device, found.outputs  # not self: nothing is to be held in a cycle
        dead = [
            [n for n in operands if last[n] == i and n not in fixed and n not in outputs.values()]
            for i, (_, operands, _) in enumerate(steps)
        ]

        def plain(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            values = {**fixed, **given}
            for (code, operands, results), gone in zip(steps, dead, strict=True):
                made = code(device, *(values[name] for name in operands))
                values.update(zip(results, made, strict=True))
                for name in gone:
                    del values[name]
            return {name: values[node] for name, node in outputs.items()}

        return plain

    def _code(self, chunk: CompiledPart) -> Callable[..., Any]:
        if not self.settings.compiled or not chunk.compiled:
            return chunk.module
        if chunk.key not in self._compiled:
            self._compiled[chunk.key] = _compile(chunk)
        return self._compiled[chunk.key]


def _out_of_memory(error: BaseException | None) -> bool:
    """Also where the end of a capture has hidden it."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or _out_of_memory(error.__context__))


def _compile(chunk: CompiledPart) -> Callable[..., Any]:
    compiled = torch.compile(chunk.module, dynamic=False, fullgraph=True)
    if not chunk.open:
        return compiled

    def marked(device: torch.device, *operands: torch.Tensor) -> Any:
        for index, axis in chunk.open:
            torch._dynamo.maybe_mark_dynamic(operands[index], axis)
        return compiled(device, *operands)

    return marked


@dataclass(frozen=True)
class Steps:
    """A closed loop over a graph."""

    count: int
    carried: Mapping[str, str]
    """Input → output that is its value in the next step."""
    rows: tuple[str, ...]
    """Inputs that are given for all steps, [steps, …]."""
    returned: tuple[str, ...]
    """The carried inputs whose last value is wanted."""

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.count, tuple(self.carried.items()), self.rows, self.returned)


def unrolled(body: Function, steps: Steps) -> Function:
    """All of ``steps`` as one function of what the loop is given; captured, it is one CUDA graph."""

    def run(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {name: given[name] for name in steps.rows}
        state = {name: given[name] for name in steps.carried}
        steady = {name: t for name, t in given.items() if name not in rows and name not in state}
        for step in range(steps.count):
            made = body({**steady, **state, **{name: row[step] for name, row in rows.items()}})
            state = {name: made[result] for name, result in steps.carried.items()}
        return {name: state[name] for name in steps.returned}

    return run


class Captured:
    """A function of tensors as one CUDA graph, which reads its inputs from memory of its own.

    ``warm`` does in a shorter time all that must happen once before capture; None: the function itself.
    """

    def __init__(self, function: Function, example: Mapping[str, torch.Tensor], warm: Function | None = None) -> None:
        self._inputs = {name: t.clone() for name, t in example.items()}
        self._tokens: dict[str, object] = {}
        own = {t.untyped_storage().data_ptr() for t in self._inputs.values()}

        def apart(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            # A result that is an input handed through (the sampler's last velocity becomes the one before) would change
            # when the inputs of the next call are written.
            made = function(given)
            return {n: t.clone() if t.untyped_storage().data_ptr() in own else t for n, t in made.items()}

        self._replay, self._outputs = self._capture(apart, warm or function)

    def _capture(self, function: Function, warm: Function) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
        """A call that replays ``function`` on the inputs, and the places of its results."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # compilation, library handles and workspaces, before capture
                warm(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(self._inputs)
        return graph.replay, outputs

    def __call__(self, inputs: Mapping[str, torch.Tensor], tokens: Mapping[str, object]) -> dict[str, torch.Tensor]:
        for name, own in self._inputs.items():
            token = tokens.get(name)
            if token is None or self._tokens.get(name) is not token:
                own.copy_(inputs[name])
            if token is not None:
                self._tokens[name] = token  # kept alive: its identity stays its own
            else:
                self._tokens.pop(name, None)
        self._replay()
        return self._outputs
