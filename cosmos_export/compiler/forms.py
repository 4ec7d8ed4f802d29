"""The forms of a program that a build lowers: bodies for the ways in which steps compute, closed loops, pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cosmos_export.ir.graph import Graph, Node
from cosmos_export.ir.program import Program
from cosmos_export.passes.cut_graph import alone
from cosmos_export.passes.options import Cuts, PassOptions
from cosmos_export.passes.pipeline import Watch, passes_of, run_passes
from cosmos_export.sampling import Schedule, Segment

DENOISE = "denoise"
"""Name of a closed loop, and with a number of each of several."""
Pieces = Mapping[str, tuple[Graph, ...]]
"""Graph → what it is lowered as: itself, or the graphs it was cut into, in the order in which they run."""


@dataclass(frozen=True)
class Forms:
    """A program whose sites compute as a recipe says."""

    program: Program
    """The program as most steps compute it; the plain program where nothing is quantized."""
    variants: Mapping[str, Program] = field(default_factory=dict)
    """The program with another body, by that body's name, for a loop on the host."""
    bodies: tuple[str, ...] = ()
    """The body of every step, where there are several."""
    closed: Mapping[str, Program] = field(default_factory=dict)
    """Loops that run by themselves, by the names of the models that they become."""

    @property
    def graphs(self) -> dict[str, Graph]:
        """The program's graphs, and the other bodies of its loop."""
        others = {name: variant.graphs[variant.loop.body] for name, variant in self.variants.items()}
        return {**self.program.graphs, **others}

    @property
    def closed_bodies(self) -> list[Graph]:
        """The body of every closed loop."""
        return [closed.graphs[closed.loop.body] for closed in self.closed.values()]


def make_forms(
    plain: Program,
    options: PassOptions,
    step_keys: Sequence[int],
    segments: Sequence[Segment] = (),
    *,
    until: str | None = None,
    watch: Watch | None = None,
) -> Forms:
    """Every form of ``plain``, which is labelled where ``options`` quantize, and stays as it is.

    ``step_keys``: one number per step, equal where steps compute alike. ``segments`` of ``options.schedule`` run by
    themselves; with none, the host runs the loop.
    """
    if options.over_steps is None:
        forms = Forms(plain)
    else:
        forms = _bodies(plain, options, step_keys, with_variants=not segments, until=until, watch=watch)
    if not segments or options.schedule is None:
        return forms
    return replace(forms, closed=close_loop(plain, options.schedule, segments, options, until=until, watch=watch))


def _bodies(
    plain: Program,
    options: PassOptions,
    step_keys: Sequence[int],
    *,
    with_variants: bool,
    until: str | None,
    watch: Watch | None,
) -> Forms:
    """A copy of ``plain`` for each way in which steps compute; the most frequent one has the body's own name."""
    body = plain.loop.body
    by_count = [key for key, _ in Counter(step_keys).most_common()]
    names = {key: body if i == 0 else f"{body}_{i + 1}" for i, key in enumerate(by_count)}
    programs = {
        name: quantize_copy(plain, options, list(step_keys).index(key), form=name, until=until, watch=watch)
        for key, name in names.items()
        if with_variants or name == body
    }
    variants = {name: program for name, program in programs.items() if name != body}
    return Forms(programs[body], variants, tuple(names[key] for key in step_keys) if variants else ())


def quantize_copy(
    plain: Program,
    options: PassOptions,
    step: int,
    *,
    form: str = "",
    until: str | None = None,
    watch: Watch | None = None,
) -> Program:
    """A copy of the labelled ``plain`` whose sites compute as at ``step``."""
    copy = plain.copy()
    passes = passes_of(replace(options, step=step), "numbers")
    run_passes(copy, passes, until=until, after_each=watch, form=form)
    return copy


def close_loop(
    program: Program,
    schedule: Schedule,
    segments: Sequence[Segment] | None = None,
    options: PassOptions | None = None,
    *,
    until: str | None = None,
    watch: Watch | None = None,
) -> dict[str, Program]:
    """For each of ``segments`` (all of the schedule), a copy of ``program`` whose loop runs it by itself, quantized as
    ``options`` say for its steps.

    Under the name of the model that it becomes: ``denoise``, or where there are several ``denoise_1``, ``denoise_2``, …
    """
    segments = segments or schedule.segments
    names = [f"{DENOISE}_{i}" for i in range(1, len(segments) + 1)] if len(segments) > 1 else [DENOISE]
    found = {}
    for name, segment in zip(names, segments, strict=True):
        closed = program.copy()
        own = replace(options or PassOptions(), schedule=schedule, segment=segment, step=segment.start)
        run_passes(closed, passes_of(own, "loop", "numbers"), until=until, after_each=watch, form=name)
        found[name] = closed
    return found


def cut_into_pieces(graphs: Mapping[str, Graph], cuts: Cuts, *, watch: Watch | None = None) -> Pieces:
    """Each of ``graphs`` as the pieces that ``cuts`` ask for."""
    found = {}
    for name, graph in graphs.items():
        found[name] = _cut(name, graph, cuts(name, graph), watch)
    return found


def _cut(name: str, graph: Graph, places: Sequence[Node], watch: Watch | None) -> tuple[Graph, ...]:
    if not places:
        return (graph,)
    program = alone(name, graph)
    run_passes(program, passes_of(PassOptions(cuts=lambda *_: places), "cut"), after_each=watch, form=name)
    return tuple(program.graphs.values())
