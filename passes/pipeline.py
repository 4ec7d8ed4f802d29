"""Every change of a graph, in phases and in order, and the one place that runs a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import isabstract, isclass
from pkgutil import iter_modules

from cosmos_export import passes as package
from cosmos_export.diagnostics import UserError
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.program import Program
from cosmos_export.ir.verifier import verify
from cosmos_export.passes.base import CannotApply, Effect, Pass, PassResult, describe
from cosmos_export.passes.cut_graph import alone
from cosmos_export.passes.fusing import KernelPass
from cosmos_export.passes.options import PassOptions

CAPTURE = "capture"
"""Name of the stage before the first pass in lists of stages."""


@dataclass(frozen=True)
class Phase:
    """Passes that run one after the other."""

    name: str
    purpose: str
    passes: tuple[type[Pass], ...]


_PHASES: Mapping[str, str] = {
    "form": "the published forward in the operations of the dialect, with rows where it packs and scatters",
    "towers": "one graph for each rate: prompt, request, step, and what is left in the loop",
    # Before the loop is closed: labels follow from the edges between the towers, and outlive copies.
    "sites": "each product labelled with its scheme at every step",
    # Before quantization: the second branch of guidance reads keys and values as the first does, in one form.
    "loop": "guidance and sampler inside the body, for a loop that runs by itself",
    "numbers": "products in the schemes of one step",
    "cut": "graphs of consecutive layers, where one engine would take too much memory to build",
    "kernels": "this project's kernels in the place of what they compute, in graphs for a backend that has them",
}
"""Phase → its purpose, in order. A pass names its phase and its neighbours there: no list has to name it."""


def in_order(passes: Iterable[type[Pass]]) -> tuple[type[Pass], ...]:
    """``passes`` of one phase in the one order that they state. ValueError where they leave several, or none."""
    left = {kind.name: kind for kind in passes}
    earlier = {name: set(kind.after) for name, kind in left.items()}
    for name, kind in left.items():
        for other in kind.before:
            earlier.setdefault(other, set()).add(name)
    unknown = sorted(({*earlier} | {one for before in earlier.values() for one in before}) - {*left})
    if unknown:
        raise ValueError(f"there is no pass {', '.join(unknown)} in this phase")
    found: list[type[Pass]] = []
    while left:
        ready = [name for name in left if not earlier[name] & {*left}]
        if len(ready) != 1:
            state = f"{' and '.join(sorted(ready))} in any order" if ready else f"a circle of {', '.join(sorted(left))}"
            raise ValueError(f"`after` and `before` leave {state}")
        found.append(left.pop(ready[0]))
    return tuple(found)


def _kinds() -> Iterator[type[Pass]]:
    """Every pass of this folder."""
    for info in iter_modules(package.__path__):
        if f"{package.__name__}.{info.name}" != __name__:
            module = import_module(f"{package.__name__}.{info.name}")
            own = (kind for kind in vars(module).values() if isclass(kind) and kind.__module__ == module.__name__)
            yield from (kind for kind in own if issubclass(kind, Pass) and not isabstract(kind))


def _phases() -> tuple[Phase, ...]:
    kinds = list(_kinds())
    unknown = {kind.phase for kind in kinds} - set(_PHASES)
    if unknown:
        raise ValueError(f"there is no phase {', '.join(sorted(unknown))}")
    return tuple(
        Phase(name, purpose, in_order(kind for kind in kinds if kind.phase == name))
        for name, purpose in _PHASES.items()
    )


PHASES = _phases()
FUSIONS = frozenset(kind.kernel for phase in PHASES for kind in phase.passes if issubclass(kind, KernelPass))
"""Kernels that a pass of the last phase is for."""
ORDER: tuple[str, ...] = (CAPTURE, *(kind.name for phase in PHASES for kind in phase.passes))
"""Names of all passes in order, after `CAPTURE`."""
AFTER_FORMS = frozenset(kind.name for phase in PHASES if phase.name in ("cut", "kernels") for kind in phase.passes)
"""Passes that run on one graph at a time, once all forms of the program are made."""
_REMOVES = {kind.name: kind.removes for phase in PHASES for kind in phase.passes}


@dataclass(frozen=True)
class Report:
    """Record of one pass on a program, with its seconds."""

    name: str
    result: PassResult
    seconds: float
    form: str = ""
    """The form of the program that was rewritten: a body of the loop, a closed loop, a graph that is cut; empty for the
    program that all forms are made from."""
    effect: Effect = Effect.EXACT


Watch = Callable[[Program, Report], None]


def passes_of(options: PassOptions, *phases: str) -> list[Pass]:
    """The passes of ``phases`` (default: all) that have something to do under ``options``, in order."""
    unknown = set(phases) - {phase.name for phase in PHASES}
    if unknown:
        raise ValueError(f"there is no phase {', '.join(sorted(unknown))}")
    made = (kind.made(options) for phase in PHASES if not phases or phase.name in phases for kind in phase.passes)
    return [one for one in made if one is not None]


def default_passes(outputs: Collection[str] | None = None) -> list[Pass]:
    """The passes that every program goes through. ``outputs``: velocities to keep (default: all)."""
    return passes_of(PassOptions(outputs), "form", "towers")


def require_pass(until: str | None, options: PassOptions | None = None) -> None:
    """UserError CX222 where there is no pass ``until``, or where a build with ``options`` does not run it."""
    if until is not None and until not in ORDER:
        raise UserError("CX222", f"there is no pass `{until}`", f"passes, in order: {', '.join(ORDER)}")
    if until is None or options is None:
        return
    runs = [CAPTURE, *(one.name for one in passes_of(options))]
    if until not in runs:
        raise UserError("CX222", f"this build does not run `{until}`", f"passes that it runs: {', '.join(runs)}")


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    until: str | None = None,
    after_each: Watch | None = None,
    form: str = "",
) -> list[Report]:
    """Run ``passes`` on ``program`` in place, with the verifier after each (and after capture). Nothing else
    runs a pass.

    ``until``: the last pass in `ORDER` that runs. ``form``: what the reports call the program. The program's history
    and the reasons of tensors that nothing reads any more are kept here.

    Raises UserError: CX222 for an unknown ``until``, CX220 where a pass cannot apply, or the model computes
    something that it does not know. InternalError (CX201) where a pass breaks the IR.
    """
    require_pass(until)
    last = len(ORDER) if until is None else ORDER.index(until)
    forbidden: frozenset[object] = frozenset().union(*(_REMOVES.get(name, ()) for name in program.history))
    if program.history in ([], [CAPTURE]):  # what comes later was verified behind the pass before
        verify(program, stage=CAPTURE)
    reports: list[Report] = []
    for step in passes:
        if step.name in ORDER and ORDER.index(step.name) > last:
            break
        start = time.perf_counter()
        keys = program.bound_keys()
        step.requires(program)
        result = step.run(program)
        for key in sorted(keys - program.bound_keys()):
            program.unused_keys[key] = f"no output follows from it ({step.name})"
        _require_removed(program, step, result)
        forbidden |= step.removes
        program.history.append(step.name)
        verify(program, stage=step.name, forbidden=forbidden)
        step.ensures(program)
        report = Report(step.name, result, time.perf_counter() - start, form, step.effect)
        reports.append(report)
        if after_each is not None:
            after_each(program, report)
    return reports


def _require_removed(program: Program, step: Pass, result: PassResult) -> None:
    """CX220 where ``step`` left an operation that it is there to remove: the model has it in a place of its own."""
    left = [n for graph in program.graphs.values() for n in graph.calls() if n.target in step.removes]
    reasons = {d.where: d.reason for d in result.declined}
    for node in sorted(left, key=lambda n: describe(n) not in reasons):  # what a pass says of itself comes first
        why = reasons.get(describe(node), "")
        raise CannotApply(step.name, node, f"`{node.target}` is not known in this place{why and f': {why}'}")


def fuse_kernels(
    graph: Graph, kernels: Collection[str], after_each: Watch | None = None, *, until: str | None = None
) -> Graph:
    """A copy of ``graph`` with those of ``kernels`` that are among `FUSIONS` in the place of what they compute."""
    program = alone(graph.name, graph.copy())
    chosen = PassOptions(kernels=FUSIONS & set(kernels))
    run_passes(program, passes_of(chosen, "kernels"), until=until, after_each=after_each, form=graph.name)
    return program.graphs[graph.name]
