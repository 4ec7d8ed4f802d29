"""Every change of a graph, in phases and in order: the one list, and the one place that runs a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cosmos_export.diagnostics import UserError
from cosmos_export.ir.graph import Graph
from cosmos_export.ir.program import Program
from cosmos_export.ir.verifier import verify
from cosmos_export.kernels.description import ACTIVATION_QUANTIZE, NORM_QUANTIZE, QKV_PACK, SAMPLER_STEP
from cosmos_export.passes.assign_precision import AssignPrecision, OverSteps
from cosmos_export.passes.base import CannotApply, Effect, Pass, PassResult, describe
from cosmos_export.passes.batch_guidance import BatchGuidance
from cosmos_export.passes.cut_graph import CutGraph, Cuts, alone
from cosmos_export.passes.fold_schedule import FoldSchedule
from cosmos_export.passes.fuse_activation_quantize import FuseActivationQuantize
from cosmos_export.passes.fuse_denoise_loop import FuseDenoiseLoop
from cosmos_export.passes.fuse_joint_attention import FuseJointAttention
from cosmos_export.passes.fuse_norm_quantize import FuseNormQuantize
from cosmos_export.passes.fuse_qkv_pack import FuseQkvPack
from cosmos_export.passes.fuse_sampler_step import FuseSamplerStep
from cosmos_export.passes.insert_quantization import InsertQuantization, Ranges
from cosmos_export.passes.merge_linears import MergeLinears
from cosmos_export.passes.normalize import Normalize
from cosmos_export.passes.quantize_prefix import QuantizePrefix
from cosmos_export.passes.resolve_packing import ResolvePacking
from cosmos_export.passes.shift_rope import ShiftRope
from cosmos_export.passes.slice_outputs import SliceOutputs
from cosmos_export.passes.split_towers import SplitTowers
from cosmos_export.sampling import Schedule, Segment

CAPTURE = "capture"
"""Name of the stage before the first pass in lists of stages."""


@dataclass(frozen=True)
class PassOptions:
    """Options of all passes. The default: every output, nothing quantized, a loop that the host runs, nothing cut."""

    outputs: Collection[str] | None = None
    """Velocities to keep; None: all."""
    over_steps: OverSteps | None = None
    """Scheme of every site at each step; None: no site is quantized."""
    towers: Mapping[str, str] | None = None
    """Checkpoint tensor → ``und`` or ``gen``, held against what dataflow says; None: not compared."""
    ranges: Ranges = field(default_factory=Ranges)
    """Ranges and factors of calibration."""
    step: int = 0
    """The step of the schedule whose schemes the sites compute in."""
    schedule: Schedule | None = None
    segment: Segment | None = None
    """The steps that the loop runs by itself, of ``schedule``; None: the host runs it."""
    cuts: Cuts | None = None
    """Where graphs are cut; None: nowhere."""
    kernels: Collection[str] = ()
    """Kernels of `FUSIONS` that compute what they can, where the backend of a graph has them."""


@dataclass(frozen=True)
class Phase:
    """Passes that run one after the other, each made from the options, or None where they give it nothing to do."""

    name: str
    purpose: str
    passes: tuple[tuple[type[Pass], Callable[[PassOptions], Pass | None]], ...]


PHASES: tuple[Phase, ...] = (
    Phase(
        "form",
        "the published forward in the operations of the dialect, with rows where it packs and scatters",
        ((Normalize, lambda _: Normalize()), (ResolvePacking, lambda _: ResolvePacking())),
    ),
    Phase(
        "towers",
        "one graph for each rate: prompt, request, step, and what is left in the loop",
        (
            # Before the split, both rotary tables are in one graph, and what makes them independent is visible.
            (ShiftRope, lambda _: ShiftRope()),
            (SplitTowers, lambda _: SplitTowers()),
            (FoldSchedule, lambda _: FoldSchedule()),
            # Before merging: a query that needs fewer rows than its key is not merged with it.
            (SliceOutputs, lambda o: SliceOutputs(o.outputs)),
            (MergeLinears, lambda _: MergeLinears()),
            (FuseJointAttention, lambda _: FuseJointAttention()),
        ),
    ),
    Phase(
        "sites",
        "each product labelled with its scheme at every step",
        # Before the loop is closed: labels follow from the edges between the towers, and outlive copies.
        ((AssignPrecision, lambda o: None if o.over_steps is None else AssignPrecision(o.over_steps, o.towers)),),
    ),
    Phase(
        "loop",
        "guidance and sampler inside the body, for a loop that runs by itself",
        # Before quantization: the second branch of guidance reads keys and values as the first does, in one form.
        (
            (BatchGuidance, lambda o: BatchGuidance() if o.segment is not None and o.segment.guided else None),
            (FuseDenoiseLoop, lambda o: _fuse_denoise_loop(o)),
        ),
    ),
    Phase(
        "numbers",
        "products in the schemes of one step",
        (
            (InsertQuantization, lambda o: None if o.over_steps is None else InsertQuantization(o.ranges, o.step)),
            # After attention is in FP8, if it is: both quantize keys and values by one scale.
            (QuantizePrefix, lambda o: None if o.over_steps is None else QuantizePrefix(o.ranges)),
        ),
    ),
    Phase(
        "cut",
        "graphs of consecutive layers, where one engine would take too much memory to build",
        ((CutGraph, lambda o: None if o.cuts is None else CutGraph(o.cuts)),),
    ),
    Phase(
        "kernels",
        "this project's kernels in the place of what they compute, in graphs for a backend that has them",
        (
            (FuseQkvPack, lambda o: FuseQkvPack() if QKV_PACK in o.kernels else None),
            (FuseNormQuantize, lambda o: FuseNormQuantize() if NORM_QUANTIZE in o.kernels else None),
            (FuseActivationQuantize, lambda o: FuseActivationQuantize() if ACTIVATION_QUANTIZE in o.kernels else None),
            (FuseSamplerStep, lambda o: FuseSamplerStep() if SAMPLER_STEP in o.kernels else None),
        ),
    ),
)
FUSIONS = frozenset({QKV_PACK, NORM_QUANTIZE, ACTIVATION_QUANTIZE, SAMPLER_STEP})
"""Kernels that a pass of the last phase is for."""


def _fuse_denoise_loop(options: PassOptions) -> Pass | None:
    if options.segment is None or options.schedule is None:
        return None
    return FuseDenoiseLoop(options.schedule, options.segment)


ORDER: tuple[str, ...] = (CAPTURE, *(kind.name for phase in PHASES for kind, _ in phase.passes))
"""Names of all passes in order, after `CAPTURE`."""
AFTER_FORMS = frozenset(kind.name for phase in PHASES if phase.name in ("cut", "kernels") for kind, _ in phase.passes)
"""Passes that run on one graph at a time, once all forms of the program are made."""
_REMOVES = {kind.name: kind.removes for phase in PHASES for kind, _ in phase.passes}


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
    made = (make(options) for phase in PHASES if not phases or phase.name in phases for _, make in phase.passes)
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
