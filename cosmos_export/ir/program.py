"""A program: a few graphs, the edges between them, the denoising loop, and the dims they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cosmos_export.ir.dims import Dim
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.spec import Rate


@dataclass(frozen=True)
class Edge:
    """``output`` of graph ``source`` is ``input`` of graph ``target``.

    ``instance`` names the run of ``source`` that is meant where it runs more than once per request (the reasoner on the
    negative prompt); its caller's inputs then carry ``{instance}_`` before their names.
    """

    source: str
    output: str
    target: str
    input: str
    instance: str = ""


@dataclass(frozen=True)
class Loop:
    """The denoising loop: ``body`` runs once per step.

    ``carried`` maps an input of the body to the output that its next value follows from: through a sampler on the host,
    or, once `fuse_denoise_loop` has put the sampler into the body, the output itself. The loop is closed then: it runs
    ``steps`` steps of a schedule, from its step ``start`` on; ``rows`` are the inputs that take the step's row of a
    table. Carried values that are ``taken`` begin as they are given and all others as zeros; what is ``returned`` of
    them are the loop's results.
    """

    body: str
    carried: dict[str, str]
    rows: tuple[str, ...] = ()
    start: int = 0
    steps: int | None = None
    taken: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()
    """The graphs that the body was cut into, in order. ``body`` is then the last of them."""

    @property
    def span(self) -> slice:
        """The steps of a closed loop among those of its schedule."""
        return slice(self.start, self.start + (self.steps or 0))


@dataclass
class Program:
    """Graphs in the order in which they run, and what connects them."""

    graphs: dict[str, Graph]
    dims: dict[str, Dim]
    rates: dict[str, Rate]
    """Binding time of every input that the caller supplies."""
    loop: Loop
    edges: list[Edge] = field(default_factory=list)
    unused_keys: dict[str, str] = field(default_factory=dict)
    """Checkpoint tensor → why no graph reads it."""
    history: list[str] = field(default_factory=list)
    """Passes that have run."""

    def free_inputs(self, graph: str) -> list[str]:
        """Inputs of ``graph`` that the caller supplies: those without an edge."""
        fed = {e.input for e in self.edges if e.target == graph}
        return [name for name in self.graphs[graph].inputs if name not in fed]

    def edges_into(self, graph: str) -> Iterator[Edge]:
        return (e for e in self.edges if e.target == graph)

    def instances(self, graph: str) -> list[str]:
        """The runs of ``graph`` that edges want, its own first."""
        return list(dict.fromkeys(["", *(e.instance for e in self.edges if e.source == graph)]))

    def bound_keys(self) -> set[str]:
        """Checkpoint tensors that some graph reads."""
        return {key for g in self.graphs.values() for node in g.weights.values() for key in node.meta["weight"].keys}

    def copy(self) -> Program:
        return Program(
            graphs={name: g.copy() for name, g in self.graphs.items()},
            dims=dict(self.dims),
            rates=dict(self.rates),
            loop=self.loop,
            edges=list(self.edges),
            unused_keys=dict(self.unused_keys),
            history=list(self.history),
        )
